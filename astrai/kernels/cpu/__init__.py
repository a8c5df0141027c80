"""Kernels of the CPU, compiled by Numba when they are first needed."""
