"""Kernels for CUDA in Triton, of attention and of experts. Each stands beside plain torch that computes the same."""
