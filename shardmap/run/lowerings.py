"""The lowerings of one call.

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
    """How one call's program is lowered; each lowering is asked of the cache when it is needed.

    A program that is found by its identity costs nothing; one that is new is tried on samples.
    """

    recording: Recording
    options: LoweringOptions
    """For any device; the kind is put in."""
    layout: tuple[bool, ...]
    """For each input, whether samples lie one after another in memory."""
    expected: Samples = ()
    """What the function returns for the first sample, and the last; empty if it was not run."""
    fixes: Fixes = field(default_factory=Fixes)
    """What another process has found to be needed."""
    instead: Lowered | None = None
    """What runs in the place of any lowering: the function itself, sample by sample."""

    def how(self, device_type: str) -> LoweringOptions:
        """The options for a kind of device."""
        options = self.options
        return (
            options
            if options.device_type == device_type
            else replace(options, device_type=device_type)
        )

    def outline(self, device_type: str) -> BatchedProgram:
        """The batched program as the rules give it.

        Which outputs differ by sample, what is summed.
        """
        if self.instead is not None:
            return self.instead.batched
        recording = self.recording
        return cache.draft(recording.program, self.how(device_type), self.layout, recording.sources)

    def notes(self, device_type: str) -> Notes:
        """What has been learned of the program on this kind of device."""
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
            device: Where the chunks run.
            size: How many samples it is tried on: 0, 1 or 2.
            slices: Whether outputs may be computed into slices of a result.
            inputs: Makes that many samples, `[size, *shape]` each, on the device.
            captured: The captured tensors, there.
            literals: The literals, there.
            seed: For random draws, as `Seeds` says.
            fixes: What is known to be needed.
            sibling: A lowering for chunks of several samples that was tried before. What it gives
                is expected of this one, where the function itself was not run for this call.
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
    """What a lowering that has been compared gives for the first of several samples.

    Empty where that cannot be told from rounding, or is a sum over samples.
    """
    if low.loose or low.batched.summed:
        return ()
    faults, outputs = trial.run(low.program, low.batched, low.fixes, samples)
    if faults:
        return ()
    pairs = zip(low.batched.outputs, outputs, strict=True)
    return (tuple([t[0] if v.mapped else t for v, t in pairs]),)
