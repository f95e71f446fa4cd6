"""Results in containers, by structure and dtype."""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()
vector = weight(4, seed=9)


class Moments(NamedTuple):
    mean: Tensor
    spread: Tensor


@dataclasses.dataclass
class Pose:
    place: Tensor
    turn: Tensor


pytree.register_dataclass(Pose)


@case()
def a_tuple(r):
    return r.sin(), r.sum()


@case()
def a_list(r):
    return [r * 2, r[:2], r[0]]


@case()
def a_dictionary(r):
    return {"z": r, "a": r.sum()}


@case()
def a_nested_dictionary(r):
    return {"out": {"x": r.exp(), "y": (r[0], [r[1]])}, "n": r.norm()}


@case()
def a_named_tuple(r):
    return Moments(r.mean(), r.std())


@case()
def a_data_class(r):
    return Pose(r[:2], r[2].tanh())


@case()
def an_ordered_dictionary(r):
    return collections.OrderedDict(b=r, a=r * 2)


@case()
def a_default_dictionary(r):
    out = collections.defaultdict(list)
    for i, v in enumerate(r.unbind()):
        out["even" if i % 2 == 0 else "odd"].append(v * v)
    return out


@case()
def a_torch_return_type(r):
    return r.max(0)


@case()
def a_sort_result(r):
    return torch.sort(r, descending=True)


@case()
def structures_from_two_ways(r):
    if r[0] > 0:
        return {"value": r.sin(), "extra": (r[0],)}
    return {"value": r.cos(), "extra": (r[1],)}


@case()
def an_empty_part(r):
    return r, (), {"nothing": []}


@case()
def an_empty_tensor(r):
    return r[:0], r


@case()
def one_tensor_twice(r):
    y = r.sin()
    return y, y


@case()
def views_of_one_tensor(r):
    y = r.exp()
    return y[:2], y[1:], y.view(2, 2)


@case()
def the_argument_itself(r):
    return r, r.view(2, 2)


@case(weights=[vector])
def a_captured_tensor_returned(r):
    return r * 2, vector


@case()
def a_constant(r):
    return torch.arange(3), torch.zeros(()), r


@case()
def of_many_dtypes(r):
    return r.double(), r.half(), r > 0, r.long(), r.bfloat16(), r.to(torch.complex64)


@case()
def small_integers(r):
    return (r * 10).to(torch.int8), (r.abs() * 10).to(torch.uint8), r.to(torch.int16), r.int()


@case()
def a_deque_of_history(r):
    history = collections.deque(maxlen=2)
    for k in range(4):
        history.append(r * k)
    return tuple(history)


@case()
def mapped_over_a_tree(r):
    tree = {"a": r, "b": [r * 2, r.sum()]}
    return pytree.tree_map(torch.tanh, tree)


@case()
def a_dict_comprehension(r):
    return {f"x{i}": v.sin() for i, v in enumerate(r)}


@case()
def non_contiguous(r):
    return torch.outer(r, r.sin()).t(), r.expand(3, 4), r[::2]


@case()
def none_among_results(r):
    return r.sin(), None, {"state": None}


@case()
def numbers_among_results(r):
    return {"x": r.cos(), "k": 3, "rate": 0.5, "done": True}


@case()
def a_number_of_each(r):
    return r * 2, int((r > 0).sum())


@case()
def truths_of_python(r):
    return r, bool(r[0] > 0)
