"""Kernels for GPUs in triton, which is imported by whoever imports them."""
