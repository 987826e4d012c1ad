"""The loop over decoder blocks, and what it needs: hidden states, weights, several processes."""
