"""Values of the batched program, and the builder with which rules emit calls.

The batched program has two parts. `fixed` holds the calls that do not depend on the sample: they
run once per device. `chunk` holds the rest and runs once per chunk. A call whose arguments are all
unmapped goes to `fixed` by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from shardmap._torch import OpOverload, kernel_of, schema_of
from shardmap.program.ir import Equation
from shardmap.program.schema import by_name
from shardmap.rules.targets import fastest


class V(NamedTuple):
    """A value of the batched program: `[B, *shape]` if mapped, `shape` if not."""

    index: int
    mapped: bool
    shape: tuple[int, ...]
    """The sample's shape, without the mapped dimension."""
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions of one sample."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements of one sample."""
        return math.prod(self.shape)


Given = Sequence[Any]
"""The positional arguments of a recorded call, with a `V` for each tensor."""
Named = dict[str, Any]
"""Its keyword arguments, or all of its arguments by their names."""


class BatchSize(NamedTuple):
    """Placeholder for the number of samples in a chunk, allowed for any integer argument."""

    tag: str = "B"


class ChunkStart(NamedTuple):
    """Placeholder for the index of the chunk's first sample."""

    tag: str = "start"


class Seed(NamedTuple):
    """Placeholder for a seed of the call."""

    number: int = 0
    """0 for the seed drawn from torch's generator, n + 1 for that from the user's generator n."""


B = BatchSize()
START = ChunkStart()
SEED = Seed()


class Call(NamedTuple):
    """One call of the batched program."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outs: tuple[int | None, ...]
    """Indices of the values it defines; several when the target returns a tuple."""
    several: bool
    """True if the target returns a tuple."""
    grad: bool
    """True if autograd records it when outer autograd is recording."""
    equation: int
    """The recorded call that it serves."""
    mapped: bool
    writes: bool
    """True if it writes to an argument: never dropped."""
    op: OpOverload | None = None
    """The operator of which `target` is the fastest form; None for a function of ours."""


def values(args: Iterable[Any]) -> Iterable[V]:
    """Every `V` in nested arguments."""
    for arg in args:
        kind = type(arg)
        if kind is V:
            yield arg
        elif kind is tuple or kind is list:
            yield from values(arg)


class Lowering:
    """Builds a batched program, one recorded call at a time."""

    def __init__(self, device_type: str, randomness: str):
        self.device_type = device_type
        """Kind of device the program is lowered for, such as "cuda"."""
        self.randomness = randomness
        self.transformed = False
        """True if `torch.func` transforms are active around the call."""
        self.sample_device = device_type
        """Device of the recorded samples, for which `SAMPLE_DEVICE` is the placeholder."""
        self.calls: list[Call] = []
        self.count = 0
        self.equation = -1
        self.drawn = 0
        """Number of recorded calls that have drawn so far, which numbers the next."""
        self.grad = False
        self.notes: dict[str, Any] = {}
        """Data that rules keep about the values of this lowering, by the name of their owner."""

    def value(self, mapped: bool, shape: Sequence[int], dtype: torch.dtype) -> V:
        """Make a new value that no call defines yet."""
        self.count += 1
        return V(self.count - 1, mapped, tuple(shape), dtype)

    def call(
        self,
        target: Any,
        *args: Any,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        mapped: bool | None = None,
        named: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> V:
        """Emit a call with one result.

        Args:
            target: An operator overload or a function on real tensors; its results must not depend
                on how samples are grouped.
            *args: Its arguments: `V` for tensors, `B` for the batch size, anything else as is.
            shape: The result's sample shape, if the rule computes with it.
            dtype: The result's dtype, by default that of the first tensor.
            mapped: True if the result has the mapped dimension; by default, if an argument has it.
            named: Keyword arguments of the target, whatever their names: `dtype` and `shape` here
                are about the result.
            **kwargs: Its other keyword arguments.
        """
        if named:
            kwargs = {**kwargs, **named}
        tensors = list(values((args, tuple(kwargs.values()))))
        if mapped is None:
            mapped = any(v.mapped for v in tensors)
        first = tensors[0] if tensors else None
        if shape is None:
            shape = first.shape if first is not None else ()
        if dtype is None:
            dtype = first.dtype if first is not None else torch.float32
        out = self.value(mapped, shape, dtype)
        self._emit(target, args, kwargs, (out.index,), False, mapped)
        return out

    def calls_several(
        self, target: Any, count: int, *args: Any, mapped: bool | None = None, **kwargs: Any
    ) -> tuple[V, ...]:
        """Emit a call that returns a tuple of `count` tensors."""
        tensors = list(values((args, tuple(kwargs.values()))))
        if mapped is None:
            mapped = any(v.mapped for v in tensors)
        outs = tuple(
            self.value(mapped, (), tensors[0].dtype if tensors else torch.float32)
            for _ in range(count)
        )
        self._emit(target, args, kwargs, tuple(v.index for v in outs), True, mapped)
        return outs

    def as_recorded(
        self,
        eq: Equation,
        target: Callable[..., Any],
        *args: Any,
        named: dict[str, Any] | None = None,
        mapped: bool | None = None,
    ) -> V | tuple[V, ...] | None:
        """Emit a call that returns what the recorded operator returns.

        Args:
            eq: The recorded call.
            target: Its operator, or a function in its place.
            *args: The arguments of `target`.
            named: Its keyword arguments.
            mapped: As in `call`.

        Returns:
            A value for each tensor that the recorded call returned; itself, if the operator
            returns one tensor; None, if there are none.
        """
        count = len(list(eq.results()))
        if not count:
            self.effect(target, *args, **(named or {}))
            return None
        if [str(r.type) for r in schema_of(eq.op).returns] == ["Tensor"]:
            return self.call(target, *args, named=named, mapped=mapped)
        if any(type(out) is tuple for out in eq.outs):
            target = _flat_results(target, eq.outs)
            return self.calls_several(target, count, *args, mapped=mapped, **(named or {}))
        found = self.calls_several(target, len(eq.outs), *args, mapped=mapped, **(named or {}))
        return tuple([v for v, out in zip(found, eq.outs, strict=True) if out is not None])

    def effect(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """Emit a call that returns nothing: never dropped."""
        mapped = any(v.mapped for v in values((args, tuple(kwargs.values()))))
        self._emit(target, args, kwargs, (), False, mapped)

    def _emit(
        self,
        target: Any,
        args: tuple,
        kwargs: dict[str, Any],
        outs: tuple[int | None, ...],
        several: bool,
        mapped: bool,
    ) -> None:
        op = None
        if isinstance(target, OpOverload):
            op, writes = target, schema_of(target).is_mutable
            target = fastest(target) if args and type(args[0]) is V else kernel_of(target)
        else:
            name = getattr(target, "__name__", "")
            writes = name.endswith("_") and not name.endswith("__")
        self.calls.append(
            Call(
                target,
                args,
                tuple(kwargs.items()),
                outs,
                several,
                self.grad,
                self.equation,
                mapped,
                writes,
                op,
            )
        )

    # -- helpers of many rules

    def batch(self, v: V) -> V:
        """`v` with the mapped dimension.

        It is `v` itself, or `v` expanded (a view that must not be written to).
        """
        if v.mapped:
            return v
        return self.call(
            torch.Tensor.expand, v, [B, *v.shape], shape=v.shape, dtype=v.dtype, mapped=True
        )

    def align(self, v: V, ndim: int) -> V:
        """A mapped value viewed with `ndim` sample dimensions, for broadcasting.

        Dimensions of size 1 are put between batch and sample.
        """
        if not v.mapped or v.ndim >= ndim:
            return v
        shape = (1,) * (ndim - v.ndim) + v.shape
        return self.view(v, shape)

    def view(self, v: V, shape: Sequence[int]) -> V:
        """`v` viewed with another sample shape."""
        shape = tuple(shape)
        if shape == v.shape:
            return v
        return self.call(
            torch.Tensor.view, v, [B, *shape] if v.mapped else list(shape), shape=shape
        )

    def reshape(self, v: V, shape: Sequence[int]) -> V:
        """`v` with another sample shape, copied if a view is not possible."""
        shape = tuple(shape)
        if shape == v.shape:
            return v
        return self.call(
            torch.Tensor.reshape, v, [B, *shape] if v.mapped else list(shape), shape=shape
        )

    def transpose(self, v: V, first: int, second: int) -> V:
        """`v` with two sample dimensions exchanged; negative ones count from the end."""
        first, second = first % v.ndim, second % v.ndim
        shape = list(v.shape)
        shape[first], shape[second] = shape[second], shape[first]
        shift = int(v.mapped)
        return self.call(torch.Tensor.transpose, v, first + shift, second + shift, shape=shape)

    def cast(self, v: V, dtype: torch.dtype) -> V:
        """`v` in another dtype."""
        if v.dtype == dtype:
            return v
        return self.call(torch.Tensor.to, v, dtype, shape=v.shape, dtype=dtype)


def _flat_results(target: Callable[..., Any], outs: tuple[Any, ...]) -> Callable[..., Any]:
    """`target` with the recorded tensors of nested results in one tuple."""

    def picked(outs: tuple[Any, ...], results: Sequence[Any]) -> Iterator[torch.Tensor]:
        for out, result in zip(outs, results, strict=True):
            if type(out) is tuple:
                yield from picked(out, result)
            elif out is not None:
                yield result

    def flat(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(picked(outs, target(*args, **kwargs)))

    flat.__name__ = getattr(target, "__name__", "flat")
    return flat


def arguments(eq: Equation, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a recorded call by their names in the schema, with defaults."""
    return by_name(eq.op, args, kwargs)


def dim(d: int, ndim: int) -> int:
    """Convert a sample's dimension to that of the batched tensor.

    It is never negative, and follows the mapped one.
    """
    return (d + ndim if d < 0 else d) + 1


def dims(ds: Sequence[int], ndim: int) -> list[int]:
    """Convert several dimensions as `dim` does."""
    return [dim(d, ndim) for d in ds]


def given_results(eq: Equation) -> list[bool]:
    """For each result that the operator declares: True if the recorded call returned it.

    Backward operators take a mask of the wanted gradients, but some kernels return more
    than that: the bias's alone comes with the weight's.
    """
    return [out is not None for out in eq.outs]


def spec_of(eq: Equation, number: int = 0) -> Any:
    """The recorded metadata of a call's result."""
    out = eq.outs[number]
    return out.spec
