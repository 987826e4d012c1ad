"""Figures of a study's report."""
