"""A small task for a small chat model: `peftc demo` trains on it, and so do examples and benchmarks."""
