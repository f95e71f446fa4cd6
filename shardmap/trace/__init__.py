"""Run a function on one real sample and record what it does."""
