"""One pruning run: the checks before it, its work folder, journal and lock, its report and model card."""
