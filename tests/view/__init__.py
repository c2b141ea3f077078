"""How a plan is shown: as text (tests/plan), and as a page."""
