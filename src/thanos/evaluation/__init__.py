"""Perplexity, zero-shot tasks, and the inspection of a checkpoint's weights."""
