"""Compares the maps of one model with the plain loop, on every sample."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

import shardmap
from tests.loop import loop
from tests.same import Mismatch, assert_same
from tests.zoo import Entry, Model
from tests.zoo.vision import without_compiled_operators

CALLS = 4


@dataclass
class Verdict:
    """What was found about one model.

    Attributes:
        kind: "equal", "by a loop" (equal, and an operator runs sample by sample that is not listed
            with a reason), "refused", "differs" or "missing package".
        loops: The operators that run sample by sample.
        maps: The maps that were compared.
        share: The part of the parameters that has a gradient in some sample.
        detail: The error or the difference.
    """

    name: str
    kind: str
    detail: str = ""
    loops: list[str] = field(default_factory=list)
    maps: list[str] = field(default_factory=list)
    share: float = 0.0
    recorded: str = ""
    """Why the function is recorded at each call; empty if its recording is replayed."""
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """True if nothing differs from the loop, or the model could not be built."""
        return self.kind in ("equal", "by a loop", "missing package")

    @property
    def passed(self) -> bool:
        """True if it is right, and batched but for what is listed."""
        return self.kind in ("equal", "missing package")

    def __str__(self) -> str:
        line = f"{self.name:<26} {self.kind:<16} {self.seconds:5.1f} s"
        if self.maps:
            line += f"  {self.share:6.1%} of parameters  {', '.join(self.maps)}"
        if self.loops:
            line += f"  (by a loop: {', '.join(self.loops)})"
        if self.recorded:
            line += f"\n    {self.recorded}"
        return line + (f"\n    {self.detail}" if self.detail else "")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(entry: Entry) -> Verdict:
    """Map one model and compare."""
    started = time.perf_counter()
    verdict = Verdict(entry.name, "equal")
    if find_spec(entry.package) is None:
        verdict.kind, verdict.detail = "missing package", f"pip install {entry.package}"
        return verdict
    without_compiled_operators()  # transformers and peft import torchvision where there is one
    torch.manual_seed(1)
    model = entry.build()
    try:
        _compare(model, verdict)
        new = [name for name in verdict.loops if name not in entry.loops]
        if new:
            verdict.kind = "by a loop"
    except Mismatch as error:
        verdict.kind, verdict.detail = "differs", str(error)
    except shardmap.errors.ShardmapError as error:
        verdict.kind, verdict.detail = "refused", f"{type(error).__name__}: {error}"
    verdict.seconds = time.perf_counter() - started
    return verdict


def _compare(model: Model, verdict: Verdict) -> None:
    parameters = tuple(p for p in model.module.parameters() if p.requires_grad)
    sample = [t[0] for t in model.batch]
    first = torch.autograd.grad(model.loss(model.module, *sample), parameters, allow_unused=True)
    used = tuple(
        [p for p, g in zip(parameters, first, strict=True) if g is not None or model.unused]
    )
    how = {"allow_unused": True, "materialize_grads": True} if model.unused else {}

    def gradient(*sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model.loss(model.module, *sample), used, **how)

    options = dict(model.options)
    want = _follow("gradients", gradient, model, verdict, lambda f: shardmap.vmap(f, **options))
    total = sum(p.numel() for p in parameters)
    covered = sum(int((g != 0).any(0).sum()) for g in want)
    verdict.share = covered / total

    compared = shardmap.compare(gradient, **options)(
        *model.batch, samples=range(len(model.batch[0]))
    )
    if not compared.agrees:
        raise Mismatch(str(compared))
    if compared.parameter_share is None or abs(compared.parameter_share - verdict.share) > 1e-9:
        raise Mismatch(
            f"compare says {compared.parameter_share} of the parameters, the loop {verdict.share}"
        )

    verdict.loops = sorted(name for name, tier in compared.tiers.items() if tier == "loop")
    plan = shardmap.plan(gradient, **options)(*model.batch).explain()
    if "sample by sample" in plan or compared.ways:
        verdict.loops = sorted({*verdict.loops, compared.ways or "the function itself"})
    verdict.recorded = next(
        (line for line in plan.splitlines() if "at each call, because" in line), ""
    )

    norms = (
        torch.cat([g.abs().reshape(len(g), -1).double() for g in want], 1)
        .norm(dim=1)
        .to(want[0].dtype)
    )
    _follow(
        "norms", gradient, model, verdict, lambda f: shardmap.vmap(f, reduce="norm", **options), [norms]
    )  # fmt: skip

    if model.output is not None:
        output = model.output
        x = model.batch[0]

        def of_input(x: torch.Tensor) -> torch.Tensor:
            return output(model.module, x)

        def by_rows(x: torch.Tensor) -> torch.Tensor:
            return torch.autograd.functional.jacobian(of_input, x)  # pyright: ignore

        rows = [by_rows(row) for row in x]
        mapped = shardmap.jacobian(of_input, **options)
        for call in range(CALLS):
            order = list(range(len(x))) if call % 2 == 0 else list(range(len(x)))[::-1]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", shardmap.SlowLoopWarning)
                got = mapped(x[order])
            _note_loops(caught, verdict)
            assert_same(
                got,
                torch.stack([rows[k] for k in order]),
                f"Jacobian, call {call}",
                model.precision,
            )
        verdict.maps.append("jacobian")


def _follow(
    what: str,
    function: Callable[..., Any],
    model: Model,
    verdict: Verdict,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    want: Sequence[torch.Tensor] | None = None,
) -> Sequence[torch.Tensor]:
    """Compare each of some calls, every other one with the samples the other way round."""
    if want is None:
        want = loop(function)(*model.batch)
    mapped = make(function)
    for call in range(CALLS):
        back = call % 2
        batch = [t.flip(0) for t in model.batch] if back else model.batch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", shardmap.SlowLoopWarning)
            got = mapped(*batch)
        _note_loops(caught, verdict)
        got = [got] if isinstance(got, torch.Tensor) else got
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            expected = b.flip(0) if back else b
            assert_same(a, expected, f"{what}, call {call}, output {number}", model.precision)
    verdict.maps.append(what)
    return want


def _note_loops(caught: list[warnings.WarningMessage], verdict: Verdict) -> None:
    for warning in caught:
        if issubclass(warning.category, shardmap.SlowLoopWarning) and not verdict.detail:
            verdict.detail = str(warning.message)[:600]
