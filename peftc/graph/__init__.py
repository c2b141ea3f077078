"""Models as graphs: sites, capture, structural copy, fingerprint. Nothing here changes a model."""
