"""Rules of the matmul family."""
