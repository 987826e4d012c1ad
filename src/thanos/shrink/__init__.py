"""Smaller models: which parameters belong to a neuron or a head, the smaller config, and the smaller folder."""
