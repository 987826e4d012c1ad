"""Perplexity, zero-shot tasks, and what a checkpoint really holds."""
