"""A module that backwards import when they run."""

k = 1.0
