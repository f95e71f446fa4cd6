"""Every bad value of an option is refused.

The error has the call, the argument, the value, and what to do instead.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors

BATCH = torch.arange(6.0).reshape(3, 2)


def sample(x: torch.Tensor) -> torch.Tensor:
    return x * 2


AT_ONCE: list[tuple[str, Any, str]] = [
    *[
        ("chunk_size", value, "pass a positive int, 'auto', or None")
        for value in (0, -1, 2.0, "large", True, False, "1", [1], (2,))
    ],
    *[
        ("chunk_size", {"cpu": value}, "pass a positive int, 'auto', or None")
        for value in (0, -3, 1.5, "some", True)
    ],
    ("chunk_size", {0: 3}, "name devices by text"),
    ("chunk_size", {torch.device("cpu"): 3}, "name devices by text"),
    *[
        ("memory_budget", value, "bytes, or text such as '6GiB'")
        for value in (0, -5, 1.5, "", "6 parsecs", "GiB", "-1GiB", "0", True, [1], "inf")
    ],
    *[
        ("memory_budget", value, "bytes, or text such as '6GiB'")
        for value in ("nan", "1e400", "0 KiB", "0.5")
    ],
    *[
        ("memory_fraction", value, "above 0 and at most 1")
        for value in (0, -0.1, 1.01, "half", None, True, float("nan"), float("inf"))
    ],
    *[
        ("randomness", value, "'error', 'same' or 'different'")
        for value in ("random", None, True, 0, ["same"])
    ],
    *[("trace", value, "'each' or 'once'") for value in ("twice", None, True, 1, ["once"])],
    *[
        ("batch_norm", value, "'error', 'frozen' or 'per_sample'")
        for value in ("eval", None, True, "Frozen", ["error"])
    ],
    *[("strict", value, "True or False") for value in (None, 1, "yes")],
    *[("remat", value, "True or False") for value in (None, 0, "no")],
    *[("progress", value, "'always'") for value in (None, 1, "sometimes", "never", ["always"])],
]
IN_THE_CALL: list[tuple[str, Any, type[Exception], str]] = [
    *[
        ("reduce", value, errors.OptionError, "'sum', 'mean', 'max', 'min', 'norm'")
        for value in ("product", "SUM", "", 3, True, len, 1.5)
    ],
    *[
        ("reduce", value, errors.OptionError, "pass one reduction")
        for value in (("sum",), ["sum"], {"a": "sum"}, (), (None, None))
    ],
    *[
        ("chunk_size", value, errors.OptionError, "name one of these, or its kind")
        for value in ({"cuda:3": 1}, {"cuda": None, "cpu": 2})
    ],
    *[
        ("output_device", value, errors.DeviceError, "this machine has cpu")
        for value in ("abacus", "cuda:77", "", "cpu:3", "abacus:*")
    ],
    *[
        ("output_device", value, errors.DeviceError, "pass a name such as 'cpu', or a torch.device")
        for value in (0, ["cpu"], True)
    ],
    *[
        ("devices", value, errors.DeviceError, "this machine has cpu")
        for value in ("abacus", "cuda:77", [], "", ["cpu", "abacus"])
    ],
    *[("devices", value, errors.DeviceError, "pass") for value in (0, None, [0], {"cpu"}, True)],
    *[
        ("out_dims", value, errors.OutDimsError, "")
        for value in (2, -3, "0", None, (0, 0), 1.5, True)
    ],
    *[
        ("in_dims", value, errors.InDimsError, "")
        for value in (2, -3, "0", None, (0, 0), (None,), 1.5)
    ],
    *[("kw_in_dims", value, errors.InDimsError, "") for value in ({"y": 0}, "0", True)],
]
PUBLIC = ["vmap", "plan"]


@pytest.mark.parametrize("maker", PUBLIC)
@pytest.mark.parametrize(("name", "value", "remedy"), AT_ONCE)
def test_a_bad_value_is_refused_when_the_map_is_made(
    maker: str, name: str, value: Any, remedy: str
) -> None:
    with pytest.raises(errors.OptionError) as caught:
        getattr(shardmap, maker)(sample, **{name: value})
    text = str(caught.value)
    assert text.startswith(f"shardmap.{maker}(sample, in_dims=0): {name}"), text
    shown = (
        next(iter(value.values()))
        if isinstance(value, dict) and isinstance(next(iter(value)), str)
        else value
    )
    assert repr(shown) in text
    assert remedy in text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("maker", PUBLIC)
@pytest.mark.parametrize(("name", "value", "kind", "remedy"), IN_THE_CALL)
def test_a_bad_value_is_refused_by_the_call(
    maker: str, name: str, value: Any, kind: type[Exception], remedy: str
) -> None:
    """Values that depend on arguments or outputs are refused; nothing has changed then."""
    calls = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * 2

    batch = BATCH.clone()
    with pytest.raises(kind) as caught:
        getattr(shardmap, maker)(counted, **{name: value})(batch)
    text = str(caught.value)
    assert text.startswith(
        f"shardmap.{maker}(counted, in_dims={value!r}"
        if name == "in_dims"
        else f"shardmap.{maker}(counted, in_dims=0): "
    )
    assert remedy in text
    assert name in text or (name in ("in_dims", "out_dims") and f"{name[:-1]} {value}" in text)
    assert repr(value) in text or f"{name[:-1]} {value}" in text
    assert torch.equal(batch, BATCH)
    assert len(calls) <= 2, "the first sample, and the last"


@pytest.mark.parametrize("maker", PUBLIC)
@pytest.mark.parametrize("func", [None, 3, "sin", torch.ones(2)])
def test_what_is_no_function_is_refused(maker: str, func: Any) -> None:
    with pytest.raises(
        errors.OptionError,
        match=rf"shardmap.{maker}.*func=(?s:.*)not a function; pass a function of one sample",
    ):
        getattr(shardmap, maker)(func)


@pytest.mark.parametrize("name", ["max", "min"])
def test_an_order_of_complex_numbers_is_refused(name: str) -> None:
    with pytest.raises(
        errors.OptionError,
        match=rf"shardmap.vmap\(sample.*reduce='{name}'.*torch.complex64.*\.abs\(\)",
    ):
        shardmap.vmap(sample, reduce=name)(BATCH.to(torch.complex64))


def test_a_mean_of_whole_numbers_is_refused() -> None:
    with pytest.raises(
        errors.OptionError, match=r"shardmap.vmap\(sample.*reduce='mean'.*torch.int64.*'sum'"
    ):
        shardmap.vmap(sample, reduce="mean")(BATCH.long())


def test_a_plan_inside_another_map_is_refused() -> None:
    planned = shardmap.plan(sample)
    with pytest.raises(errors.OptionError, match=r"shardmap.plan\(sample.*plan the outermost call"):
        shardmap.vmap(lambda x: planned(x[None]).run())(BATCH)
    with pytest.raises(errors.OptionError, match=r"shardmap.plan\(sample.*plan the outermost call"):
        torch.func.vmap(lambda x: planned(x[None]).run())(BATCH)


def test_remat_and_writes_in_place_exclude_each_other() -> None:
    batch = BATCH.clone().requires_grad_() * 1
    with pytest.raises(
        errors.CapturedWriteError,
        match=r"shardmap.vmap\(.*remat=True.*mapped argument 0.*remat=False",
    ):
        shardmap.vmap(lambda x: x.mul_(2), remat=True)(batch)
    assert torch.equal(batch, BATCH)


GOOD: list[dict[str, Any]] = [
    *[{"chunk_size": value} for value in ("auto", None, 1, 10**12, {}, {"cpu": 1}, {"cpu": None},
    {"cpu": "auto"})], *[{"memory_budget": value} for value in (None, 1 << 40, "6GiB", "512 MB",
    "1e9", " 2.5 gib ", "1TiB")], *[{"memory_fraction": value} for value in (1, 1.0, 0.5)],
    *[{"devices": value} for value in ("auto", "cpu", "cpu:0", "cpu:*", ["cpu"] * 5,
    torch.device("cpu"), (torch.device("cpu"),))], *[{"output_device": value} for value in (None,
    "cpu", "cpu:0", torch.device("cpu"))], *[{"progress": value} for value in (True, False,
    "always")], *[{"out_dims": value} for value in (0, 1, -1, -2, (0,), [1])],
    {"remat": True}, {"strict": True}, {"trace": "once"}, {"randomness": "same"},
]  # fmt: skip


@pytest.mark.parametrize("options", GOOD, ids=repr)
def test_good_values_are_taken(options: dict[str, Any]) -> None:
    """By vmap and by plan."""
    want = BATCH * 2 if options.get("out_dims") in (None, 0, -2, (0,)) else (BATCH * 2).t()
    assert torch.equal(shardmap.vmap(sample, **options)(BATCH), want)
    assert torch.equal(shardmap.plan(sample, **options)(BATCH).run(), want)
