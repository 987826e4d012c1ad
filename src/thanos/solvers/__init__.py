"""Prune one weight matrix: tensors in, tensors out."""
