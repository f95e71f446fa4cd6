"""The oracle: the plain loop over rows, and the comparison of any `vmap` with it.

`loop` has the signature of `shardmap.vmap`, so it can stand wherever a map can: nested, under
transforms, or as the subject of its own comparison. `compare` builds the same setting twice, runs
the loop on one and the subject on the other, and looks at everything that a caller could see
afterwards.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shardmap.errors import ShardmapError
from tests.loop import loop as loop
from tests.loop import rows as rows
from tests.same import Mismatch, assert_own_memory, assert_same

Subject = Callable[..., Callable[..., Any]]


# What a slow loop over the batch says of itself: PyTorch's own fallback, and ours.
FALLBACK_WARNING = re.compile(
    r"performance drop|batching rule|loop(s|ed|ing)? over the (batch|samples)|one sample at a time",
    re.IGNORECASE,
)


@dataclass
class Setting:
    """One fresh copy of everything that a run touches."""

    run: Callable[[Subject], Any]
    """Calls the map, given as an argument, and returns its outputs (a pytree of tensors)."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """Tensors handed to the map: checked for changes, aliasing and gradients."""
    captured: list[torch.Tensor] = field(default_factory=list)
    """Tensors that the mapped function shares between samples: checked the same way."""


REFUSALS: tuple[type[BaseException], ...] = (ShardmapError,)


@dataclass(frozen=True)
class Checks:
    """The checks that apply, and the precision of the comparison."""

    gradient: bool = True
    second_order: bool = False
    aliasing: bool = True
    requires_grad: bool = True
    precision: torch.dtype | None = None
    """The least precise dtype computed in on the way, where it is not that of the outputs."""
    cancels: bool = False
    """True if outputs may be what is left where products of the inputs cancel: a few units of
    rounding of those products are no difference then."""
    refusals: tuple[type[BaseException], ...] = REFUSALS
    """Errors that the subject may raise though the loop has a result; any other is a crash."""


EVERYTHING = Checks()
"""All checks, gradients of the first order."""


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison.

    `right`, `refused`, `wrong`, or `skipped` where the loop itself fails.
    """

    kind: str
    detail: str = ""
    fallback: bool = False
    gradient: str = ""
    """Order of the compared gradients: "", "first", "second", or the reason why the loop has
    none."""

    def __bool__(self) -> bool:
        """True if the subject did nothing wrong."""
        return self.kind != "wrong"


@dataclass
class Seen:
    """All that one run left behind."""

    outputs: list[torch.Tensor]
    spec: Any
    changed: list[torch.Tensor]
    """Inputs and captured tensors as they are afterwards."""
    first: list[torch.Tensor | None] | None = None
    second: list[torch.Tensor | None] | None = None
    no_gradient: str = ""
    fallback: bool = False


def weights_like(tensors: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Fixed random weights: each output element reaches the gradient with its own factor."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5).to(t.dtype)
        for t in tensors
    ]


def weighted_sum(tensors: Sequence[torch.Tensor | None], seed: int) -> torch.Tensor | None:
    """A scalar that depends on every floating-point element that requires grad."""
    used = [
        t
        for t in tensors
        if t is not None and t.requires_grad and (t.is_floating_point() or t.is_complex())
    ]
    terms = [(w * t).sum() for w, t in zip(weights_like(used, seed), used, strict=True)]
    terms = [term.real if term.is_complex() else term for term in terms]
    return torch.stack([term.to(torch.float64) for term in terms]).sum() if terms else None


def look(setting: Setting, subject: Subject, checks: Checks) -> Seen:
    """Runs the setting with `subject` as its map and collects what can be seen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = setting.run(subject)
    outputs, spec = pytree.tree_flatten(result)
    watched = setting.inputs + setting.captured
    seen = Seen(outputs, spec, [t.detach().clone() for t in watched])
    seen.fallback = any(
        w.category.__name__ == "SlowLoopWarning" or FALLBACK_WARNING.search(str(w.message))
        for w in caught
    )
    if not checks.gradient or not all(isinstance(o, torch.Tensor) for o in outputs):
        return seen
    wrt = [t for t in watched if t.requires_grad]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            total = weighted_sum(outputs, 1)
            if total is None or not wrt:
                return seen
            seen.first = list(
                torch.autograd.grad(total, wrt, create_graph=checks.second_order, allow_unused=True)
            )
            if checks.second_order:
                total = weighted_sum(seen.first, 2)
                if total is not None:
                    seen.second = list(torch.autograd.grad(total, wrt, allow_unused=True))
        except ShardmapError:
            raise
        except RuntimeError as error:
            seen.no_gradient = first_line(error)
    return seen


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def compare(
    build: Callable[[], Setting],
    subject: Subject,
    checks: Checks = EVERYTHING,
    perturbed: Callable[[], Setting] | None = None,
    reference: Subject = loop,
) -> Verdict:
    """Judges `subject` by the loop, in a setting that `build` makes afresh for each.

    Args:
        build: makes the same setting at each call, sharing no tensors between calls.
        subject: a map with the signature of `shardmap.vmap`.
        checks: what is looked at.
        perturbed: makes the setting with inputs changed by rounding; where the loop's own answer
            changes with it, so may the subject's.
        reference: the loop.
    """
    try:
        want = look(build(), reference, checks)
    except Exception as error:
        return Verdict("skipped", f"the loop fails: {first_line(error)}")
    setting = build()
    random_state = torch.random.get_rng_state()
    grads_before = [t.grad for t in setting.inputs + setting.captured]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    try:
        got = look(setting, subject, checks)
    except checks.refusals as error:
        changed = _changed_by_refusal(build, setting)
        return (
            Verdict("wrong", f"{first_line(error)}\n{changed}")
            if changed
            else Verdict("refused", first_line(error))
        )
    except Exception as error:
        return Verdict("wrong", "crash: " + "".join(traceback.format_exception(error, limit=-6)))
    if not torch.equal(random_state, torch.random.get_rng_state()):
        return Verdict("wrong", "the global random state changed")
    if modes != (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
    ):
        return Verdict("wrong", "a global mode changed")
    if any(
        t.grad is not before
        for t, before in zip(setting.inputs + setting.captured, grads_before, strict=True)
    ):
        return Verdict("wrong", "a .grad field changed")
    try:
        _judge(setting, got, want, checks, None)
    except Mismatch as mismatch:
        if perturbed is None:
            return Verdict("wrong", str(mismatch), got.fallback)
        try:
            _judge(setting, got, want, checks, look(perturbed(), reference, checks))
        except Exception:
            return Verdict("wrong", str(mismatch), got.fallback)
    done = want.no_gradient or ("second" if want.second else "first" if want.first else "")
    return Verdict("right", "", got.fallback, done)


def _judge(setting: Setting, got: Seen, want: Seen, checks: Checks, slack: Seen | None) -> None:
    """Raises `Mismatch` at the first difference between the two runs."""
    if got.spec != want.spec:
        raise Mismatch(f"structure {got.spec}, the loop has {want.spec}")
    entered = 0.0
    if checks.cancels:
        largest = max([1.0, *(_largest(t) for t in (*want.outputs, *want.changed))])
        entered = largest * largest
    for i, (mine, theirs) in enumerate(zip(got.outputs, want.outputs, strict=True)):
        loose = slack.outputs[i] if slack else None
        assert_same(mine, theirs, f"output {i}", checks.precision, loose, entered)
        # An integer tensor that is filled with one that requires grad does so too, and torch cannot
        # differentiate by it: then nothing can be said of what comes of it.
        sound = "isDifferentiableType" not in want.no_gradient
        if checks.requires_grad and sound and mine.requires_grad != theirs.requires_grad:
            raise Mismatch(
                f"output {i}: requires_grad {mine.requires_grad}, the loop has "
                f"{theirs.requires_grad}"
            )
    for i, (mine, theirs) in enumerate(zip(got.changed, want.changed, strict=True)):
        assert_same(
            mine,
            theirs,
            f"input or captured tensor {i} afterwards",
            checks.precision,
            slack.changed[i] if slack else None,
        )
    if checks.aliasing:
        assert_own_memory(got.outputs, setting.inputs + setting.captured)
    if want.no_gradient:
        return
    if got.no_gradient:
        raise Mismatch(f"gradient fails: {got.no_gradient}")
    for order in ("first", "second"):
        mine_all, theirs_all = getattr(got, order), getattr(want, order)
        if theirs_all is None or mine_all is None:
            # None on one side only is a gradient that is zero there: connected on one path, cut on
            # the other.
            mine_all, theirs_all = (
                mine_all or [None] * len(theirs_all or []),
                theirs_all or [None] * len(mine_all or []),
            )
        slacks = (getattr(slack, order) if slack else None) or [None] * len(theirs_all)
        entered = max(
            [1.5, *(_largest(t) for t in (*want.outputs, *want.changed))]
        )  # 1.5: the weights of `weighted_sum`
        for i, (mine, theirs, loose) in enumerate(zip(mine_all, theirs_all, slacks, strict=True)):
            present = theirs if mine is None else mine
            if present is None:
                continue
            mine, theirs = (torch.zeros_like(present) if g is None else g for g in (mine, theirs))
            assert_same(
                mine, theirs, f"{order}-order gradient {i}", checks.precision, loose, entered
            )


def _largest(tensor: torch.Tensor) -> float:
    """The largest finite magnitude."""
    if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    magnitudes = tensor.detach().double().abs()
    return float(magnitudes.where(magnitudes.isfinite(), 0.0).max())


def _changed_by_refusal(build: Callable[[], Setting], setting: Setting) -> str:
    """Says which tensor a refused call has changed, or nothing."""
    before = build()
    try:
        for i, (now, then) in enumerate(
            zip(setting.inputs + setting.captured, before.inputs + before.captured, strict=True)
        ):
            assert_same(now, then, f"refused, but input or captured tensor {i}")
    except Mismatch as mismatch:
        return str(mismatch)
    return ""


def refusal(build: Callable[[], Setting], subject: Subject, expected: type[BaseException]) -> str:
    """Checks that `subject` raises `expected` and leaves nothing changed; returns the message.

    Raises:
        AssertionError: another error, none, or something changed.
    """
    setting = build()
    random_state = torch.random.get_rng_state()
    versions = [t._version for t in setting.inputs + setting.captured]
    try:
        setting.run(subject)
    except expected as error:
        changed = _changed_by_refusal(build, setting)
        assert not changed, changed
        after = [t._version for t in setting.inputs + setting.captured]
        assert versions == after, f"version counters went from {versions} to {after}"
        assert all(t.grad is None for t in setting.inputs + setting.captured), (
            "a .grad field was filled"
        )
        assert torch.equal(random_state, torch.random.get_rng_state()), (
            "the global random state changed"
        )
        return str(error)
    except Exception as error:
        raise AssertionError(f"expected {expected.__name__}, got {first_line(error)}") from error
    raise AssertionError(f"expected {expected.__name__}, nothing was raised")


def torch_func(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    **options: Any,
) -> Callable[..., Any]:
    """`torch.func.vmap` as a subject: the reference that the sweep compares with.

    Its refusals are of many classes.
    """
    options.pop("kw_in_dims", None)
    return torch.func.vmap(
        func, in_dims, out_dims, randomness, chunk_size=options.get("chunk_size")
    )


def shardmap_subject() -> Subject:
    """`shardmap.vmap`, imported late so that the harness can be used without it."""
    import shardmap

    return shardmap.vmap


def subject_named(name: str) -> Subject:
    """`shardmap`, `torch`, or `loop`."""
    return {"shardmap": shardmap_subject, "torch": lambda: torch_func, "loop": lambda: loop}[name]()


def twin(tensor: Any, memo: dict[int, Any] | None = None) -> Any:
    """A leaf with the same values, strides and offset over a copied storage.

    Views of one storage stay views of one.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return (
            tensor.detach().clone().requires_grad_(tensor.requires_grad)
            if isinstance(tensor, torch.Tensor)
            else tensor
        )
    memo = {} if memo is None else memo
    storage = tensor.untyped_storage()
    copy = memo.setdefault(storage._cdata, None)
    if copy is None:
        copy = memo[storage._cdata] = storage.clone()
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    fresh.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())
    if tensor.is_conj():
        fresh = fresh.conj()
    if tensor.is_neg():
        fresh = torch.ops.aten._neg_view(fresh)
    return fresh.requires_grad_(tensor.requires_grad)
