"""Turn a finished checkpoint into another form: packed, and back."""
