"""Models: find and open them, and name their blocks, linear layers and parameters."""
