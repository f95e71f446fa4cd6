"""Run the calls of a chunk compiled: a batched program in which libraries stand for calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shardmap._torch import compiler
from shardmap.lower.batched import BatchedProgram
from shardmap.lower.codegen import Replay, _passed, generate
from shardmap.lower.graphs import Meta, UncompilableError, given, parts
from shardmap.rules.lowering import Call


class Library:
    """A compiled graph."""

    def __init__(self, path: Path, device: torch.device, taken: Sequence[Meta]):
        self.taken = taken
        self.aligned = device.type != "cpu"
        extra = () if device.type == "cpu" else (str(device), str(path.parent))
        self.runner = compiler(device.type)(str(path), 1, *extra)
        self.__name__ = path.stem

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The graph's results.

        Raises:
            UncompilableError: A tensor is not laid out as those that it was compiled for.
        """
        for t, known in zip(tensors, self.taken, strict=True):
            # The library does not look: it would read other memory.
            if t.stride() != known.stride or t.shape != known.shape or str(t.dtype) != known.dtype:
                raise UncompilableError(
                    f"a tensor {tuple(t.shape)} of strides {t.stride()} came where it was compiled "
                    f"for {known.shape} of strides {known.stride}"
                )
        if self.aligned:  # kernels for GPUs read 16 bytes at a time
            tensors = tuple([t.clone() if t.data_ptr() % 16 else t for t in tensors])
        return self.runner.run(list(tensors))


class CompiledReplay:
    """A program whose chunks of one size run compiled."""

    def __init__(self, eager: Replay, program: BatchedProgram):
        replay = generate(program, False, eager.copied)
        order = {v.index: i for i, v in enumerate(_passed(eager.program))}
        self._picked = [order[v.index] for v in _passed(program)]
        self._replay = replay
        self.source = replay.source

    def chunk(self, *arguments: object) -> tuple[torch.Tensor, ...]:
        """The function of `Replay.chunk`, for chunks of the compiled size."""
        return self._replay.chunk(*arguments[:5], self._own(arguments[5]), *arguments[6:])

    def chunk_into(self, *arguments: object) -> tuple[torch.Tensor, ...]:
        """The function of `Replay.chunk_into`, for chunks of the compiled size."""
        return self._replay.chunk_into(*arguments[:5], self._own(arguments[5]), *arguments[6:])

    def _own(self, fixed: object) -> list[torch.Tensor]:
        assert isinstance(fixed, list | tuple)
        return [fixed[i] for i in self._picked]


def loaded(
    eager: Replay,
    numbers: frozenset[int],
    known: dict[int, Meta],
    folder: Path,
    device: torch.device,
    load: Callable[..., Callable[..., list[torch.Tensor]]] = Library,
) -> CompiledReplay:
    """Load a compiled program.

    Args:
        eager: The program as it runs uncompiled.
        numbers: Numbers of the calls that the compiler cannot follow.
        known: Metadata of the values that graphs take.
        folder: The folder of the libraries.
        device: The device that they run on.
        load: Loads one library.
    """
    program = eager.program
    calls: list[Call] = []
    count = 0
    for part in parts(program, numbers):
        if not part.graph:
            calls.append(program.chunk[part.numbers[0]])
            continue
        taken, returned = given(program, part.numbers)
        library = load(folder / f"graph{count}.so", device, [known[v.index] for v in taken])
        count += 1
        first = program.chunk[part.numbers[0]]
        calls.append(
            Call(
                library, tuple(taken), (), tuple(returned), True, False, first.equation, True, False
            )
        )
    return CompiledReplay(eager, replace(program, chunk=tuple(calls)))
