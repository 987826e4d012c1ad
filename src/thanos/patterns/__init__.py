"""Sparsity patterns."""
