"""Runs.

A dataset, a function mapped over its samples, and a report on the outputs, put together from a
configuration.
"""

from shardmap.jobs.base import Dataset, Findings, Outcome

__all__ = ["Dataset", "Findings", "Outcome"]
