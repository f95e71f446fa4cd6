"""Named refusals: calls that must raise a certain error and leave everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardmap import errors
from tests.cases import Case, Kit, Run

REFUSALS: dict[str, tuple[Case, type[BaseException]]] = {}


def refused(expected: type[BaseException]) -> Callable[[Case], Case]:
    """Registers a refusal with the error it must be."""

    def register(function: Case) -> Case:
        assert function.__name__ not in REFUSALS
        REFUSALS[function.__name__] = function, expected
        return function

    return register


@refused(errors.CapturedWriteError)
def write_to_captured(k: Kit) -> Run:
    x, w = k.x(3), k.w(3, grad=False)
    return lambda vmap: vmap(lambda a: w.add_(a))(x)


@refused(errors.CapturedWriteError)
def write_to_a_view_of_captured(k: Kit) -> Run:
    x, w = k.x(3), k.w(3, 3, grad=False)

    def function(a: torch.Tensor) -> torch.Tensor:
        w[0] = 1.0
        return a + w[0]

    return lambda vmap: vmap(function)(x)


@refused(errors.CapturedWriteError)
def write_to_an_unmapped_argument(k: Kit) -> Run:
    x, w = k.x(3), k.w(3, grad=False)
    return lambda vmap: vmap(lambda a, b: b.mul_(2) + a, (0, None))(x, w)


@refused(errors.CapturedWriteError)
def batch_norm_in_training(k: Kit) -> Run:
    model, x = k.module(nn.BatchNorm1d(4)), k.x(2, 4)
    return lambda vmap: vmap(model)(x)


@refused(errors.CapturedWriteError)
def backward_inside(k: Kit) -> Run:
    x, w = k.x(3), k.w(3)

    def function(a: torch.Tensor) -> torch.Tensor:
        (a * w).sum().backward()
        return a

    return lambda vmap: vmap(function)(x)


def _escape(
    name: str,
    function: Callable[[torch.Tensor], Any],
    expected: type[BaseException] = errors.EscapeError,
) -> None:
    def build(k: Kit) -> Run:
        x = k.x(3)
        return lambda vmap: vmap(function)(x)

    build.__name__ = name
    refused(expected)(build)


def _data_pointer(a: torch.Tensor) -> torch.Tensor:
    return a + float(a.data_ptr() % 2)


def _set_data(a: torch.Tensor) -> torch.Tensor:
    b = torch.zeros(3, dtype=a.dtype)
    part = b[:2]
    b.data = a  # while a view of b is in use
    return b * 2 + part.sum()


_escape("to_numpy", lambda a: torch.from_numpy(a.numpy() * 2))
_escape("tensor_of_mapped", lambda a: torch.tensor([a[0], a[1]]))
_escape("as_tensor_of_mapped", lambda a: torch.as_tensor([a[0], a[1]]))
_escape("set_data", _set_data)
_escape("data_pointer", _data_pointer)
_escape(
    "storage",
    lambda a: torch.empty(0, dtype=a.dtype).set_(a.untyped_storage(), 0, a.shape, a.stride()) * 2,
)
_escape("apply_in_python", lambda a: a.clone().apply_(lambda v: v + 1))
_escape("nonzero", lambda a: (a > a.mean()).nonzero(), errors.ShardmapError)
_escape("boolean_selection", lambda a: a[a > 0], errors.ShardmapError)
_escape("random_numbers", lambda a: a + torch.rand(3, dtype=a.dtype), errors.RandomnessError)
_escape("dropout", lambda a: F.dropout(a, 0.5), errors.RandomnessError)
_escape("text_returned", lambda a: "three", errors.OutputError)
_escape("none_returned", lambda a: None, errors.OutputError)
_escape("text_among_outputs", lambda a: (a, "name"), errors.OutputError)
_escape("uninitialised_memory", lambda a: torch.empty(3, dtype=a.dtype) + a)


class Unread(torch.autograd.Function):
    """A function with a backward of its own, whose argument no operator takes."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return torch.ones(a.shape, dtype=a.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 5


@refused(errors.AutogradFunctionError)
def own_backward_of_an_unread_argument(k: Kit) -> Run:
    x = k.x(3, grad=True)
    return lambda vmap: vmap(lambda a: Unread.apply(a))(x)


@refused(errors.AutogradFunctionError)
def hook_on_a_shared_tensor(k: Kit) -> Run:
    x, w = k.x(3, grad=True), k.w(3)

    def function(a: torch.Tensor) -> torch.Tensor:
        w.register_hook(lambda g: g * 5)
        return (a * w).sin()

    return lambda vmap: vmap(function)(x)


@refused(errors.CapturedWriteError)
def write_to_overlapping_samples(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: a.add_(1).clone())(x.as_strided((3, 3), (1, 1)))


@refused(errors.CapturedWriteError)
def write_to_an_expanded_batch(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: a.add_(1).clone())(x[:1].expand(3, 3))


@refused(errors.CapturedWriteError)
def write_to_a_lazy_conjugate(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: a.mul_(2).real)(torch.complex(x, x).conj())


@refused(errors.EscapeError)
def result_in_memory_that_grows(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: torch.sin(a, out=torch.empty(0, dtype=a.dtype)))(x)


@refused(errors.UnsupportedOperatorError)
def sparse_batch(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: a * 2)(x.to_sparse())


@refused(errors.UnsupportedOperatorError)
def nested_batch(k: Kit) -> Run:
    x = k.x(3)
    nested = torch.nested.as_nested_tensor(list(x))
    return lambda vmap: vmap(lambda d: d["x"] * 2)({"x": nested})


@refused(errors.InDimsError)
def sizes_disagree(k: Kit) -> Run:
    x, y = k.x(3), k.w(5, 3)
    return lambda vmap: vmap(lambda a, b: a + b)(x, y)


@refused(errors.InDimsError)
def nothing_mapped(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: a, None)(x)


@refused(errors.InDimsError)
def in_dim_out_of_range(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: a, 2)(x)


@refused(errors.InDimsError)
def in_dims_of_another_structure(k: Kit) -> Run:
    x, y = k.x(3), k.x(3)
    return lambda vmap: vmap(lambda a, b: a, (0,))(x, y)


@refused(errors.InDimsError)
def scalar_mapped(k: Kit) -> Run:
    x = k.w(grad=False)
    return lambda vmap: vmap(lambda a: a)(x)


@refused(errors.OutDimsError)
def out_dim_out_of_range(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: a, 0, 3)(x)


@refused(errors.OutDimsError)
def out_dims_of_another_structure(k: Kit) -> Run:
    x = k.x(3)
    return lambda vmap: vmap(lambda a: (a, a), 0, (0, 0, 0))(x)


def _option(name: str, expected: type[BaseException], **options: Any) -> None:
    def build(k: Kit) -> Run:
        x = k.x(3)
        return lambda vmap: vmap(lambda a: a * 2, **options)(x)

    build.__name__ = name
    refused(expected)(build)


_option("chunk_size_zero", errors.OptionError, chunk_size=0)
_option("chunk_size_negative", errors.OptionError, chunk_size=-2)
_option("chunk_size_text", errors.OptionError, chunk_size="many")
_option("unknown_randomness", errors.OptionError, randomness="sometimes")
_option("unknown_trace", errors.OptionError, trace="never")
_option("unknown_device", errors.DeviceError, devices="abacus")
_option("no_devices", errors.DeviceError, devices=[])


class OwnError(Exception):
    """A placeholder for any exception of the user's."""


@refused(OwnError)
def own_exception(k: Kit) -> Run:
    x = k.x(3)

    def function(a: torch.Tensor) -> torch.Tensor:
        raise OwnError("mine")

    return lambda vmap: vmap(function)(x)


@refused(RuntimeError)
def shapes_that_do_not_fit(k: Kit) -> Run:
    x, y = k.x(3), k.x(4)
    return lambda vmap: vmap(lambda a, b: a + b)(x, y)
