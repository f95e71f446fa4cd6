"""Refuse a chunk that is computed again where it would not be the same chunk."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.autograd import graph
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
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
    why_saved_hooks_are_refused,
)
from shardmap.trace.saved_hooks import also_through, changing_hooks, saved_hooks_set_aside


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


class Recomputation:
    """Computes the chunks of a lane so that their intermediates are computed again in backward.

    It does so by hooks on what autograd saves. A function that is itself run for each sample may
    forbid them, as `torch.func.grad` does: then chunks keep their intermediates.
    """

    def __init__(self, call: str) -> None:
        self.call = call
        self.kept = False
        """True once a chunk has forbidden hooks."""

    def chunk(
        self,
        compute: Callable[..., tuple[torch.Tensor, ...]],
        inputs: Sequence[torch.Tensor],
        early: bool,
    ) -> tuple[torch.Tensor, ...]:
        """`compute(*inputs)`, whose intermediates are computed again in backward.

        Args:
            compute: Computes a chunk.
            inputs: Its samples. Those of inference mode cannot be saved, and need not be: no write
                to them is followed.
            early: True to stop once the last intermediate is there again.

        Raises:
            TransformError: Hooks on what autograd saves are forbidden around the call, or torch's
                mode that lets saved tensors be written, which confuses recomputed chunks.
        """
        if any(type(mode).__module__ == graph.__name__ for mode in dispatch_modes()):
            raise errors.TransformError(
                f"{self.call}: remat=True computes chunks again by torch.utils.checkpoint, whose "
                "gradients are wrong under torch.autograd.graph.allow_mutation_on_saved_tensors if "
                "there are several; pass remat=False"
            )
        why = why_saved_hooks_are_refused()
        if why is not None:
            raise errors.TransformError(
                f"{self.call}: remat=True needs hooks on what autograd saves, and they are "
                f"forbidden around the call (disable_saved_tensors_hooks: {why!r}); pass "
                "remat=False, or call the map outside"
            )
        if not self.kept:
            try:
                return _computed_again(compute, inputs, early)
            except RuntimeError as error:
                if not _forbids_hooks(error):
                    raise
            self.kept = True
        return compute(*inputs)


def _computed_again(
    compute: Callable[..., tuple[torch.Tensor, ...]], inputs: Sequence[torch.Tensor], early: bool
) -> tuple[torch.Tensor, ...]:
    saved = [t for t in inputs if not t.is_inference()]
    around, unpacked, runs = changing_hooks(), _Unpacked(), 0

    def of_saved(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal runs
        runs += 1
        left = iter(given)
        within = unpacked.first() if runs == 1 else unpacked.again()
        with within, also_through(around) if around else contextlib.nullcontext():
            return compute(*[t if t.is_inference() else next(left) for t in inputs])

    # The hooks are for what the chunk saves, not for the samples that it is computed from again.
    with saved_hooks_set_aside() if around else contextlib.nullcontext():
        return checkpoint(of_saved, *saved, use_reentrant=False, early_stop=early)


def _forbids_hooks(error: RuntimeError) -> bool:
    """True if an error is torch's for hooks that are forbidden while some are active."""
    trace, frame = error.__traceback__, None
    while trace is not None:
        trace, frame = trace.tb_next, trace.tb_frame
    return frame is not None and frame.f_code is _FORBIDDING


_FORBIDDING = inspect.unwrap(disable_saved_tensors_hooks).__code__


class _Unpacked:
    """Refuses intermediates that torch's checkpoint cannot give back, or gives back changed."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        """The place of each intermediate in the order in which they are saved, by what stands for
        it in autograd's graph."""
        self._versions: list[int | None] = []
        """The version of each when it was computed again: writes to it count up."""

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Within, what the chunk saves is looked at when a gradient reads it."""
        hooks = saved_hooks(False)
        if hooks is None:  # nothing is saved
            yield
            return
        pack, unpack = hooks
        places = itertools.count()

        @functools.wraps(pack)  # by its module it is known as a checkpoint's (`saved_hooks`)
        def placed(tensor: torch.Tensor) -> object:
            holder = pack(tensor)
            self._places[id(holder)] = next(places)  # one that is gone may have had its address
            return holder

        def looked_at(holder: object) -> torch.Tensor:
            try:
                tensor = unpack(holder)
            except CheckpointError as error:
                if "already unpacked once" not in str(error):
                    raise
                raise errors.TransformError(
                    "remat=True: a gradient of a gradient passes through an intermediate that the "
                    "mapped function writes in place through a view, which torch's checkpoint "
                    "cannot give back twice; pass remat=False, or write out of place"
                ) from error
            place = self._places[id(holder)]
            before = self._versions[place] if place < len(self._versions) else None
            if before is not None and version_of(tensor) != before:
                raise errors.TransformError(
                    "remat=True: the gradient needs an intermediate of shape "
                    f"{tuple(tensor.shape)} that the mapped function has written in place since "
                    "autograd saved it; write out of place, or clone what is written"
                )
            return tensor

        with saved_tensors_hooks(placed, looked_at):
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within, the chunk is computed again."""
        hooks = saved_hooks(False)
        if hooks is None:
            yield
            return
        pack, unpack = hooks
        self._versions.clear()

        @functools.wraps(pack)
        def counted(tensor: torch.Tensor) -> object:
            self._versions.append(None if tensor.is_inference() else version_of(tensor))
            return pack(tensor)

        with saved_tensors_hooks(counted, unpack):
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
