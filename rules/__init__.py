"""The rules that come with peftc, one file per method, and the architectures it knows."""
