"""Models: where they are, their modules, their parameters' names."""
