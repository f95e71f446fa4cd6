"""Joint reductions: they take all of a sample's outputs together.

They are norms of its gradient, clipped sums, Gram matrices and projections.

They are written as functions of one sample, recorded with the mapped function, so that the rules
(and `shardmap.factors`) see all of it; over the batch there is only a sum, a mean, or nothing.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardmap import errors
from shardmap._torch import pytree
from shardmap.factors import project as projections
from shardmap.reduce.reduction import Reduction


@dataclass(frozen=True)
class Joint(abc.ABC):
    """Base of joint reductions: combine all outputs of a sample, then those of all samples."""

    name: ClassVar[str]
    """Name in `shardmap.reduce`."""

    @property
    def then(self) -> Any:
        """The reduction of the results of `of_sample` over the samples.

        It has the form of `reduce=`, a prefix of the structure that `of_sample` returns.
        """
        return None

    @abc.abstractmethod
    def of_sample(self, tree: Any) -> Any:
        """Combine one sample's outputs."""

    def finish(self, result: Any) -> Any:
        """Finish the combination of all samples."""
        return result


@dataclass(frozen=True)
class Norm(Joint):
    """See `shardmap.reduce.norm`."""

    name = "norm"

    def of_sample(self, tree: Any) -> Tensor:
        """The norm of all outputs together."""
        return norm_of(tensors_of(tree, self.name))


@dataclass(frozen=True)
class ClippedSum(Joint):
    """See `shardmap.reduce.clipped_sum`."""

    max_norm: float
    noise_multiplier: float

    name = "clipped_sum"

    @property
    def then(self) -> Any:
        """The sum over the samples."""
        return "sum"

    def of_sample(self, tree: Any) -> Any:
        """The outputs, scaled so that their norm is at most `max_norm`."""
        total = norm_of(tensors_of(tree, self.name))
        factor = (self.max_norm / total).clamp(max=1)
        return pytree.tree_map(lambda t: t * factor.to(t.dtype), tree)

    def finish(self, result: Any) -> Any:
        """Add noise, drawn from torch's generator.

        Each entry gets one draw, whatever the number of samples.
        """
        if not self.noise_multiplier:
            return result
        scale = self.noise_multiplier * self.max_norm
        return pytree.tree_map(
            lambda t: t + scale * torch.randn(t.shape, dtype=t.dtype).to(t.device), result
        )


@dataclass(frozen=True)
class SecondMoment(Joint):
    """See `shardmap.reduce.second_moment`."""

    name = "second_moment"

    @property
    def then(self) -> Any:
        """The mean over the samples."""
        return "mean"

    def of_sample(self, tree: Any) -> Any:
        """The squares of the outputs' entries."""
        tensors_of(tree, self.name)
        return pytree.tree_map(lambda t: (t.abs() if t.is_complex() else t).square(), tree)


@dataclass(frozen=True)
class Gram(Joint):
    """See `shardmap.reduce.gram`."""

    name = "gram"

    @property
    def then(self) -> Any:
        """A mark on each leaf: the call then computes inner products, if possible from factors."""
        return Reduction("gram")

    def of_sample(self, tree: Any) -> Any:
        """The outputs, as a list."""
        return [t.reshape(-1) if t.dim() == 0 else t for t in tensors_of(tree, self.name)]

    def finish(self, result: Any) -> Any:
        """The matrix, which is in the place of the first output."""
        return result[0]


@dataclass(frozen=True)
class Project(Joint):
    """See `shardmap.reduce.project`."""

    dim: int
    kind: str
    seed: int

    name = "project"

    def of_sample(self, tree: Any) -> Tensor:
        """Multiply a random matrix by all outputs, concatenated: `[dim]`.

        Rows of the matrix are drawn as they are needed.
        """
        total, offset = None, 0
        if any(t.is_complex() for t in pytree.tree_leaves(tree)):
            raise errors.OptionError(
                "reduce='project' of complex outputs: project torch.view_as_real of them"
            )
        for t in tensors_of(tree, self.name):
            part = projections.project(t, self.dim, self.kind, self.seed, offset)
            offset += t.numel()
            total = part if total is None else total + part
        assert total is not None
        return total


@dataclass(frozen=True)
class Together(Joint):
    """See `shardmap.reduce.together`."""

    parts: tuple[tuple[str, Any], ...]

    name = "together"

    @property
    def then(self) -> Any:
        """A dict of the parts' reductions over the samples."""
        return {name: plain(part) for name, part in self.parts}

    def of_sample(self, tree: Any) -> dict[str, Any]:
        """A dict of the parts' results."""
        return {
            name: part.of_sample(tree) if isinstance(part, Joint) else tree
            for name, part in self.parts
        }

    def finish(self, result: Any) -> Any:
        """Finish each part by itself."""
        return {
            name: part.finish(result[name]) if isinstance(part, Joint) else result[name]
            for name, part in self.parts
        }


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of several tensors, as one vector."""
    squares = [(t.abs() if t.is_complex() else t).square().sum() for t in tensors]
    total = squares[0]
    for s in squares[1:]:
        total = total + s
    return total.sqrt()


def tensors_of(tree: Any, name: str) -> list[Tensor]:
    """The outputs of one sample as a list of floating-point tensors.

    Raises:
        OptionError: There are none, or one holds integers.
    """
    leaves = pytree.tree_leaves(tree)
    if not leaves:
        raise errors.OptionError(
            f"reduce={name!r} of a function that returns no tensors; return the ones to reduce"
        )
    for t in leaves:
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            found = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise errors.OptionError(
                f"reduce={name!r} of outputs of which one is {found}: it takes all outputs "
                "together, as floating-point tensors; give a "
                "reduction for each output, as a structure, or return the others apart"
            )
    return leaves


def parse(value: Any) -> Any:
    """The joint reduction that a text names; any other value unchanged."""
    named: Mapping[str, Callable[[], Joint]] = {
        "norm": Norm,
        "second_moment": SecondMoment,
        "gram": Gram,
    }
    return named[value]() if isinstance(value, str) and value in named else value


def plain(reduce: Any) -> Any:
    """`reduce` with each joint reduction replaced by its reduction over the samples."""
    return _walk(reduce, lambda part: part.then)


def _walk(reduce: Any, of_joint: Callable[[Joint], Any]) -> Any:
    found = parse(reduce)
    if isinstance(found, Joint):
        return of_joint(found)
    if isinstance(reduce, dict):
        return {key: _walk(value, of_joint) for key, value in reduce.items()}
    if isinstance(reduce, tuple | list) and not any(callable(part) for part in reduce):
        return type(reduce)([_walk(value, of_joint) for value in reduce])
    return reduce


def contains(reduce: Any) -> bool:
    """True if `reduce` holds a joint reduction."""
    found: list[Joint] = []
    _walk(reduce, found.append)
    return bool(found)


def _zipped(reduce: Any, tree: Any, of_joint: Callable[[Joint, Any], Any], call: str) -> Any:
    """Replace each part of `tree` that has a joint reduction by `of_joint(reduction, part)`."""
    found = parse(reduce)
    if isinstance(found, Joint):
        return of_joint(found, tree)
    if not contains(reduce):
        return tree
    if isinstance(reduce, dict) and isinstance(tree, dict) and set(reduce) == set(tree):
        return {key: _zipped(reduce[key], tree[key], of_joint, call) for key in tree}
    if (
        isinstance(reduce, tuple | list)
        and isinstance(tree, tuple | list)
        and len(reduce) == len(tree)
    ):
        return type(tree)(
            [_zipped(r, part, of_joint, call) for r, part in zip(reduce, tree, strict=True)]
        )
    raise errors.OptionError(
        f"{call}: reduce={reduce!r} does not fit what the function returns, "
        f"{pytree.tree_structure(tree)}; give one reduction for all "
        "of it, or the same structure"
    )


def composed(func: Callable[..., Any], reduce: Any, call: str) -> Callable[..., Any]:
    """Compose `func` with the joint reductions of each sample's outputs."""

    @functools.wraps(func, updated=())
    def reduced(*args: Any, **kwargs: Any) -> Any:
        try:
            return _zipped(
                reduce, func(*args, **kwargs), lambda joint, tree: joint.of_sample(tree), call
            )
        except errors.OptionError as error:
            text = str(error)
            raise (
                error if text.startswith(call) else errors.OptionError(f"{call}: {text}")
            ) from None

    return reduced


def finished(reduce: Any, result: Any, call: str) -> Any:
    """The result of the map, each joint reduction finished."""
    return _zipped(reduce, result, lambda joint, part: joint.finish(part), call)


def number(value: Any, name: str, call: str, least: float = 0.0, zero: bool = True) -> float:
    """Check a number that a reduction is made with.

    Raises:
        OptionError: It is no number, or out of range.
    """
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < least or (not zero and value == least):
        raise errors.OptionError(
            f"{call}: {name}={value!r}; pass a number {'of at least' if zero else 'above'} "
            f"{least:g}"
        )
    return float(value)
