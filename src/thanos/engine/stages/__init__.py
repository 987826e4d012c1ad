"""What is done to a block while it is in memory: one file a stage."""
