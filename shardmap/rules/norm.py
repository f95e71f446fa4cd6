"""Rules of the norm family."""
