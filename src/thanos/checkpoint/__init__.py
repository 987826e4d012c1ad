"""Checkpoints on disk and in memory: the sources of tensors, and the writer of the output."""
