"""From the program of one sample to functions that run whole batches."""
