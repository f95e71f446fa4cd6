"""One function of the suite as the first that a process maps: `python -m tests.conformance.fresh NAME`.

Torch imports modules of its own, and makes tables, when something is used for the first time: then
inside of the recording.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import shardmap
from tests.conformance.test_conformance import CASES, Run, compare, loop, name


def main(wanted: str) -> None:
    """Map it as often as `trace="auto"` needs to replay it, and compare each call with the loop."""
    warnings.simplefilter("ignore")
    (case,) = [case for case in CASES if name(case) == wanted]
    if case.refused is not None:
        try:
            Run(case, shardmap.vmap, case.options)
        except case.refused:
            return
        raise SystemExit("it is not refused")
    found = [Run(case, shardmap.vmap, case.options) for _ in range(3)]
    reference = replace(case, function=case.plain) if case.plain else case
    want = Run(reference, loop, {})
    for call, got in enumerate(found):
        compare(got, want, f"call {call}")


if __name__ == "__main__":
    main(sys.argv[1])
