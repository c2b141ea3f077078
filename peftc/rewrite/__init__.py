"""The only code that changes a graph or a model: splice, host, apply, undo."""
