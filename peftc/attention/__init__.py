"""Attention modules as sites: what is added to their output, from their own queries, keys and values."""
