"""Checkpoints on disk and in memory: read one tensor, write one at its place."""
