"""Rules of the pointwise family."""
