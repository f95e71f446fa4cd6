"""Rules of the attention family."""
