"""Ways of changing what C alone reads: keys that are tensors, memory, texts, contexts."""

from __future__ import annotations

import decimal
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.call.changes import Way, way
from tests.call.changes_of_tensors import replacing
from tests.call.changes_unspelled import changing


def keyed(read: Callable[[Any, nn.Parameter, nn.Parameter], Callable[[Tensor], Any]]) -> Way:
    """A weight that is looked up among keys is replaced by another one."""
    layer = nn.Linear(3, 3)
    second = nn.Parameter(torch.randn(3, 3))
    found = read(layer, layer.weight, second)

    def f(x: Tensor) -> Tensor:
        return (layer.weight @ x) * found(layer.weight)

    yield f
    layer.weight = second
    yield f


@way
def a_weight_that_is_a_key() -> Way:
    yield from keyed(lambda _, a, b: {a: 2.0, b: 5.0}.__getitem__)


@way
def a_weight_that_is_a_key_of_a_dict_closed_over() -> Way:
    def scales(_: nn.Linear, a: nn.Parameter, b: nn.Parameter) -> Callable[[Tensor], float]:
        scale = {a: 2.0, b: 5.0}
        return lambda w: scale[w]

    yield from keyed(scales)


@way
def a_weight_that_becomes_a_key() -> Way:
    def scales(_: nn.Linear, a: nn.Parameter, b: nn.Parameter) -> Callable[[Tensor], float]:
        scale = {b: 5.0}
        return lambda w: scale.get(w, 1.0)

    yield from keyed(scales)


@way
def a_weight_in_a_set() -> Way:
    def scales(_: nn.Linear, a: nn.Parameter, b: nn.Parameter) -> Callable[[Tensor], float]:
        frozen = {a}
        return lambda w: 2.0 if w in frozen else 5.0

    yield from keyed(scales)


@way
def a_weight_in_a_frozen_set() -> Way:
    def scales(_: nn.Linear, a: nn.Parameter, b: nn.Parameter) -> Callable[[Tensor], float]:
        frozen = frozenset([a])
        return lambda w: 2.0 if w in frozen else 5.0

    yield from keyed(scales)


@way
def a_weight_in_a_key_of_several_parts() -> Way:
    def scales(_: nn.Linear, a: nn.Parameter, b: nn.Parameter) -> Callable[[Tensor], float]:
        scale = {(a, "lr"): 2.0, (b, "lr"): 5.0}
        return lambda w: scale[w, "lr"]

    yield from keyed(scales)


@way
def the_state_of_an_optimizer_by_weight() -> Way:
    def scales(_: nn.Linear, a: nn.Parameter, b: nn.Parameter) -> Callable[[Tensor], float]:
        optimizer = torch.optim.SGD([a, b])
        optimizer.state[a]["step"], optimizer.state[b]["step"] = 1, 7
        return lambda w: optimizer.state[w]["step"]

    yield from keyed(scales)


@way
def to_begin_elsewhere_in_its_memory() -> Way:
    whole = torch.ones(5)
    yield from replacing(lambda w: w.storage_offset() == 1, whole[:3], whole[1:4])


@way
def to_be_a_part_of_a_larger_memory() -> Way:
    yield from replacing(
        lambda w: w.untyped_storage().nbytes() == 12, torch.ones(3), torch.ones(9)[:3]
    )


@way
def to_be_another_result_of_its_operator() -> Way:
    first, second = torch.ones(6, requires_grad=True).split(3)
    yield from replacing(lambda w: w.output_nr == 0, first, second)


def renamed(held: Any) -> None:
    held.z = 12345


@way
def a_text_of_a_namespace() -> Way:
    yield from changing(lambda n: len(repr(n)), SimpleNamespace(z=1), renamed)


@way
def a_formatted_namespace() -> Way:
    yield from changing(lambda n: len(f"{n}"), SimpleNamespace(z=1), renamed)


@way
def a_text_of_a_namespace_in_a_dict() -> Way:
    inner = SimpleNamespace(z=1)
    held = {"a": [inner]}
    yield from changing(lambda h: len(str(h)), held, lambda _: renamed(inner))


@way
def texts_of_namespaces_mapped() -> Way:
    inner = SimpleNamespace(z=1)
    yield from changing(lambda h: len("".join(map(str, h))), [inner], lambda _: renamed(inner))


@way
def a_namespace_compared() -> Way:
    other = SimpleNamespace(z=1)
    yield from changing(lambda n: 2.0 if n == other else 3.0, SimpleNamespace(z=1), renamed)


@way
def the_context_of_decimals_by_a_module_closed_over() -> Way:
    def quotient(module: types.ModuleType) -> float:
        return float(module.Decimal(1) / module.Decimal(3))

    def rougher(module: types.ModuleType) -> None:
        module.getcontext().prec = 3

    with decimal.localcontext():
        yield from changing(quotient, decimal, rougher)


@way
def a_context_of_decimals() -> Way:
    context = decimal.Context(prec=28)
    one, three = decimal.Decimal(1), decimal.Decimal(3)
    yield from changing(
        lambda c: float(c.divide(one, three)), context, lambda c: setattr(c, "prec", 3)
    )
