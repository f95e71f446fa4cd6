"""Rules of the linalg family."""
