"""Calibration: sources of text, windows of token ids, and statistics of the layers' inputs."""
