"""Rules of the view family."""
