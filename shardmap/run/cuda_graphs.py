"""CUDA graphs of torch behind a small interface, so that what uses them runs without a GPU.

Tests put something in the place of `graphs` that keeps a function and calls it at each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Tensors = Sequence[torch.Tensor]


class Graphs(Protocol):
    """The graphs of one kind of device."""

    device_type: str
    """The kind of device that has such graphs."""

    def capturing(self) -> bool:
        """True if the current stream is being captured."""
        ...

    def pool(self, device: torch.device) -> object:
        """A memory pool that the graphs of a device share."""
        ...

    def warmed(self, device: torch.device, function: Callable[[], Tensors]) -> Tensors:
        """The function's results, computed beside the current stream."""
        ...

    def captured(
        self, device: torch.device, pool: object, function: Callable[[], Tensors]
    ) -> tuple[Callable[[], None], Tensors]:
        """A replay of what the function launches, and the tensors that a replay fills."""
        ...

    def mark(self, device: torch.device) -> object:
        """A mark behind all that has been launched on the current stream."""
        ...

    def after(self, device: torch.device, mark: object) -> None:
        """Let the current stream wait for a mark."""
        ...


class CudaGraphs:
    """The graphs of CUDA devices."""

    device_type = "cuda"

    def capturing(self) -> bool:
        """True if the current stream is being captured."""
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def pool(self, device: torch.device) -> object:
        """A memory pool that the graphs of a device share."""
        with torch.cuda.device(device):
            return torch.cuda.graph_pool_handle()

    def warmed(self, device: torch.device, function: Callable[[], Tensors]) -> Tensors:
        """The function's results, computed on a stream of its own.

        Libraries allocate workspaces and choose kernels at their first calls on a stream, which
        they may not do while it is captured.
        """
        current, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            results = function()
        current.wait_stream(beside)
        for t in results:
            t.record_stream(current)
        return results

    def captured(
        self, device: torch.device, pool: object, function: Callable[[], Tensors]
    ) -> tuple[Callable[[], None], Tensors]:
        """Capture what the function launches.

        Only this thread must not synchronise meanwhile: others may go on as they like.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        # The outer context puts the current stream back after a capture that fails, which
        # torch.cuda.graph does not.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            capture = torch.cuda.graph(
                graph,
                pool=pool,  # pyright: ignore[reportArgumentType]
                stream=stream,
                capture_error_mode="thread_local",
            )
            with capture:
                results = function()

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return replay, results

    def mark(self, device: torch.device) -> object:
        """An event behind all that has been launched on the current stream."""
        return torch.cuda.current_stream(device).record_event()

    def after(self, device: torch.device, mark: object) -> None:
        """Let the current stream wait for an event."""
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(device).wait_event(mark)


graphs: Graphs = CudaGraphs()
