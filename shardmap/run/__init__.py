"""Executors: they run a job chunk by chunk."""
