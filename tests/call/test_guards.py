"""`trace="auto"` sees whatever changes a function between two calls, or records it each time."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import shardmap
from shardmap.call import automatic
from tests.call.all_changes import STATES, WAYS
from tests.call.runs import counting


def loop(f, rows):
    return torch.stack([f(r) for r in rows])


ROTATING = pytest.mark.rotating


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "calls",
    [2, *[pytest.param(calls, marks=ROTATING) for calls in (1, 3, 6)]],
    ids="after{}".format,
)
def test_a_change_between_calls(name, calls):
    torch.manual_seed(0)
    way = WAYS[name]()
    batches = [torch.rand(3, 3) + 0.5 for _ in range(calls + 4)]
    try:
        f = next(way)
        mapped = shardmap.vmap(f, randomness="different")
        for rows in batches[:calls]:
            torch.testing.assert_close(mapped(rows), loop(f, rows))
        f = next(way)
        for rows in batches[calls:]:
            torch.testing.assert_close(mapped(rows), loop(f, rows))
            torch.testing.assert_close(
                shardmap.vmap(f, randomness="different")(rows), loop(f, rows)
            )
    finally:
        for _ in way:  # what was patched is put back
            pass


@pytest.mark.parametrize("again", [False, True])
def test_each_way_changes_the_function(again):
    """Once more in the same process, too: nothing that an earlier turn has changed stays."""
    assert len(STATES) > 300
    del again
    for name in STATES:
        way = WAYS[name]()
        try:
            before = next(way)(torch.ones(2))
            after = next(way)(torch.ones(2))
        finally:
            for _ in way:  # what was patched is put back
                pass
        assert not torch.equal(before, after), name


FOUND_BY_CALLS = frozenset(
    "a_file whether_a_file_exists a_dynamic_import by_globals values_written_as_text "
    "values_in_a_text the_level_of_a_logger the_version_of_a_tensor how_numpy_treats_errors "
    "state_of_a_lock state_of_the_state_of_a_torch_generator".split()
)
"""Ways that change what `trace="once"` does not compare (docs/semantics.md)."""


@pytest.mark.parametrize("name", [name for name in WAYS if name not in FOUND_BY_CALLS])
def test_a_change_between_calls_of_a_map_that_records_once(name):
    torch.manual_seed(0)
    way = WAYS[name]()
    try:
        f = next(way)
        mapped = shardmap.vmap(f, randomness="different", trace="once")
        for calls in (2, 3):
            for _ in range(calls):
                rows = torch.rand(3, 3) + 0.5
                torch.testing.assert_close(mapped(rows), loop(f, rows))
            f = next(way, f)
    finally:
        for _ in way:  # what was patched is put back
            pass


KEYS = [name for name, make in WAYS.items() if make.__module__.endswith("changes_of_keys")]


@pytest.mark.parametrize(
    ("name", "trace"),
    # what a context is found by is a call, which trace="once" does not compare (docs/semantics.md)
    [(n, t) for n in KEYS for t in ("once", "each") if t == "each" or "decimals" not in n],
)
def test_a_change_of_keys_and_memory_between_calls_of_other_options(name, trace):
    """What C alone reads: a map that is kept, and one that is made anew at each call."""
    torch.manual_seed(0)
    way = WAYS[name]()
    try:
        f = next(way)
        mapped = shardmap.vmap(f, randomness="different", trace=trace)
        for calls in (3, 4):
            for _ in range(calls):
                rows = torch.rand(3, 3) + 0.5
                torch.testing.assert_close(mapped(rows), loop(f, rows))
                again = shardmap.vmap(f, randomness="different", trace=trace)
                torch.testing.assert_close(again(rows), loop(f, rows))
            f = next(way, f)
    finally:
        for _ in way:  # what was patched is put back
            pass


def test_there_are_enough_ways():
    assert len(WAYS) >= 80


class Lazy:
    """An object that answers for what it has not, and not in python's way."""

    __slots__ = ("known",)

    def __init__(self):
        self.known = {"scale": 2.0}

    def __getattr__(self, name):
        return self.known[name]


class Proxy:
    """An object that is none outside of a request, as in web frameworks."""

    scale = 2.0

    @property
    def __dict__(self):
        raise RuntimeError("outside of a request")


@pytest.mark.parametrize("make", [Lazy, Proxy, lambda: np.ma.array([2.0, 5.0], mask=[0, 1])])
def test_objects_that_answer_in_their_own_way(make):
    made = make()

    def f(r):
        return r * float(made.sum() if isinstance(made, np.ndarray) else made.scale)

    mapped = shardmap.vmap(f)
    for _ in range(5):
        rows = torch.randn(5, 3)
        assert torch.equal(mapped(rows), 2 * rows)


def test_compiled_text_with_names_of_its_own():
    code = compile("x * 2", "<text>", "eval")
    mapped = shardmap.vmap(lambda r: eval(code, {"x": r}))
    for _ in range(5):
        rows = torch.randn(5, 3)
        assert torch.equal(mapped(rows), 2 * rows)


class Scaling(torch.Tensor):
    """Scales each product of its method."""

    scale = 3.0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) * cls.scale if func is torch.Tensor.mul else found


@pytest.mark.parametrize("options", [{}, {"trace": "once"}, {"trace": "each"}, {"chunk_size": 2}])
def test_what_the_class_of_a_captured_tensor_does_is_done_once(options):
    Scaling.scale = 1.0
    weight = torch.ones(3, requires_grad=True)
    scaled = weight.as_subclass(Scaling)

    def f(r):
        return (scaled * r).as_subclass(torch.Tensor)

    mapped = shardmap.vmap(f, **options)
    for scale in (1.0, 1.0, 3.0, 3.0, 5.0):
        Scaling.scale = scale
        rows = torch.randn(5, 3)
        found = mapped(rows)
        torch.testing.assert_close(found, loop(f, rows))
        grads = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (found, loop(f, rows))]
        torch.testing.assert_close(*grads)


def test_a_mapped_tensor_of_such_a_class():
    Scaling.scale = 3.0
    mapped = shardmap.vmap(lambda r: (r * 2).as_subclass(torch.Tensor))
    for _ in range(4):
        rows = torch.randn(5, 3).as_subclass(Scaling)
        want = torch.stack([(r * 2).as_subclass(torch.Tensor) for r in rows])
        torch.testing.assert_close(mapped(rows), want)


def test_functions_of_one_code_and_other_names():
    def making(name):
        def activation():
            return None

        activation.__name__ = name
        return lambda r: r * {"relu": 2.0, "gelu": 5.0}[activation.__name__]

    for name in ("relu", "relu", "relu", "gelu", "gelu", "relu"):
        rows, f = torch.randn(5, 3), making(name)
        assert torch.equal(shardmap.vmap(f)(rows), loop(f, rows))


@pytest.mark.parametrize("option", ["-c", "-"])
def test_a_function_without_a_file_sees_its_globals(option):
    text = (
        "import torch, shardmap\n"
        "scale = 1.0\n"
        "mapped = shardmap.vmap(lambda r: r * scale)\n"
        "for _ in range(4): mapped(torch.randn(5, 3))\n"
        "scale = 2.0\n"
        "rows = torch.randn(5, 3)\n"
        "assert torch.equal(mapped(rows), 2 * rows)\n"
    )
    arguments = [option, text] if option == "-c" else [option]
    subprocess.run([sys.executable, *arguments], input=text, text=True, check=True)


def test_each_thread_has_its_own_locals():
    local = threading.local()
    mapped = shardmap.vmap(lambda r: r * local.scale)
    wrong = []

    def work(scale):
        local.scale = scale
        rows = torch.randn(3, 4)
        if not torch.equal(mapped(rows), rows * scale):
            wrong.append(scale)

    for scale in (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0):
        thread = threading.Thread(target=work, args=(scale,))
        thread.start()
        thread.join()
    assert not wrong


@pytest.mark.parametrize("transform", [shardmap.jacrev, shardmap.jacfwd, shardmap.hessian])
def test_derivatives_are_replayed_too(transform):
    scale = [2.0]

    def function(r):
        return (r * scale[0]).sin().sum()

    mapped = transform(function)
    own = {shardmap.jacrev: torch.func.jacrev, shardmap.jacfwd: torch.func.jacfwd}
    plain = own.get(transform, torch.func.hessian)
    runs = []
    for k in range(14):
        if k == 12:
            scale[0] = 3.0
        rows = torch.randn(4, 3, dtype=torch.float64)
        with counting(function) as calls:
            found = mapped(rows)
        runs.append(calls())
        torch.testing.assert_close(found, loop(plain(lambda r: (r * scale[0]).sin().sum()), rows))
    reasons = [r.why for known in automatic.known() for r in known.refused.values()]
    assert runs[4:12].count(0) >= 3, reasons
    assert runs[12] > 0


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))],
    ids=["linear", "sequential"],
)
def test_gradients_of_torchs_own_modules_are_replayed(model):
    text = shardmap.per_sample_grad(model, lambda out: out.sum()).plan(torch.randn(4, 3)).explain()
    assert "then replayed while what it reads is unchanged" in text


def test_gradients_of_a_model_that_changes():
    """The parameters are those that the model has at each call."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    gradients = shardmap.per_sample_grad(model, lambda out: out.sum())
    rows = torch.randn(5, 4)
    for change in (
        lambda: None,
        lambda: model[0].requires_grad_(False),
        lambda: model[0].requires_grad_(True),
        lambda: model.append(nn.Linear(3, 3)),
        lambda: setattr(model[1], "bias", None),
    ):
        change()
        for _ in range(3):
            found = gradients(rows)
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            assert set(found) == names
            wanted = [p for p in model.parameters() if p.requires_grad]
            for i, row in enumerate(rows):
                expected = torch.autograd.grad(model(row).sum(), wanted)
                for name, one in zip(found, expected, strict=True):
                    torch.testing.assert_close(found[name][i], one)


def test_text_that_is_evaluated():
    mapped = shardmap.vmap(lambda r: eval("r * 2", {"r": r}))
    for _ in range(4):
        rows = torch.randn(3, 2)
        assert torch.equal(mapped(rows), rows * 2)
