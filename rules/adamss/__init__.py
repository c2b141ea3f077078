"""AdaMSS: W + Σₖ Bₖ·Aₖ·V, for the rows of W in clusters.  Zheng et al. 2025, NeurIPS."""
