"""Rules of the reduce family."""
