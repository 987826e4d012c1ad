"""Checkpoints on disk and in memory: where tensors come from, and where they go."""
