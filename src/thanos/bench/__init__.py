"""Benchmarks of ``thanos bench``: synchronised times, with errors and the minimum time of the device. Nothing is printed."""
