"""Fused GPU kernels in Triton; one file per idea. Imported only where there is a GPU."""
