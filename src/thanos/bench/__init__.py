"""Benchmarks of ``thanos bench``: synchronised times, errors, and lower bounds of the times. Nothing is printed."""
