"""Functions of the suite in processes of their own, where nothing was mapped before."""

from __future__ import annotations

import datetime
import subprocess
import sys
import zlib

import pytest

from tests.conformance.test_conformance import CASES, name

PARTS = 32
TODAY = datetime.datetime.now(datetime.UTC).timetuple().tm_yday % PARTS
NAMES = [name(case) for case in CASES]


def assert_right(wanted: str) -> None:
    command = [sys.executable, "-m", "tests.conformance.fresh", wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "wanted", [each for each in NAMES if zlib.crc32(each.encode()) % PARTS == TODAY]
)
def test_those_of_the_day(wanted: str) -> None:
    assert_right(wanted)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("wanted", NAMES)
def test_all(wanted: str) -> None:
    assert_right(wanted)
