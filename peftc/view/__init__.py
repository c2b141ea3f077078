"""How a plan is shown: as a table, as a page, as a network, as the difference to another."""
