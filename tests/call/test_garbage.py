"""Finalisers that run while a function is recorded: those of a library are no part of it."""

from __future__ import annotations

import types

import pytest

from shardmap.trace.watch import PythonWatch

SOURCE = """
import time

class Finalised:
    def __del__(self):
        time.perf_counter()
"""


@pytest.mark.parametrize(
    ("file", "blame"),
    [
        ("/lib/python3/site-packages/library.py", ""),
        ("/usr/lib/python3/dist-packages/library.py", ""),
        ("/home/user/own.py", "it calls time.perf_counter"),
    ],
)
def test_a_finaliser_that_reads_the_clock(file: str, blame: str) -> None:
    """A library's objects die at any moment, as garbage; the user's own may matter."""
    module = types.ModuleType("finalising")
    exec(compile(SOURCE, file, "exec"), vars(module))
    dying = module.Finalised()
    with PythonWatch() as watch:
        del dying
    assert watch.blame.startswith(blame)
    assert bool(watch.blame) == bool(blame)
