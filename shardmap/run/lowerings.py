"""The lowerings of one call: for each kind of device, for chunks of one sample and of several.

For each kind of device, and for chunks of one sample and of several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from shardmap.lower import cache, trial
from shardmap.lower.batched import BatchedProgram, Fixes, LoweringOptions
from shardmap.lower.cache import Lowered, Notes
from shardmap.lower.trial import Trial
from shardmap.rules.philox import Seeds
from shardmap.trace.recording import Recording

Samples = tuple[tuple[torch.Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class Lowerings:
    """The lowerings of one call's program; each is looked up in the cache when it is needed.

    A program that is found by its identity costs nothing; one that is new is tried on samples.
    """

    recording: Recording
    options: LoweringOptions
    """Options for any device; the kind of device is put in by `how`."""
    layout: tuple[bool, ...]
    """For each input: True if samples lie one after another in memory."""
    expected: Samples = ()
    """The function's results for the first and the last sample; empty if it was not run."""
    fixes: Fixes = field(default_factory=Fixes)
    """Fixes that another process has found to be needed."""
    instead: Lowered | None = None
    """Replaces every lowering if given: runs the function itself, sample by sample."""

    def how(self, device_type: str) -> LoweringOptions:
        """The options for a kind of device."""
        options = self.options
        return (
            options
            if options.device_type == device_type
            else replace(options, device_type=device_type)
        )

    def outline(self, device_type: str) -> BatchedProgram:
        """The batched program as the rules make it, before any trial.

        It tells which outputs differ by sample and which are summed.
        """
        if self.instead is not None:
            return self.instead.batched
        recording = self.recording
        return cache.draft(recording.program, self.how(device_type), self.layout, recording.sources)

    def untried(self, device: torch.device) -> Lowered:
        """The lowering as the rules make it, compared with nothing: for its costs."""
        assert self.instead is None
        program, sources = self.recording.program, self.recording.sources
        return cache.untried(program, self.how(device.type), self.layout, sources)

    def notes(self, device_type: str) -> Notes:
        """Measurements of the program on this kind of device."""
        if self.instead is not None:
            return self.instead.notes
        return cache.notes(self.recording.program, self.how(device_type), self.layout)

    def on(
        self,
        device: torch.device,
        size: int,
        slices: bool,
        inputs: Callable[[int], Sequence[torch.Tensor]],
        captured: Sequence[torch.Tensor],
        literals: Sequence[torch.Tensor],
        seed: Seeds,
        fixes: Fixes | None = None,
        sibling: Lowered | None = None,
    ) -> Lowered:
        """The lowering for chunks on `device`, tried there on the call's samples if it is new.

        Args:
            device: The device of the chunks.
            size: Number of samples that it is tried on: 0, 1 or 2.
            slices: True if outputs may be computed into slices of a result.
            inputs: Makes a given number of samples, `[size, *shape]` each, on the device.
            captured: The captured tensors on the device.
            literals: The literals on the device.
            seed: Seeds for random draws.
            fixes: Fixes that are known to be needed.
            sibling: A lowering for chunks of several samples that was tried before. Its results
                are expected of this one if the function itself was not run for this call.
        """
        if self.instead is not None:
            return self.instead
        recording = self.recording

        def on_samples(count: int, expected: Samples) -> Trial:
            return Trial(
                device,
                seed,
                count,
                tuple(inputs(count)),
                tuple(captured),
                tuple(literals),
                recording.scalars,
                recording.written_inputs,
                expected,
                recording.random,
            )

        def tried() -> Trial:
            expected = self.expected[:size]
            if not expected and sibling is not None:
                expected = _given_by(sibling, on_samples(2, ()))
            return on_samples(size, expected)

        return cache.lowered(
            recording.program,
            self.how(device.type),
            self.layout,
            size,
            recording.sources,
            tried,
            slices,
            fixes or self.fixes,
        )


def _given_by(low: Lowered, samples: Trial) -> Samples:
    """The results of a compared lowering for the first of several samples.

    Empty if they are equal only up to rounding, or if an output is a sum over samples.
    """
    if low.loose or low.batched.summed:
        return ()
    faults, outputs = trial.run(low.program, low.batched, low.fixes, samples)
    if faults:
        return ()
    pairs = zip(low.batched.outputs, outputs, strict=True)
    return (tuple([t[0] if v.mapped else t for v, t in pairs]),)
