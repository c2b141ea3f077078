"""What several test files share: models, adapters, checkpoints, strategies, and stand-ins for what is outside."""
