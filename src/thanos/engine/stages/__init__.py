"""Stages: the work on a block while its weights are in memory. One file per stage."""
