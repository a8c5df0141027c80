"""Kernels in CUDA C++ for Hopper (compute capability 9.0), where Triton leaves bandwidth unused."""
