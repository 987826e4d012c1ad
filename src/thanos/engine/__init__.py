"""The loop over decoder blocks, with its hidden states, its weights and its work on several processes."""
