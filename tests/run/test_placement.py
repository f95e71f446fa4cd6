"""Several GPUs without hardware: fake tensors have devices, and refuse calls that mix them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import shardmap
from shardmap.planning import device as devices
from shardmap.run import lanes, prepare

GPUS = [f"cuda:{i}" for i in range(8)]


class Attention(nn.Module):
    """Attention with heads, over a sequence without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[s, 8] -> [s, 8]`."""
        q, k, v = self.project(x).view(1, x.shape[0], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), (8,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(0), nn.Linear(64, 3)
        ),
        (1, 4, 4),
    ),
    "norms": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()), (5, 8)),
    "attention": (Attention, (6, 8)),
    "recurrent": (lambda: nn.GRU(8, 4), (5, 8)),
}


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Eight GPUs that exist in name only; counts the captured tensors copied to each."""
    copies: Counter[str] = Counter()
    monkeypatch.setattr(devices, "available", lambda: ("cpu", *GPUS))
    original = prepare.captured_to

    def counted(t: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies[str(device)] += 1
        return original(t, device)

    monkeypatch.setattr(prepare, "captured_to", counted)
    direct = prepare.direct
    for module in (
        prepare,
        lanes,
    ):  # as on GPUs that are there: results are computed into memory of their own
        monkeypatch.setattr(
            module, "direct", lambda job, device: device.type == "cpu" and direct(job, device)
        )
    getitem, copy = torch.Tensor.__getitem__, torch.Tensor.copy_

    def part(t: torch.Tensor, index: Any) -> Any:
        """Without the device guard of python's indexing, which a CPU build of torch does not have."""
        if t.device.type != "cuda" or not isinstance(index, slice | int | None):
            return getitem(t, index)
        if index is None:
            return t.unsqueeze(0)
        if isinstance(index, int):
            return t.select(0, index)
        return torch.ops.aten.slice.Tensor(t, 0, index.start, index.stop, index.step or 1)

    def copied(t: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Fake tensors have no values, and a copy may go from any device to any other."""
        if "cuda" not in (t.device.type, source.device.type):
            return copy(t, source, non_blocking)
        torch.broadcast_shapes(t.shape, source.shape)
        return t

    monkeypatch.setattr(torch.Tensor, "__getitem__", part)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    return copies


@pytest.mark.parametrize("samples", [1, 7, 8, 19])
@pytest.mark.parametrize("name", MODELS)
def test_recorded_on_the_host_and_run_on_eight_gpus(
    name: str, samples: int, eight_gpus: Counter[str]
) -> None:
    """No call mixes devices, results come home, and each device gets each captured tensor once."""
    make, shape = MODELS[name]
    with FakeTensorMode(), torch.no_grad():
        model = make()
        batch = torch.randn(samples, *shape)

        def forward(x: torch.Tensor) -> torch.Tensor:
            out = model(x)
            return out[0] if isinstance(out, tuple) else out

        result = shardmap.vmap(forward, devices="cuda:*", chunk_size=2)(batch)
        expected = forward(batch[0]).shape
    assert result.shape == (samples, *expected)
    assert result.device.type == "cpu"
    assert 1 <= len(eight_gpus) <= min(samples, len(GPUS)), (
        "a device that computes nothing gets nothing; a faster one may do more"
    )
    assert set(eight_gpus.values()) == {len(list(model.parameters()))}


def test_devices_named_one_by_one(eight_gpus: Counter[str]) -> None:
    """A list, and a name with numbers."""
    with FakeTensorMode(), torch.no_grad():
        weights = torch.randn(4, 4)
        for named in (["cuda:1", torch.device("cuda", 5)], "cuda:1,5"):
            eight_gpus.clear()
            result = shardmap.vmap(lambda x: weights @ x, devices=named)(torch.randn(6, 4))
            assert result.shape == (6, 4)
            assert dict(eight_gpus) == {"cuda:1": 1, "cuda:5": 1}


def test_samples_that_live_on_a_gpu_stay_there(eight_gpus: Counter[str]) -> None:
    """ "auto" is where the inputs are, factories inside the function included."""
    with FakeTensorMode(), torch.no_grad():
        batch = torch.randn(5, 3, device="cuda:3")
        result = shardmap.vmap(lambda x: x + torch.ones(3, device=x.device))(batch)
    assert result.device == torch.device("cuda:3")
    assert set(eight_gpus) <= {"cuda:3"}


def test_a_gpu_that_is_not_there() -> None:
    """The message lists what is."""
    with pytest.raises(shardmap.errors.DeviceError, match="cuda:9.*this machine has cpu"):
        shardmap.vmap(torch.sin, devices="cuda:9")(torch.ones(2))


# ----------------------------------------------------------------------------------------------
# planned maps


def heads(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Some outputs of several kinds."""
    return {"wide": x.outer(x), "sum": x.exp().sum(), "narrow": (x > 0).sum()}


REDUCTIONS: tuple[Any, ...] = (
    None,
    "sum",
    {"wide": "sum", "sum": "mean", "narrow": None},
    {"wide": "max", "sum": None, "narrow": "sum"},
)


@pytest.mark.parametrize("output_device", [None, "cuda:3", "cpu"])
@pytest.mark.parametrize("home", ["cpu", "cuda:0", "cuda:6"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("chunk_size", ["auto", 7, None, {"cuda:1": 3, "cuda": "auto"}])
def test_results_come_to_one_device(
    output_device: Any, home: str, reduce: Any, chunk_size: Any, eight_gpus: Counter[str]
) -> None:
    """No call mixes devices, whatever the reduction, and results are on the requested devices."""
    with FakeTensorMode(), torch.no_grad():
        batch = torch.randn(101, 600, device=home)  # 146 MiB of results: large enough to be planned
        mapped = shardmap.vmap(
            heads,
            devices="cuda:*",
            chunk_size=chunk_size,
            reduce=reduce,
            output_device=output_device,
        )
        result = mapped(batch)
    shapes = {"wide": (600, 600), "sum": (), "narrow": ()}
    for name, out in result.items():
        reduction = reduce[name] if isinstance(reduce, dict) else reduce
        assert tuple(out.shape) == (*(() if reduction else (101,)), *shapes[name])
        assert out.device == torch.device(output_device or home)
        assert out.dtype == (torch.int64 if name == "narrow" else torch.float32)


@pytest.mark.parametrize("reduce", [None, "mean", (torch.matmul, None)])
@pytest.mark.parametrize("chunk_size", ["auto", 5])
@pytest.mark.parametrize("output_device", [None, "cuda:3"])
def test_captured_tensors_go_to_each_gpu_once(
    reduce: Any, chunk_size: Any, output_device: Any, eight_gpus: Counter[str]
) -> None:
    """Also where the map is planned, tried on a few samples, and reduced."""
    with FakeTensorMode(), torch.no_grad():
        weight, bias = torch.randn(128, 128), torch.randn(128)
        batch = torch.randn(101, 128, 128)
        mapped = shardmap.vmap(
            lambda x: (x @ weight + bias).exp() @ weight,
            devices="cuda:*",
            chunk_size=chunk_size,
            reduce=reduce,
        )
        if output_device:
            mapped = shardmap.vmap(
                lambda x: (x @ weight + bias).exp() @ weight,
                devices="cuda:*",
                chunk_size=chunk_size,
                reduce=reduce,
                output_device=output_device,
            )
        result = mapped(batch)
    assert tuple(result.shape) == ((101, 128, 128) if reduce is None else (128, 128))
    assert str(result.device) == (output_device or "cpu")
    assert set(eight_gpus) <= set(GPUS)
    assert set(eight_gpus.values()) == {2}


def test_a_plan_for_eight_gpus_shares_the_batch(eight_gpus: Counter[str]) -> None:
    """Equal devices, equal shares, at least four chunks in all for each.

    The memory of the result is where it goes.
    """
    with FakeTensorMode(), torch.no_grad():
        weight = torch.randn(500, 500)
        batch = torch.randn(1009, 500)
        plan = shardmap.plan(
            lambda x: (x @ weight).exp(), devices="cuda:*", output_device="cuda:3"
        )(batch)
        result = plan.run()
        again = plan.run()
    assert [lane.device for lane in plan.lanes] == GPUS
    rows = [lane.rows for lane in plan.lanes]
    assert sum(rows) == 1009
    assert max(rows) - min(rows) <= 1
    resident = [lane.memory.resident_bytes for lane in plan.lanes]
    assert resident[3] == 500 * 500 * 4 + 1009 * 500 * 4, "the weight and the whole result"
    assert {resident[i] for i in range(8) if i != 3} == {500 * 500 * 4}, "the weight"
    assert plan.fits
    assert all(lane.budget_bytes is None for lane in plan.lanes), (
        "nobody can say what a fake device has free"
    )
    for out in (result, again):
        assert (tuple(out.shape), out.device) == ((1009, 500), torch.device("cuda:3"))
    assert set(eight_gpus.values()) == {1}


def test_a_budget_counts_on_each_gpu(eight_gpus: Counter[str]) -> None:
    with FakeTensorMode(), torch.no_grad():
        batch = torch.randn(1009, 500)
        options = {
            "devices": ["cuda:0", "cuda:1"],
            "output_device": "cuda:1",
            "memory_budget": "3MiB",
        }
        plan = shardmap.plan(lambda x: x.outer(x).sum(0).exp(), **options)(batch)
        assert [lane.fits for lane in plan.lanes] == [True, True]
        assert all(lane.peak_bytes <= 3 << 20 for lane in plan.lanes)
        with pytest.raises(shardmap.errors.OverBudget, match=r"on cuda:\d, budget 3.0 MiB"):
            shardmap.vmap(lambda x: x.outer(x).sum(0).exp(), chunk_size=100, **options)(batch)


def test_a_gpu_named_twice_and_the_host(eight_gpus: Counter[str]) -> None:
    with FakeTensorMode(), torch.no_grad():
        batch = torch.randn(101, 600)
        plan = shardmap.plan(heads, devices=["cuda:2", "cpu", "cuda:2"], reduce="sum")(batch)
        result = plan.run()
    assert [lane.name for lane in plan.lanes] == ["cuda:2#1", "cpu", "cuda:2#2"]
    assert {str(t.device) for t in result.values()} == {"cpu"}


def test_samples_without_values_are_computed_where_they_are() -> None:
    x = torch.empty(5, 3, device="meta")
    found = shardmap.vmap(lambda r: (r * 2).sum(), chunk_size=2)(x)
    assert found.is_meta
    assert found.shape == (5,)
    with pytest.raises(shardmap.errors.DeviceError, match="hold no values.*use devices='auto'"):
        shardmap.vmap(lambda r: (r * 2).sum(), devices=["cpu", "cpu"])(x)
