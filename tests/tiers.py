"""The tier that serves each operator of PyTorch's database, and the page that lists them.

    python -m tests.tiers --update --workers 2      # measure all, store, write docs/operators.md
    python -m tests.tiers --only histc,add          # print what serves these

An operator is mapped as the sweep maps it (`tests.sweep`), a few of its samples, all their tensors,
and in both directions; what counts is how the recorded calls were lowered. The sweep judges values.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import shardmap
from shardmap import errors
from shardmap._torch import packet_of
from shardmap.lower import cache
from shardmap.program.operators import op_info
from tests import isolate, oracle, sweep
from tests.scoreboard import DIRECTIONS

SAMPLES, BATCH = 3, 2
TIERS = {
    "rule": "each recorded call is batched by a rule of this package",
    "folded": "a rule folds the map into a batch dimension that the kernel has already",
    "decomposed": "PyTorch records it as other operators, and those have rules",
    "torch.func": "`torch.func.vmap` batches one of its calls, which has no rule here",
    "by sample": "a call, or the whole function, runs sample by sample, with a warning",
    "refused": "an error says what to do instead",
}
"""From the best to the worst; an operator's tier is the worst of its samples'."""
DATA = Path(__file__).parent / "data" / "op_db_tiers.json"
PAGE = Path(__file__).parent.parent / "docs" / "operators.md"
Found = dict[str, dict[str, str]]


def served(name: str, op: Any) -> Found:
    """For each direction the tier and, of the last two, the reason."""
    found: Found = {}
    for direction in DIRECTIONS:
        supported = op.supported_dtypes("cpu")
        if direction == "gradient":
            supported = op.supported_backward_dtypes("cpu") if op.supports_autograd else ()
        dtype = next((d for d in sweep.PREFERRED if d in supported), None)
        if dtype is None:
            continue
        worst: tuple[str, str] | None = None
        for leaves, spec, at in sweep.batches(op, dtype, SAMPLES):
            one = _served(op, leaves, spec, at, direction)
            order = list(TIERS)
            if one and (worst is None or order.index(one[0]) > order.index(worst[0])):
                worst = one
        if worst is not None:
            found[direction] = {"tier": worst[0], **({"why": worst[1]} if worst[1] else {})}
    return found


def _served(
    op: Any, leaves: list[Any], spec: Any, at: list[int], direction: str
) -> tuple[str, str] | None:
    """The tier of one batch, or None if the loop has no result for it."""
    rest = [None if i in at else leaf for i, leaf in enumerate(leaves)]
    function, tensors = sweep.forward(op, spec, rest, at), [leaves[i] for i in at]
    if direction == "gradient":
        kinds = [t.is_floating_point() or t.is_complex() for t in tensors]
        wrt = [k for k, differentiable in enumerate(kinds) if differentiable]
        if not wrt:
            return None
        function = sweep.gradient(function, wrt, False)
    with sweep.RandomCalls() as watch:
        try:
            oracle.loop(function)(*[t.clone() for t in tensors])
        except Exception:  # of any kind: there is nothing to map
            return None
    if watch.found:
        return None
    shardmap.clear_caches()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            shardmap.vmap(function)(*[t.clone() for t in tensors])
        except errors.ShardmapError as error:
            return "refused", _sentence(str(error))
        except Exception as error:  # an error of torch's own
            return "refused", f"{type(error).__name__}: {_sentence(str(error))}"
    names = {op.name, op.aten_name, *[a.name for a in op.aliases]}
    return _of_lowerings({_base(name.replace(".", "_")) for name in names}, said)


def _of_lowerings(names: set[str], said: list[warnings.WarningMessage]) -> tuple[str, str]:
    """The tier of the calls that have just been lowered."""
    loops: list[str] = []
    tiers: set[str] = set()
    folded = own = False
    for low in cache.lowerings():
        tiers.update(low.batched.tiers.values())
        loops += [n for n, tier in low.batched.tiers.items() if tier == "loop"]
        folded |= any(call.target is torch.Tensor.flatten for call in low.batched.comparable)
        recorded = [eq.op for eq in low.program.equations]
        own |= any(_base(packet_of(op).__name__) in names for op in recorded)
        dynamic = {op.name() for op in recorded if op_info(op).dynamic}
        loops = [
            f"{n}: the shape of its result depends on values" if n in dynamic else n for n in loops
        ]
    slow = [str(w.message) for w in said if issubclass(w.category, shardmap.SlowLoopWarning)]
    if loops:
        listed = "; ".join(n if " " in n else f"{n}: no rule" for n in dict.fromkeys(loops))
        return "by sample", listed.replace("aten::", "")
    if slow:
        return "by sample", _sentence(slow[0])
    if "functorch" in tiers:
        return "torch.func", ""
    return ("folded" if folded else "rule" if own else "decomposed"), ""


def _base(name: str) -> str:
    """The name of an operator without the marks of its forms in place and below autograd."""
    return name.strip("_").removesuffix("_backward").removesuffix("_forward")


def _sentence(text: str) -> str:
    """A message without the call before it, and without what follows its first clause."""
    _, _, said = text.partition("): ")
    said = (said or text).splitlines()[0]
    return said.partition(";")[0].partition(" (called at ")[0].partition(", so it runs")[0]


def page(stored: dict[str, Any]) -> str:
    """The text of docs/operators.md."""
    operators: dict[str, Found] = stored["operators"]
    counts = {
        d: collections.Counter(f[d]["tier"] for f in operators.values() if d in f)
        for d in DIRECTIONS
    }
    lines = [
        "# Operators",
        "",
        "How each operator of PyTorch's own database (torch "
        f"{stored['torch_version'].partition('+')[0]}) is mapped, in forward and in the gradient",
        "of each sample. `python -m tests.tiers --update` measures it and writes this page; "
        "`shardmap ops` lists the rules,",
        "`shardmap ops --missing` what has none, `shardmap ops --tier loop` what only a loop "
        "serves.",
        "",
        "| tier | forward | gradient | |",
        "|---|---:|---:|---|",
        *[
            f"| {tier} | {counts['forward'][tier]} | {counts['gradient'][tier]} | {meaning} |"
            for tier, meaning in TIERS.items()
        ],
        "",
        "An operator that occurs with several tiers has the last of them.",
        "",
        "## By sample, and refused",
        "",
        "| operator | direction | tier | reason |",
        "|---|---|---|---|",
    ]
    for name, found in sorted(operators.items()):
        for direction, entry in found.items():
            if "why" in entry:
                why = entry["why"].replace("|", "\\|")
                lines.append(f"| `{name}` | {direction} | {entry['tier']} | {why} |")
    lines += ["", "## All", "", "| operator | forward | gradient |", "|---|---|---|"]
    for name, found in sorted(operators.items()):
        cells = [found[d]["tier"] if d in found else "" for d in DIRECTIONS]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def load() -> dict[str, Any]:
    """The stored measurement."""
    empty = {"torch_version": torch.__version__, "operators": {}}
    return json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else empty


def store(results: dict[str, Found]) -> None:
    """Store these operators' tiers, and write the page."""
    stored = load()
    stored["torch_version"] = torch.__version__
    stored["operators"].update({name: found for name, found in results.items() if found})
    for name in [name for name, found in results.items() if not found]:
        stored["operators"].pop(name, None)
    stored["operators"] = dict(sorted(stored["operators"].items()))
    rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in stored["operators"].items()]
    head = f'{{"torch_version": {json.dumps(stored["torch_version"])}, "operators": {{\n'
    DATA.write_text(head + ",\n".join(rows) + "\n}}\n", encoding="utf-8")
    PAGE.write_text(page(stored), encoding="utf-8")


def measured(names: list[str], workers: int) -> Iterator[tuple[str, Found]]:
    """Measure operators in worker processes; one that fails is left out, and said."""
    command = [sys.executable, "-m", "tests.tiers", "--serve"]
    for name, answer in isolate.run(command, names, workers, 300):
        if answer.startswith("{"):
            yield name, json.loads(answer)
        else:
            print(f"{name}: {answer}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure operators; print or store what serves them."""
    parser = argparse.ArgumentParser(prog="python -m tests.tiers", description=__doc__)
    parser.add_argument("--only", default="", help="operators, with commas between")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--update", action="store_true", help="store it, and write the page")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        known, sweep.BATCH = sweep.operators(), BATCH
        isolate.serve(lambda name: served(name, known[name]))
        return 0
    names = args.only.split(",") if args.only else list(sweep.operators())
    results = {}
    for name, found in measured(names, args.workers):
        results[name] = found
        print(name, json.dumps(found), flush=True)
    if args.update:
        store(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
