"""Studies: grids of pruning runs, with their results in one store."""
