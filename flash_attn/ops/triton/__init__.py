"""Operations with Triton kernels for GPUs; elsewhere, and for compilers, torch computes the same.

Importing them needs neither a GPU nor Triton.
"""
