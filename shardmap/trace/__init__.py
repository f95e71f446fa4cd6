"""Record the calls that a function makes for one real sample."""
