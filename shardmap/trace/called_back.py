"""User-defined functions that torch calls back while a function is recorded."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch.autograd import graph
from torch.utils import checkpoint

from shardmap._torch import pop_saved_hooks, push_saved_hooks, storage_id, without_functions
from shardmap.trace.compare import same_values
from shardmap.trace.equations import Equations
from shardmap.trace.recomputed import Region
from shardmap.trace.recording import element, flat_tensors


class Doors(Protocol):
    """Protocol of what watches a function (`escapes.Doors`)."""

    saved_changed: bool
    saved_copied: bool
    regions: dict[int, Region]

    @property
    def recorder(self) -> Equations:
        """The recorder."""
        ...

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None: ...

    def unrecorded(self, func: Callable[..., object], args: tuple, kwargs: dict) -> object:
        """Run a call that is not recorded."""
        ...


class Watched:
    """A user-defined function that torch calls back, run with the doors watched."""

    def __init__(self, doors: Doors, function: Any):
        self.doors = doors
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with self.doors:
            return self.function(*args, **kwargs)


class Packed(NamedTuple):
    """What a pack hook returned for a tensor that requires grad, and the memory of that."""

    packed: object
    original: torch.Tensor


def noting_copies(
    doors: Doors, unpack: Callable[[object], torch.Tensor]
) -> Callable[[object], torch.Tensor]:
    """An unpack hook that notes if a gradient which may be differentiated again reads a copy.

    Autograd gives the copy the history of what it saved, which no recorded call shows.
    """
    watching = weakref.ref(doors)  # autograd's nodes keep the hook

    def unpacked(held: object) -> torch.Tensor:
        if not isinstance(held, Packed):
            return unpack(held)
        tensor, found = unpack(held.packed), watching()
        if found is not None and torch.is_grad_enabled():
            with without_functions():  # our own reads of memory are no doors
                apart = not same_memory(element(tensor), element(held.original))
            found.saved_copied = found.saved_copied or apart
        return tensor

    return unpacked


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors lie in the same storage."""
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a is b
    return storage_id(a.untyped_storage()) == storage_id(b.untyped_storage())


class Saving(Watched):
    """A user-defined pack hook of saved tensors, unpacked at once to see if the value is the same.

    The map's own backward does not run the hook: outer gradients would not see a change.
    """

    def __init__(
        self,
        doors: Doors,
        pack: Callable[[torch.Tensor], object],
        unpack: Callable[[object], torch.Tensor],
        name: str,
        arguments: tuple[object, ...],
    ):
        super().__init__(doors, pack)
        self.unpack = unpack
        self.arguments = flat_tensors(arguments)
        """The tensors that the call which saves is given, without one that it writes to."""
        if name.endswith("_") and not name.endswith("__"):
            del self.arguments[:1]

    def __call__(self, tensor: torch.Tensor) -> object:
        """Pack a tensor, and see if it is unpacked as the same."""
        module = getattr(self.function, "__module__", "")
        # A node that saves its own result, as that of `exp` does, would be kept alive by what it
        # saves if the hook returns that with its history; python's collector does not see it.
        bare = module == graph.__name__ or not any(tensor is given for given in self.arguments)
        packed = super().__call__(tensor.detach() if bare else tensor)
        if module != checkpoint.__name__:
            with self.doors:
                same = self.doors.unrecorded(self._is_unpacked, (tensor, packed), {})
            self.doors.saved_changed = self.doors.saved_changed or not same
            if tensor.requires_grad:
                return Packed(
                    packed, cast(torch.Tensor, self.doors.unrecorded(tensor.detach, (), {}))
                )
        return packed

    def _is_unpacked(self, tensor: torch.Tensor, packed: object) -> bool:
        return same_values(self.unpack(packed), tensor)


def call_saving(
    doors: Doors,
    hooks: tuple[Callable[[torch.Tensor], object], Callable[[object], torch.Tensor]],
    call: Callable[[], object],
    name: str,
    arguments: tuple[object, ...],
) -> object:
    """Run a call under the user's hooks on what autograd saves, and note what it records.

    Args:
        doors: What watches the function.
        hooks: The hooks.
        call: Runs the call.
        name: The name of what is called.
        arguments: What it is given.
    """
    pack, unpack = hooks
    region = doors.regions.setdefault(id(unpack), Region(unpack))
    equations = doors.recorder.equations
    start = len(equations)
    push_saved_hooks(Saving(doors, pack, unpack, name, arguments), noting_copies(doors, unpack))
    try:
        return call()
    finally:
        pop_saved_hooks()
        region.calls.append(range(start, len(equations)))
