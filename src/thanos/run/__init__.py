"""One pruning run: what is checked before it, its work folder, journal and lock, its report and model card."""
