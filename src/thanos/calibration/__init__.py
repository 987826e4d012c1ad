"""Calibration: sources of text, windows of token ids, statistics of the layers' inputs."""
