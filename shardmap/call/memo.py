"""`trace="once"`: replay a recording while the values that the function reads stay the same.

A recording holds tensors by identity and numbers by value. It goes stale when the caller rebinds
what the function reads: `W = W - lr * g`, `model.weight = Parameter(...)`, `settings.scale = 2`. So
everything that the function can reach by name (closure cells, globals, attributes, module
parameters, containers) is listed when it is recorded and compared at each call.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import types
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from shardmap._torch import (
    attention_kernels,
    forward_level,
    function_depth,
    functorch,
    generator_id,
    global_hooks,
    pytree,
    storage_id,
)
from shardmap.call.blame import why_not
from shardmap.call.guards import Guarded, Guards
from shardmap.call.reachable import VALUES, History, Unknown, reachable, same
from shardmap.call.reads import Walk
from shardmap.call.root import Root
from shardmap.lower.cache import Lowered
from shardmap.rules.sparse import memory_of
from shardmap.trace.batch import Batch
from shardmap.trace.recording import Recording, wrappers_of
from shardmap.trace.watch import PythonWatch

logger = logging.getLogger("shardmap")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recording and its lowerings, found again without comparing programs."""

    recording: Recording
    structure: pytree.TreeSpec
    """Structure of the function's result."""
    lowerings: dict[Any, Lowered] = field(default_factory=dict)
    outputs: dict[Any, Any] = field(default_factory=dict)
    """Descriptions of its outputs, by device, outer autograd and size of the batch."""
    derived: dict[Any, Any] = field(default_factory=dict)
    """Prepared maps that compute something else from the same recording."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A recording, and the values that must be unchanged for it to be replayed."""

    prepared: Prepared
    reads: list[object]
    """The objects and values that the function could reach, as listed by `reachable`."""
    arguments: dict[int, int]
    """Captured tensors that are unmapped arguments: position among the captured -> leaf of the
    call."""
    fixed: dict[int, torch.Tensor]
    """Unmapped arguments that the function can reach by name too: leaf of the call -> the tensor
    that it must be."""
    guarded: Guarded | None = None
    """What the code that ran has read; None if it was not watched."""

    @property
    def flat(self) -> bool:
        """True if the guards alone tell whether what the function reads is unchanged."""
        return self.guarded is not None and self.guarded.whole

    def rebound(self, batch: Batch) -> Prepared:
        """The recording with the unmapped arguments of this call."""
        if not self.arguments:
            return self.prepared
        captured = self.captured(batch.leaves)
        recording = dataclasses.replace(self.prepared.recording, captured=captured)
        return dataclasses.replace(self.prepared, recording=recording)

    def captured(self, leaves: Sequence[object]) -> tuple[torch.Tensor, ...]:
        """The captured tensors, with the unmapped ones among the leaves of a call's arguments."""
        captured = list(self.prepared.recording.captured)
        for position, leaf in self.arguments.items():
            tensor = leaves[leaf]
            assert isinstance(tensor, torch.Tensor)
            captured[position] = tensor
        return tuple(captured)


class Memory(History):
    """The recordings of one mapped function, by signature."""

    most = 64
    """Largest number of signatures that are kept."""

    def __init__(self, func: Callable[..., Any], call: str):
        self.call = call
        self._func: Callable[[], Callable[..., object] | None] = lambda: func
        self.kept: dict[object, Remembered] = {}
        self.said = False

    def recall(self, batch: Batch, reads: list[object] | None = None) -> Remembered | None:
        """The recording that serves this call; None if the function reads changed values.

        Args:
            batch: The call's arguments.
            reads: What the function reads now, if it has been listed.
        """
        key = signature(batch)
        found = self.kept.get(key)
        if found is None:
            return None
        unchanged = all(batch.leaves[leaf] is tensor for leaf, tensor in found.fixed.items())
        if unchanged and not found.flat:
            unchanged = same(found.reads, reads or self.reads(batch))
        if not unchanged:
            self.kept.pop(key, None)
            return None
        if not self.holds(found, shared_arguments(batch)):
            self.kept.pop(key, None)
            return None
        return found

    def holds(self, found: Remembered, arguments: Sequence[object]) -> bool:
        """True if what the code has read is as it was.

        Args:
            found: The recording.
            arguments: The call's arguments that all samples share.
        """
        if found.guarded is None:
            return True
        func = self._func()
        assert func is not None, "it is being called"
        root = Root(func, arguments)
        return found.guarded.hold(root.key, root.parts)

    def keep(
        self,
        batch: Batch,
        prepared: Prepared,
        reads: list[object] | None = None,
        watch: PythonWatch | None = None,
    ) -> None:
        """Keep a recording, unless the function reads something that cannot be compared.

        Args:
            batch: The call's arguments.
            prepared: The recording.
            reads: What the function reads, if it has been listed.
            watch: The code that ran while it was recorded, if that was watched.
        """
        reads = reads or self.reads(batch)
        unknown = next((r for r in reads if type(r) is Unknown), None)
        if unknown is not None:
            self.say(f"the function can reach {unknown.what}, which cannot be compared")
            return
        tensors = [r for r in reads if isinstance(r, torch.Tensor)]
        known = {id(t) for t in tensors}
        parts = {address for t in tensors for address in memory_of(t)}
        given = {generator_id(r) for r in reads if isinstance(r, torch.Generator)}
        if any(generator_id(g) not in given for g in prepared.recording.generators):
            self.say("a torch.Generator that the function draws from cannot be found by name")
            return
        mapped = {i for i, _ in batch.mapped}
        leaves = {
            id(t): i
            for i, t in enumerate(batch.leaves)
            if isinstance(t, torch.Tensor) and i not in mapped
        }
        arguments, fixed = {}, {}
        for position, tensor in enumerate(prepared.recording.captured):
            if id(tensor) in known:
                if id(tensor) in leaves:
                    fixed[leaves[id(tensor)]] = tensor
            elif id(tensor) in leaves:
                arguments[position] = leaves[id(tensor)]
            elif storage_id(tensor.untyped_storage()) not in parts:
                self.say(
                    f"a captured tensor of shape {tuple(tensor.shape)} cannot be found by name "
                    "(closure, global, "
                    "attribute, module parameter)"
                )
                return
        guarded = None
        if watch is not None:
            guarded, why = self._guarded(batch, watch, prepared.recording)
            if why:
                self.say(why)
                return
        if len(self.kept) >= self.most:
            oldest = next(iter(list(self.kept)), None)  # the list is made in one step
            self.kept.pop(oldest, None)
        # The function's result is of this call's first sample: a later call's must not be
        # compared with it.
        recording = dataclasses.replace(prepared.recording, sample=())
        self.kept[signature(batch)] = Remembered(
            dataclasses.replace(prepared, recording=recording),
            self.held(reads),
            arguments,
            fixed,
            guarded,
        )

    def watch(self, batch: Batch) -> PythonWatch | None:
        """The watch for this call's recording: none, unless the call itself has one (`once`)."""
        del batch
        return None

    def _guarded(
        self, batch: Batch, watch: PythonWatch, recording: Recording
    ) -> tuple[Guarded | None, str]:
        """The guards of what the code that ran has read, or the reason why they do not suffice.

        What it finds by calls is not compared: `trace="once"` says so (docs/semantics.md).
        """
        key, kept = signature(batch), self.kept

        def gone(_: object) -> None:
            kept.pop(key, None)

        shared, func = shared_arguments(batch), self._func()
        assert func is not None, "it has just been recorded"
        root = Root(func, shared)
        walk = Walk(watch, root, gone)
        if unknown := [type(v).__name__ for v in walk.unknown if not isinstance(v, _LISTED)]:
            return (
                None,
                f"the function can reach an object ({unknown[0]}) whose state cannot be compared",
            )
        if walk.hidden:
            return None, walk.hidden
        given = {id(leaf) for leaf in shared}
        tensors = [None if id(t) in given else t for t in walk.found.tensors.values()]
        # Samples that answer otherwise run code that was not watched.
        whole = not recording.asked and not why_not(walk, recording)
        return Guarded(Guards(walk.found, ()), root.key, tensors, whole), ""

    def held(self, reads: list[object]) -> list[object]:
        """The part of a listing that is kept: all of it."""
        return reads

    def reads(self, batch: Batch) -> list[object]:
        """Objects that the function can reach, by name or through arguments that hold others."""
        return reachable(
            self._func(),
            *[leaf for leaf in batch.leaves if not isinstance(leaf, (torch.Tensor, *VALUES))],
        )

    def say(self, why: str) -> None:
        """Warn once that recordings are not kept."""
        if not self.said:
            logger.warning("%s: trace='once' records at each call, because %s", self.call, why)
            self.said = True

    def forget(self, batch: Batch) -> None:
        """Drop the recording for this signature because it is stale."""
        self.kept.pop(signature(batch), None)


def shared_arguments(batch: Batch) -> list[object]:
    """The arguments that all samples share, but numbers and texts, which the signature holds."""
    return shared_among(batch.leaves, frozenset([i for i, _ in batch.mapped]))


def shared_among(leaves: Sequence[object], mapped: Set[int]) -> list[object]:
    """The leaves that are neither mapped nor numbers or texts.

    Args:
        leaves: The leaves of a call's arguments.
        mapped: The positions of those that are mapped.
    """
    kept = [leaf for i, leaf in enumerate(leaves) if i not in mapped]
    return [leaf for leaf in kept if not isinstance(leaf, VALUES)]


def are_leaves_of(batch: Batch, leaves: Sequence[object]) -> bool:
    """True if a call's arguments were opened to these leaves: some containers open otherwise."""
    return len(leaves) == len(batch.leaves) and all(map(operator.is_, leaves, batch.leaves))


def signature(batch: Batch) -> Hashable:
    """Key of the properties of a call that decide its recording.

    They are those of the arguments, without values and number of samples, and torch's modes.
    """
    parts: list[Any] = [batch.structure, batch.mapped, min(batch.size, 1)]
    dims = dict(batch.mapped)
    firsts: dict[int, int] = {}
    around = functorch.peek_interpreter_stack() is not None
    for i, leaf in enumerate(batch.leaves):
        if isinstance(leaf, torch.Tensor):
            d = dims.get(i)
            shape = tuple(leaf.shape)
            stride = leaf.stride() if leaf.layout is torch.strided else (str(leaf.layout),)
            if d is not None:
                shape, stride = shape[:d] + shape[d + 1 :], stride[:d] + stride[d + 1 :]
            grad = leaf.requires_grad, leaf.is_leaf
            twin = firsts.setdefault(id(leaf), i)  # one tensor passed twice is recorded as one
            form = type(leaf), shape, stride, leaf.dtype, leaf.device
            keys = leaf.is_inference(), leaf.is_conj(), leaf.is_neg()
            parts.append((*form, *grad, *keys, twin, wrappers_of(leaf) if around else ()))
        elif isinstance(leaf, VALUES):
            parts.append((type(leaf), repr(leaf)))
    return (*_hashable(parts), modes())


def _hashable(parts: list[Any]) -> tuple[Any, ...]:
    return (repr(parts[0]), *parts[1:])


def modes() -> tuple[Any, ...]:
    """The settings of torch that a recording depends on."""
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        forward_level(forward_ad) >= 0,
        enabled("cpu"), dtype("cpu"), enabled("cuda"), dtype("cuda"),
        torch.get_default_dtype(),
        # a device other than the host's is set by a mode; asking torch for it takes microseconds
        torch.get_default_device() if function_depth() else _HOST,
        torch.are_deterministic_algorithms_enabled(),
        tuple(map(tuple, global_hooks)) if any(global_hooks) else (),
        transforms_around(),
        *[enabled() for enabled in attention_kernels],
    )  # fmt: skip


def transforms_around() -> tuple[Hashable, ...]:
    """The transforms around a call."""
    if functorch.peek_interpreter_stack() is None:
        return ()
    return tuple([(i.key(), i.level()) for i in functorch.get_interpreter_stack() or []])


def setting_left(watch: PythonWatch, before: tuple[object, ...]) -> str:
    """Why a call must be recorded each time if it has left a setting of torch changed, or empty.

    Args:
        watch: What watched the function.
        before: The `modes` before it ran.
    """
    left = watch.left_set() or ("its modes" if modes() != before else "")
    return left and f"it changes a setting of torch and does not set it back: {left}"


_LISTED = (np.ndarray, types.MappingProxyType)
"""Types of objects that are compared by the listing, or whose state is not compared, which
docs/semantics.md says."""
_HOST = torch.device("cpu")
