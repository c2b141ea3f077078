"""Methods that exist in tests only, each one file: the proof that the rule contract carries them."""
