"""Runs: samples, a function that is mapped over them, and a report, named by a configuration.

The python beside a configuration imports from here, and from `shardmap.jobs.report`.
"""

from shardmap.jobs.base import Dataset, Findings, Outcome
from shardmap.jobs.config import Bounds
from shardmap.jobs.folder import save_tensors
from shardmap.jobs.reproducible import one_thread

__all__ = ["Bounds", "Dataset", "Findings", "Outcome", "one_thread", "save_tensors"]
