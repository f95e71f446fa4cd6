"""The surroundings of a call: another recording, transforms, a trace."""

from __future__ import annotations

import dataclasses

from torch.utils import checkpoint

from shardmap import errors
from shardmap._torch import (
    device_mode,
    dispatch_depth,
    dispatch_modes,
    function_depth,
    function_modes,
    functorch,
)
from shardmap.call.options import Options
from shardmap.trace.batch import Batch
from shardmap.trace.recorder import Recorder
from shardmap.trace.recording import Recording, is_empty_outside
from shardmap.trace.traced import is_graph_made, is_traced, refuse_transforms


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """The recording, transforms and trace around a call."""

    inlined: bool
    """True if it is part of a function that is being recorded, and so has no plan of its own."""
    transformed: bool
    """True if `torch.func` transforms, or forward-mode AD, are active around it."""
    traced: bool = False
    """True if its samples hold no values that python may read."""

    @property
    def plain(self) -> bool:
        """True if there are neither recordings nor transforms around it."""
        return not (self.inlined or self.transformed)

    def comparable(self, by_form: bool) -> bool:
        """True if all that is around it is compared when a recording is used again.

        Args:
            by_form: True if captured tensors may be others of the same form: those of a transform
                are made anew at each call. The samples of a vmap around hold no values to compare.
        """
        if self.inlined or under_function_mode():
            return False
        return not self.transformed or (by_form and only_differentiated())


def only_differentiated() -> bool:
    """True if every transform around takes derivatives: the tensors in it hold values."""
    kinds = functorch.TransformType.Grad, functorch.TransformType.Jvp
    return all(level.key() in kinds for level in functorch.get_interpreter_stack() or [])


def surroundings() -> Surroundings:
    """The surroundings of a call that is made now."""
    return Surroundings(under_recording(), functorch.peek_interpreter_stack() is not None)


def of_call(batch: Batch, options: Options) -> tuple[Surroundings, Batch, Options]:
    """The surroundings of a call, and its arguments and options as they are in them.

    Fake tensors alone are placed on the named devices, as real ones are.

    Raises:
        TransformError: A selective checkpoint is around it.
    """
    if dispatch_depth():
        _refuse_selective(options.call)
    if not (is_traced(batch.leaves) and (options.devices == "auto" or is_graph_made())):
        return surroundings(), batch, options
    # Part of a graph that is being traced, as one chunk: nothing can be compared or measured.
    refuse_transforms(options.call)
    options = dataclasses.replace(options, check="off")
    if options.reduce is not None:  # cut into parts, whose number must not be a symbol
        batch = dataclasses.replace(batch, size=int(batch.size))
    return Surroundings(True, True, True), batch, options


def _refuse_selective(call: str) -> None:
    """Refuse a checkpoint around that keeps the results of some operators, by their order.

    A call that is made again runs other operators: what has been recorded and tried is known then.
    """
    if any(type(mode).__module__ == checkpoint.__name__ for mode in dispatch_modes()):
        raise errors.TransformError(
            f"{call}: a selective checkpoint (context_fn) is around the call, which keeps results "
            "of operators by their order, and a map does not run the same ones twice; checkpoint "
            "without context_fn, use the selective one inside the mapped function, or pass "
            "remat=True to the map instead"
        )


def is_empty(batch: Batch, around: Surroundings, recording: Recording) -> bool:
    """True if a call has no samples, or a `torch.func.vmap` around it has none."""
    if around.traced:  # the number of samples may be a symbol
        return False
    outside = around.transformed and (*batch.tensors(), *recording.captured)
    return not batch.size or any(map(is_empty_outside, outside or ()))


def under_function_mode() -> bool:
    """True if a `TorchFunctionMode` is active that changes what functions do by its own rules.

    That of `torch.set_default_device` is not one: the device is a setting that is compared.
    """
    if function_depth() == 0:
        return False
    return any(type(mode) is not device_mode for mode in function_modes())


def under_recording() -> bool:
    """True if the call is made inside a function that is being recorded."""
    if dispatch_depth() == 0:
        return False
    return any(isinstance(m, Recorder) for m in dispatch_modes())
