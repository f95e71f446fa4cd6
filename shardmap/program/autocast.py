"""Autocast around programs: their casts are recorded; a user's backward follows the state."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from shardmap.program.ir import Equation, variables
from shardmap.program.operators import op_info
from shardmap.program.schema import short_name

_KINDS = ("cpu", "cuda")


def autocast_state(kind: str) -> str:
    """The dtype that autocast casts to on a kind of device in this thread; empty if it is off."""
    on = kind in _KINDS and torch.is_autocast_enabled(kind)
    return str(torch.get_autocast_dtype(kind)) if on else ""


@contextlib.contextmanager
def plain_numerics() -> Iterator[None]:
    """Switch autocast off during a replay: its casts have been recorded."""
    entered = [t for t in _KINDS if torch.is_autocast_enabled(t)]
    if not entered:
        yield
        return
    with contextlib.ExitStack() as stack:
        for t in entered:
            stack.enter_context(torch.autocast(t, enabled=False))
        yield


_DTYPES = {"cpu": torch.bfloat16, "cuda": torch.float16}
"""What autocast casts to where nothing else has been said."""


class Modes(NamedTuple):
    """The modes around a gradient that python code may ask for, beside `is_grad_enabled`."""

    enabled: tuple[bool, ...]
    """For each kind of device: True if autocast is on."""
    dtypes: tuple[torch.dtype, ...]
    cached: bool
    anomaly: bool

    @staticmethod
    def now() -> Modes:
        """Those of this thread."""
        return Modes(
            tuple([torch.is_autocast_enabled(kind) for kind in _KINDS]),
            tuple([torch.get_autocast_dtype(kind) for kind in _KINDS]),
            torch.is_autocast_cache_enabled(),
            torch.is_anomaly_enabled(),
        )

    def plain(self) -> Modes:
        """These without autocast, as torch asks to take gradients."""
        return Modes((False,) * len(_KINDS), tuple(_DTYPES.values()), True, self.anomaly)

    def others(self, asked: Collection[str]) -> list[Modes]:
        """Modes that code which asks by some names may tell from these."""
        found = []
        if any("autocast" in name for name in asked):
            on = [tuple([k == kind for k in _KINDS]) for kind in _KINDS]
            found += [self._replace(enabled=enabled) for enabled in on]
            found += [
                self._replace(enabled=(True,) * len(_KINDS), dtypes=(dtype,) * len(_KINDS))
                for dtype in _DTYPES.values()
            ]
            found.append(self._replace(cached=not self.cached))
        if any("anomaly" in name for name in asked):
            found.append(self._replace(anomaly=not self.anomaly))
        return found

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let these be the modes in the body."""
        before = Modes.now()
        if before == self:
            yield
            return
        try:
            self._set()
            yield
        finally:
            before._set()

    def _set(self) -> None:
        for kind, enabled, dtype in zip(_KINDS, self.enabled, self.dtypes, strict=True):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.cached)
        if torch.is_anomaly_enabled() != self.anomaly:
            with warnings.catch_warnings():  # it says that it is slow
                warnings.simplefilter("ignore", UserWarning)
                torch.autograd.set_detect_anomaly(self.anomaly)

    def __str__(self) -> str:
        on = [
            f"autocast for {kind} to {dtype}"
            for kind, enabled, dtype in zip(_KINDS, self.enabled, self.dtypes, strict=True)
            if enabled
        ]
        off = [
            f"an autocast dtype {dtype} for {kind}"
            for kind, enabled, dtype in zip(_KINDS, self.enabled, self.dtypes, strict=True)
            if not enabled and dtype != _DTYPES[kind]
        ]
        cached = [] if self.cached else ["no cache of autocast"]
        anomaly = ["anomaly detection"] if self.anomaly else []
        return ", ".join([*on, *off, *cached, *anomaly]) or "no mode"


def asked_modes(names: Collection[str]) -> frozenset[str]:
    """The names, among some, by which code asks for such modes."""
    return frozenset(
        [
            name
            for name in names
            if name.startswith(("is_", "get_")) and ("autocast" in name or "anomaly" in name)
        ]
    )


def is_cast_free(calls: Sequence[Equation]) -> bool:
    """True if autocast would change nothing in calls that were recorded while it was off.

    It never casts float64 numbers; of float32 ones it casts the operands of matrix products and
    the like, and what 16 bits meet.
    """
    held = [v for eq in calls for v in variables((eq.args, eq.kwargs, eq.outs))]
    kinds = {v.spec.dtype for v in held if v.spec.dtype.is_floating_point}
    if kinds <= {torch.float64}:
        return True
    return kinds <= {torch.float64, torch.float32} and all(
        op_info(eq.op).shape_only
        or torch.Tag.pointwise in eq.op.tags
        or torch.Tag.reduction in eq.op.tags
        or short_name(eq.op).partition(".")[0] in _NEVER_CAST
        for eq in calls
    )


_NEVER_CAST = frozenset(
    "view reshape _unsafe_view _reshape_alias t transpose permute expand squeeze unsqueeze clone "
    "alias detach _to_copy slice select narrow diagonal unfold contiguous lift_fresh as_strided "
    "zeros ones full empty scalar_tensor arange eye masked_fill index index_select gather scatter "
    "scatter_add cat stack flip roll tril triu cumsum copy_ fill_ zero_ data own_backward split "
    "split_with_sizes unbind chunk constant_pad_nd _local_scalar_dense item".split()
)
"""Operators without a tag that are no products."""
