"""Put the results of chunks together.

They are stacked in place, concatenated with autograd kept, or reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardmap.reduce import Reduction
from shardmap.rules import huge_pages as pages
from shardmap.run.base import Job, Output

_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
"""The wider dtype in which the sums of chunks are added up: thousands of additions in float32 would
lose two digits."""

_TOGETHER = 16
"""Number of chunks that are first added up in their own dtype."""
_WITHOUT_FLOAT64 = ("mps",)


def wider(dtype: torch.dtype) -> int:
    """Width of the totals' dtype over that of the results."""
    return 2 if dtype in _WIDER else 1


class Gather:
    """Puts chunks together in the order of the batch, in any order of their arrival.

    Without outer autograd each chunk is written into its slice of one preallocated output:
    concatenating at the end would double the memory. With it, chunks are concatenated so that
    gradients flow.

    Args:
        job: The mapped call.
        memory: Memory for stacked outputs, by position, `[N, *shape]` each; that of others is
            allocated.
    """

    def __init__(self, job: Job, memory: Mapping[int, torch.Tensor] | None = None):
        self.job = job
        self.concatenate = job.grad or job.transformed
        """True under outer autograd and outer transforms, which cannot write into a plain
        tensor."""
        self.parts: dict[int, dict[int, torch.Tensor]] = {}
        self.single: dict[int, torch.Tensor] = {}
        self.whole: dict[int, torch.Tensor] = dict(memory or {})
        self.totals: dict[int, Total] = {}
        for k, out in enumerate(job.outputs):
            if out.reduction is not None:
                self.totals[k] = Total(out, out.reduction, job.samples, job.grad)

    def stacked(self, k: int) -> torch.Tensor:
        """Output `k` of all samples, `[N, *shape]`, in the memory of the result."""
        whole = self.whole.get(k)
        if whole is None:
            out = self.job.outputs[k]
            d = out.dim or 0
            whole = pages.whole(
                (*out.shape[:d], self.job.samples, *out.shape[d:]), out.dtype, out.device
            )
            whole = self.whole[k] = whole.movedim(d, 0) if d else whole
        return whole

    def slot(self, k: int, start: int, stop: int) -> torch.Tensor:
        """The rows `start` to `stop` of the stacked output `k`, where a chunk is written."""
        return self.stacked(k)[start:stop]

    def forget(self) -> None:
        """Drop all results: lanes hold this object, and tracebacks hold them."""
        for held in (self.parts, self.single, self.whole, self.totals):
            held.clear()

    @property
    def waiting(self) -> int:
        """Number of partial results that came before their turn."""
        return max((len(t.waiting) for t in self.totals.values()), default=0)

    def add(self, start: int, stop: int, outs: Sequence[torch.Tensor | None]) -> None:
        """Take the outputs of the samples `start` to `stop`, reduced ones combined.

        An output that is already written in place, or was not sent, is None.
        """
        for k, (t, out) in enumerate(zip(outs, self.job.outputs, strict=True)):
            if t is None:
                continue
            if k in self.totals:
                self.totals[k].add(start, stop, t)
            elif not out.mapped:
                if k not in self.single:
                    self.single[k] = t.to(out.device)
            elif self.concatenate or stop - start == self.job.samples:
                self.parts.setdefault(k, {})[start] = t.to(out.device)
            elif self.job.places is not None:
                whole = self.stacked(k)
                places = self.job.places[start:stop].to(whole.device)
                whole.index_copy_(0, places, t.to(whole.device))
            else:
                self.put(self.slot(k, start, stop), t)

    def put(self, slot: torch.Tensor, t: torch.Tensor) -> None:
        """Copy a chunk's results into their slice of the output."""
        slot.copy_(t)

    def combined(self, outs: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
        """A chunk's outputs as `add` takes them, on the device that computed them."""
        if not self.totals:
            return list(outs)
        return [
            self.totals[k].partial(t, size) if k in self.totals else t for k, t in enumerate(outs)
        ]

    def finish(self) -> list[torch.Tensor]:
        """The results, each as the loop would stack it, or reduced.

        For a part of a larger job: the unfinished totals.
        """
        return [self._finish(k, out) for k, out in enumerate(self.job.outputs)]

    def _finish(self, k: int, out: Output) -> torch.Tensor:
        if k in self.totals:
            return self.totals[k].so_far() if self.job.partial else self.totals[k].finish()
        if not out.mapped:
            return placed(self.single[k], out, self.job.samples)
        if k in self.parts:
            parts = [part for _, part in sorted(self.parts[k].items(), key=lambda item: item[0])]
            found = parts[0] if len(parts) == 1 else torch.cat(parts)
            if self.job.places is not None:
                found = found.index_select(0, self.job.places.argsort().to(found.device))
            return placed(found, out, self.job.samples)
        return self.stacked(k).movedim(0, out.dim or 0)


def placed(t: torch.Tensor, out: Output, samples: int) -> torch.Tensor:
    """An output with its dimension of samples at `out.dim`.

    Its memory is laid out as torch.stack does it: flatten() depends on that.

    Args:
        t: `[N, *shape]`, or `shape` if it does not depend on the sample: then it is copied for
            each.
        out: The output.
        samples: N.
    """
    d = out.dim
    if out.mapped:
        return t.movedim(0, d).contiguous() if d else t
    if d is None:
        return t.clone()
    return (
        t.unsqueeze(d)
        .expand(*t.shape[:d], samples, *t.shape[d:])
        .clone(memory_format=torch.contiguous_format)
    )


class Total:
    """The running combination of the samples from the first one on.

    Chunks that come before their turn wait.
    """

    def __init__(self, out: Output, reduction: Reduction, samples: int, grad: bool):
        self.out = out
        self.reduction = reduction
        self.samples = samples
        self.in_place = not grad
        self.recent: torch.Tensor | None = None
        """The sum of the last few chunks in their own dtype: adding each of them to the wider total
        costs four times as much."""
        self.recently = 0
        self.value: torch.Tensor | None = None
        self.next = 0
        """The sample whose chunk is added next."""
        self.waiting: dict[int, tuple[int, torch.Tensor]] = {}

    def add(self, start: int, stop: int, partial: torch.Tensor) -> None:
        """Take in a chunk's combination."""
        if start == stop:
            if not self.samples:  # the sum of none, which autograd follows
                self.value = partial.to(self.out.device)
            return
        self.waiting[start] = stop, partial.to(self.out.device)
        while self.next in self.waiting:
            self.next, partial = self.waiting.pop(self.next)
            self._take(partial)

    def partial(self, t: torch.Tensor, size: int) -> torch.Tensor:
        """Combine the results of one chunk, on its device.

        The results are `[n, *shape]`, or one sample's if it is the same for all.
        """
        if self.out.summed:
            return t
        if not self.out.mapped:
            t = t.expand(size, *t.shape)
        name = self.reduction.name
        if name in ("sum", "mean"):
            half = t.dtype in (torch.float16, torch.bfloat16)
            return t.sum(0, dtype=torch.float32) if half else t.sum(0)
        if name == "max":
            return t.amax(0)
        if name == "min":
            return t.amin(0)
        return _folded(self._combine, t)

    @property
    def _combine(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        assert self.reduction.combine is not None
        return self.reduction.combine

    def _take(self, partial: torch.Tensor) -> None:
        name, total = self.reduction.name, self.value
        if name in ("sum", "mean"):
            if not self.in_place:
                self.value = partial if total is None else total + partial
                return
            self.recent = partial if self.recent is None else self.recent.add_(partial)
            self.recently += 1
            if self.recently == _TOGETHER:
                self._settle()
        elif total is None:
            self.value = partial
        elif name == "max":
            self.value = torch.maximum(total, partial)
        elif name == "min":
            self.value = torch.minimum(total, partial)
        else:
            self.value = self._combine(total[None], partial[None])[0]

    def _settle(self) -> None:
        """Add the last few chunks to the total."""
        if self.recent is None:
            return
        if self.value is None:
            wider = (
                _WIDER.get(self.out.dtype) if self.out.device.type not in _WITHOUT_FLOAT64 else None
            )
            self.value = self.recent.to(wider or self.recent.dtype)
        else:
            self.value.add_(self.recent)
        self.recent, self.recently = None, 0

    def so_far(self) -> torch.Tensor:
        """The combination of the samples taken so far, in the wider dtype of the total."""
        self._settle()
        assert self.value is not None, "a part of a job has samples"
        return self.value

    def finish(self) -> torch.Tensor:
        """The combination of all samples."""
        if self.value is not None:
            self._settle()
        # The few chunks of a short run need no wider total: widening and rounding again is exact.
        total = self.recent if self.value is None and self.recent is not None else self.value
        out, name = self.out, self.reduction.name
        if name in ("sum", "mean"):
            exact = out.dtype.is_floating_point or out.dtype.is_complex
            if total is None:
                total = torch.zeros(
                    out.shape, dtype=out.dtype if exact else torch.int64, device=out.device
                )
            if name == "mean":
                total = total / self.samples
            return total.to(out.dtype) if exact else total
        assert total is not None, "a reduction of no samples has been refused"
        finish = self.reduction.finish
        return finish(total) if finish is not None else total


def _folded(combine: Callable[[Any, Any], Any], t: torch.Tensor) -> torch.Tensor:
    """Reduce `[n, *shape]` to `[*shape]` by a pairwise tree.

    Neighbours are combined, then neighbouring pairs, in the order of the samples.
    """
    while t.shape[0] > 1:
        pairs = t.shape[0] // 2
        merged = combine(t[0 : 2 * pairs : 2], t[1 : 2 * pairs : 2])
        t = torch.cat([merged, t[2 * pairs :]]) if t.shape[0] % 2 else merged
        del merged
    return t[0].clone()  # the memory of a one-sample chunk may be written by the next chunk
