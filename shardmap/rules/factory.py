"""Rules of the factory family."""
