"""Prediction of a run's seconds and bytes, by phase."""
