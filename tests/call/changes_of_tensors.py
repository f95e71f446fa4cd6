"""Ways of changing what tensors say of themselves, and of what is found by calls alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.call.changes import Way, way
from tests.call.changes_unspelled import changing

CONJUGATE = torch.complex(torch.ones(3), torch.ones(3))


def replacing(read: Callable[[Tensor], object], before: Tensor, after: Tensor) -> Way:
    """A captured tensor is replaced by another one that has the same form."""
    held = SimpleNamespace(w=before)
    yield from changing(lambda h: 2.0 if read(h.w) else 3.0, held, lambda h: setattr(h, "w", after))


@way
def to_be_a_lazy_conjugate() -> Way:
    yield from replacing(lambda w: w.is_conj(), CONJUGATE, CONJUGATE.conj())


@way
def to_be_a_lazy_conjugate_for_torch() -> Way:
    yield from replacing(torch.is_conj, CONJUGATE, CONJUGATE.conj())


@way
def to_be_a_lazy_negative() -> Way:
    yield from replacing(lambda w: w.is_neg(), CONJUGATE.imag, CONJUGATE.conj().imag)


@way
def to_be_made_under_inference_mode() -> Way:
    with torch.inference_mode():
        made = torch.ones(3)
    yield from replacing(lambda w: w.is_inference(), torch.ones(3), made)


@way
def to_be_a_view() -> Way:
    yield from replacing(lambda w: w._is_view(), torch.ones(3), torch.ones(4)[1:])


@way
def to_have_a_base() -> Way:
    yield from replacing(lambda w: w._base is None, torch.ones(3), torch.ones(4)[1:])


@way
def to_retain_its_gradient() -> Way:
    result = torch.ones(3, requires_grad=True) * 1
    yield from changing(lambda w: 2.0 if w.retains_grad else 3.0, result, lambda w: w.retain_grad())


@way
def values_written_as_text() -> Way:
    yield from changing(lambda w: len(str(w)), torch.tensor([1.0, 2.0]), lambda w: w.mul_(100))


@way
def values_in_a_text() -> Way:
    yield from changing(lambda w: len(f"{w}"), torch.tensor([1.0, 2.0]), lambda w: w.mul_(100))


@way
def the_level_of_a_logger() -> Way:
    logger = logging.getLogger("shardmap.tests")
    logger.setLevel(10)
    yield from changing(
        lambda _: logging.getLogger("shardmap.tests").level,
        None,
        lambda _: logger.setLevel(30),
    )
