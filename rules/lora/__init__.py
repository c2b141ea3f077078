"""LoRA: y + s·B(A(x)).  Hu et al. 2021, arXiv:2106.09685."""
