"""AdaLoRA: adaptive budget allocation.  Zhang et al. 2023, arXiv:2303.10512."""
