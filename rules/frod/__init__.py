"""FRoD: W + U(S + diag(l − l₀))Vᵀ, with V of all weights of one kind.  AAAI 2026, doi:10.1609/aaai.v40i31.39813."""
