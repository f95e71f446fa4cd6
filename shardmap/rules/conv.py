"""Rules of the conv family."""
