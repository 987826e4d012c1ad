"""Benchmarks behind ``thanos bench``: synchronised times beside errors and beside the floor. Nothing here is printed."""
