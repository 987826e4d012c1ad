"""The study: a grid of pruning runs, one store of their results."""
