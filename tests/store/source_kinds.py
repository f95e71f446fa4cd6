"""Every kind of object that is a source of samples, made from a tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from safetensors.torch import save_file
from torch.utils.data import Dataset, TensorDataset

from shardmap.store import (
    MemmapSink,
    OutputSpec,
    SafetensorsSink,
    ZarrSink,
    open_store,
)
from tests.store.kinds import fill, header, in_memory

N = 13


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Squares(Dataset):
    """Items computed from their number."""

    def __init__(self, form: str = "tuple", n: int = N, weight: torch.Tensor | None = None):
        self.form, self.n, self.weight = form, n, weight

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        x = torch.arange(4.0) * i
        return {
            "tensor": x,
            "number": i,
            "tuple": (x, i),
            "named": Pair(x, torch.tensor(i)),
            "list": [x, i / 2],
            "dict": {"x": x, "label": i, "w": True},
            "numpy": (x.numpy(), np.int32(i)),
            "text": (x, "cat"),
            "nested": (x, (i, i)),
            "ragged": torch.zeros(i + 1),
            "drift": torch.zeros(2, dtype=torch.float32 if i < 5 else torch.float64),
            "none": None,
        }[self.form]


class Batched(Squares):
    """A dataset that gives many items at once."""

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        return [super(Batched, self).__getitem__(i) for i in numbers]


def x_of(shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    return torch.randn(N, *shape)


def make_npy(folder: Path, a: np.ndarray, name: str = "x.npy") -> str:
    np.save(folder / name, a)
    return str(folder / name)


def make_zarr(folder: Path, a: np.ndarray, name: str = "x.zarr") -> str:
    zarr.create_array(str(folder / name), data=a, chunks=(4, *a.shape[1:]))
    return str(folder / name)


def make_memmap(folder: Path, a: np.ndarray) -> np.memmap:
    m = np.memmap(folder / "raw.bin", a.dtype, "w+", offset=100, shape=a.shape)
    m[:] = a
    return m


def make_store(sink: type, folder: Path, t: torch.Tensor) -> str:
    h = header(N, 5, (OutputSpec("x", tuple(t.shape[1:]), t.dtype),))
    store = sink(folder / "run").create(h)
    fill(store, [t])
    return store.url


def make_group(folder: Path, a: np.ndarray) -> str:
    group = zarr.open_group(folder / "group", mode="w")
    group.create_array("x", data=a)
    return str(folder / "group")


def make_safetensors(folder: Path, t: torch.Tensor) -> list[str]:
    paths = []
    for i, part in enumerate(t.split(5)):
        paths.append(str(folder / f"part-{i}.safetensors"))
        save_file(
            {"x": part.contiguous(), "other": torch.zeros(len(part), dtype=torch.bool)}, paths[-1]
        )
    return paths


KINDS: dict[str, tuple[bool, Callable[[Path, torch.Tensor], Any], dict]] = {
    "tensor": (False, lambda _, t: t, {}),
    "tuple of a tensor": (False, lambda _, t: (t,), {}),
    "dict of a tensor": (False, lambda _, t: {"x": t}, {}),
    "array": (False, lambda _, t: t.numpy(), {}),
    "array, read-only": (
        False,
        lambda _, t: np.frombuffer(t.numpy().tobytes(), np.float32).reshape(t.shape),
        {},
    ),
    "array, big-endian": (False, lambda _, t: t.numpy().astype(">f4"), {}),
    "array, turned round": (
        False,
        lambda _, t: np.ascontiguousarray(t.numpy()[::-1, :, ::-1])[::-1, :, ::-1],
        {},
    ),
    "memmap": (True, lambda f, t: make_memmap(f, t.numpy()), {}),
    "memmap, part of one": (
        True,
        lambda f, t: make_memmap(f, torch.cat([t[:3], t, t]).numpy())[3 : 3 + N],
        {},
    ),
    "memmap, strided": (
        True,
        lambda f, t: make_memmap(f, t.repeat_interleave(2, 0).numpy())[::2],
        {},
    ),
    "memmap, turned round": (True, lambda f, t: make_memmap(f, t.flip(0).numpy())[::-1], {}),
    "memmap, transposed": (
        True,
        lambda f, t: make_memmap(f, t.mT.contiguous().numpy()).transpose(0, 2, 1),
        {},
    ),
    "memmap, copy on write": (
        False,
        lambda f, t: np.load(make_npy(f, t.numpy()), mmap_mode="c"),
        {},
    ),
    "memmap of a .npy file": (
        True,
        lambda f, t: np.load(make_npy(f, t.numpy()), mmap_mode="r"),
        {},
    ),
    ".npy path": (True, lambda f, t: make_npy(f, t.numpy()), {}),
    ".npy Path": (True, lambda f, t: Path(make_npy(f, t.numpy())), {}),
    ".npy path, Fortran's order": (
        True,
        lambda f, t: make_npy(f, np.asfortranarray(t.numpy())),
        {},
    ),
    ".npy path, big-endian": (True, lambda f, t: make_npy(f, t.numpy().astype(">f4")), {}),
    "list of a .npy path": (True, lambda f, t: [make_npy(f, t.numpy())], {}),
    "zarr path": (True, lambda f, t: make_zarr(f, t.numpy()), {}),
    "zarr array": (True, lambda f, t: zarr.open_array(make_zarr(f, t.numpy()), mode="r"), {}),
    "zarr array in memory": (False, lambda _, t: zarr.array(t.numpy()), {}),
    "zarr group path": (True, lambda f, t: make_group(f, t.numpy()), {}),
    "zarr group": (
        True,
        lambda f, t: zarr.open_group(make_group(f, t.numpy()), mode="r"),
        {"names": ["x"]},
    ),
    "safetensors path": (
        True,
        lambda f, t: save_file({"x": t}, f / "x.safetensors") or f / "x.safetensors",
        {},
    ),
    "safetensors paths": (True, lambda f, t: make_safetensors(f, t), {"names": ["x"]}),
    "store in zarr": (True, lambda f, t: make_store(ZarrSink, f, t), {}),
    "store in safetensors": (True, lambda f, t: make_store(SafetensorsSink, f, t), {}),
    "store in memmaps": (True, lambda f, t: open_store(make_store(MemmapSink, f, t)), {}),
    "store in memory": (False, lambda f, t: make_store(in_memory, f, t), {}),
    "TensorDataset": (False, lambda _, t: TensorDataset(t), {}),
}
