"""Other libraries: how each means batch normalization."""
