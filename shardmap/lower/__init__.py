"""Lowering: turns the program of one sample into functions that run whole batches."""
