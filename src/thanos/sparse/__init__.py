"""Packed sparse weights: storage formats, kernels, and the loader for transformers."""
