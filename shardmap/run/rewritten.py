"""Refuse a chunk that is computed again where it would not be the same chunk."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError, checkpoint

from shardmap import errors
from shardmap._torch import (
    device_mode,
    dispatch_modes,
    function_modes,
    functorch,
    saved_hooks,
    storage_id,
    version_of,
)


def refusing_changes(call: str, tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Make a function that refuses to go on once one of the tensors has been written or replaced.

    It refuses as well under other modes of the caller's (`TorchDispatchMode`) than now, which
    may change what operators compute.

    Seen are writes by operators, and other memory in a tensor's place (`p.data = v`); writes past
    autograd into the same memory (`p.data.mul_(2)`, numpy) are not.

    Args:
        call: The user's call, for errors.
        tensors: The captured tensors that a chunk reads.
    """
    # The memory is kept, or another tensor's might be made in its place.
    modes = _modes()
    kept = [(t, version_of(t), _memory(t)) for t in tensors if not t.is_inference()]

    def refuse() -> None:
        now = _modes()
        if len(now) != len(modes) or not all(map(operator.is_, now, modes)):
            raise errors.TransformError(
                f"{call}: remat=True computes chunks again in backward, and the modes around that "
                "(TorchDispatchMode, TorchFunctionMode) are not those that were around the call; "
                "take the gradients within the same modes, or pass remat=False"
            )
        for tensor, version, memory in kept:
            if version_of(tensor) != version or not _is(memory, _memory(tensor)):
                raise errors.CapturedWriteError(
                    f"{call}: remat=True computes chunks again in backward, and a captured tensor "
                    f"of shape {tuple(tensor.shape)} has been written or replaced since; take the "
                    "gradients before, or pass remat=False"
                )

    return refuse


def computed_again(
    compute: Callable[..., tuple[torch.Tensor, ...]], inputs: Sequence[torch.Tensor], early: bool
) -> tuple[torch.Tensor, ...]:
    """`compute(*inputs)`, whose intermediates are computed again in backward.

    Args:
        compute: Computes a chunk.
        inputs: Its samples. Those of inference mode cannot be saved, and need not be: no write to
            them is followed.
        early: True to stop once the last intermediate is there again.
    """
    saved = [t for t in inputs if not t.is_inference()]

    runs = 0

    def of_saved(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal runs
        runs += 1
        left = iter(given)
        with _unpacked_twice_by_name() if runs == 1 else contextlib.nullcontext():
            return compute(*[t if t.is_inference() else next(left) for t in inputs])

    return checkpoint(of_saved, *saved, use_reentrant=False, early_stop=early)


@contextlib.contextmanager
def _unpacked_twice_by_name() -> Iterator[None]:
    """Name the error of torch's checkpoint where a second gradient reads an intermediate twice.

    Autograd does so for what was written in place through a view, and torch's checkpoint hands
    each intermediate out once.
    """
    hooks = saved_hooks(False)
    if hooks is None:  # nothing is saved
        yield
        return
    pack, unpack = hooks

    def named(holder: object) -> torch.Tensor:
        try:
            return unpack(holder)
        except CheckpointError as error:
            if "already unpacked once" not in str(error):
                raise
            raise errors.TransformError(
                "remat=True: a gradient of a gradient passes through an intermediate that the "
                "mapped function writes in place through a view, which torch's checkpoint cannot "
                "give back twice; pass remat=False, or write out of place"
            ) from error

    with saved_tensors_hooks(pack, named):
        yield


def _modes() -> list[object]:
    """The modes that are active, without those that say where tensors are made, and our own."""
    active = (*function_modes(), *dispatch_modes())
    return [
        mode
        for mode in active
        if not isinstance(mode, device_mode) and not type(mode).__module__.startswith("shardmap.")
    ]


def _memory(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    wrapped = functorch.is_functorch_wrapped_tensor(tensor)
    return None if wrapped or tensor.layout is not torch.strided else tensor.untyped_storage()


def _is(a: torch.UntypedStorage | None, b: torch.UntypedStorage | None) -> bool:
    return a is b if a is None or b is None else storage_id(a) == storage_id(b)
