"""Figures of the Triton kernels, and what they compile to."""
