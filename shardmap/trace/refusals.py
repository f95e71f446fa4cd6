"""Checks of a recording: writes, seeds, questions and copies that it refuses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from shardmap import errors
from shardmap._torch import NormBase, OpOverload, aten, functorch, schema_of
from shardmap.program.ir import NO_GRAD, Equation, Var
from shardmap.program.operators import OpInfo
from shardmap.program.schema import base_name
from shardmap.trace.generator import Generator
from shardmap.trace.histories import Histories
from shardmap.trace.lifted import Lifted
from shardmap.trace.optimizers import Optimizers
from shardmap.trace.recording import element, flat_tensors, user_line
from shardmap.trace.scalar_index import Copies, Place, is_dense, is_whole_or_apart
from shardmap.trace.tensor_table import Variables
from shardmap.trace.unwritten import Unwritten, python_place


def _running_norm() -> str | None:
    """Name of the running module with running statistics, as in the outermost module; or None."""
    frame, norm, name = sys._getframe(1), None, ""
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_argcount else None
        if norm is None and isinstance(module, NormBase):
            norm = module
        elif norm is not None and isinstance(module, nn.Module) and module is not norm:
            name = next((n for n, m in module.named_modules() if m is norm), name)
        frame = frame.f_back
    if norm is None:
        return None
    return f"{type(norm).__name__}({norm.num_features}){f' {name!r}' if name else ''}"


_SPECTRAL = {
    sys.modules["torch.nn.utils.parametrizations"].__file__,
    sys.modules["torch.nn.utils.spectral_norm"].__file__,
}
"""The files of torch's two spectral norms."""


def _in_spectral_norm() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename in _SPECTRAL:
            return True
        frame = frame.f_back
    return False


def refuse_swaps(call: str, error: Exception) -> None:
    """Refuse `torch.utils.swap_tensors` by name, which refuses tensors that are recorded.

    They have weak references of ours.

    Raises:
        EscapeError: That is what `error` says, or what it was raised from.
    """
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        if str(found).endswith("because it has weakref associated with it"):
            raise errors.EscapeError(
                f"{call}: torch.utils.swap_tensors exchanges what two tensors are, which cannot be "
                "recorded; exchange their names (a, b = b, a), or for the parameters of a module "
                "its attributes (module.weight = other)"
            ) from error
        seen.append(found)
        found = found.__cause__ or found.__context__


class WrittenCopyError(errors.DataDependentError):
    """A copy stands for a view, and the function wrote one of the two and reads the other."""


class Refusals(Histories):
    """The checks of a recording, each with its error."""

    def __init__(self, call: str, outer: Variables | None, once: bool, randomness: str):
        super().__init__(call, outer, once)
        self.randomness = randomness
        self.random = False
        self.torchs_own = False
        """True if the function draws from torch's own generator."""
        self.separate_views = False
        """True if calls that return several views are recorded as a call for each view."""
        self.places_asked = False
        """True if `tensor[index]`, for an index that differs by sample, is a view at the place that
        the sample's index says, and samples are split by the place."""
        self.raised = ""
        """The first error of an operator: if the function still returns, it has caught the
        error."""
        self.written_groups: set[int] = set()
        self.histories: list[torch.Tensor] = []
        """The mapped arguments that have been computed from others, or from which others can be."""
        self.tangents = False
        """True if forward mode around the call differentiates by a mapped argument."""
        self.lifted: Lifted | None = None
        """Tells which tensors require grad in the loop, where samples do so to be recorded."""
        self.differentiated: list[int] = []
        """The addresses of captured tensors by which a gradient is taken inside."""
        self.deep = False
        """True if such a gradient can be differentiated and went into a graph from outside."""
        self.grads_before: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        """Tensors whose `.grad` python has set, with what it was: put back if the call fails."""
        self.optimizers = Optimizers()
        """Optimizers that have taken a step: their state is put back if the call fails."""
        self.frozen: dict[int, tuple[torch.Tensor, bool]] = {}
        """Shared tensors of which `requires_grad` was set inside, each with its value before."""
        self.groups_of_leaves: set[int] = set()
        """Memory of samples whose batch is a leaf: autograd forbids to write to its rows while
        it records."""
        self.generator: Generator | None = None
        """Torch's generator, while the function runs."""
        self.asks_later = False
        """True if a backward that gradients from outside reach asks for values."""
        self.unwritten = Unwritten()
        self.serial = 0
        """Number of calls of torch's python interface so far."""
        self.copies = Copies()

    def is_shared(self, tensor: torch.Tensor) -> bool:
        """True if a tensor is from outside, and the same for all samples."""
        var = self.known(tensor)
        return not self.belongs(tensor) if var is None else var.index in self.captured

    def freeze(self, tensor: torch.Tensor, before: bool) -> None:
        """Note that `requires_grad` of a tensor has been set.

        Args:
            tensor: The tensor.
            before: Its value before.
        """
        if tensor.requires_grad is not before and self.is_shared(tensor):
            self.frozen.setdefault(id(tensor), (tensor, before))

    def refuse_frozen(self, outputs: Iterable[torch.Tensor]) -> None:
        """Refuse gradients from outside past a tensor that did not require grad for a while.

        Raises:
            CapturedWriteError: A shared tensor was frozen or released inside, and put back.
        """
        back = [t for t, before in self.frozen.values() if t.requires_grad is before]
        self.frozen.clear()
        if back and any(t.requires_grad for t in outputs):
            raise errors.CapturedWriteError(
                f"{self.call}: the function sets requires_grad of a tensor of shape "
                f"{tuple(back[0].shape)} that all samples share and puts it back, which gradients "
                "from outside would not see; use what is detached instead, such as "
                "torch.func.functional_call(module, {name: p.detach() for name, p in "
                "module.named_parameters()}, x)"
            )

    def _refuse_write(self, op: OpOverload, tensor: torch.Tensor) -> None:
        var = self.known(tensor) or self._capture(tensor)
        if var.group not in self.captured_groups:
            self.written_groups.add(var.group)
            forbids = tensor.requires_grad and torch.is_grad_enabled()
            if var.group in self.groups_of_leaves and forbids:  # autograd, of a row of a leaf
                raise RuntimeError(
                    "a view of a leaf Variable that requires grad is being used in an in-place "
                    "operation."
                )
            return
        name = base_name(op)
        norm = _running_norm()
        if name == "embedding_renorm_":
            raise errors.CapturedWriteError(
                f"{self.call}: an embedding with max_norm scales rows of its table of shape "
                f"{tuple(tensor.shape)}, which all samples share; scale the table before the call "
                "(torch.renorm), or the rows that were looked up"
            )
        if "fused_moving_avg_obs" in name:
            raise errors.CapturedWriteError(
                f"{self.call}: a fused fake quantisation would set ranges and scales of shape "
                f"{tuple(tensor.shape)} that all samples share, with its observer switched off "
                "too; build the model with separate parts "
                "(torch.ao.quantization.get_default_qat_qconfig(version=0)), let it observe "
                "before the map, and switch its observers off (model.apply(torch.ao."
                "quantization.disable_observer))"
            )
        if _in_spectral_norm():
            raise errors.CapturedWriteError(
                f"{self.call}: spectral_norm in training mode would update a vector of shape "
                f"{tuple(tensor.shape)} that all samples share, sample after sample; call .eval() "
                "on the module, which leaves its vectors as they are, after a forward pass in "
                "training mode outside of the map where they are to be updated"
            )
        if "norm" in name or norm is not None:
            raise errors.CapturedWriteError(
                f"{self.call}: {norm or name} in training mode would update running statistics of "
                f"shape {tuple(tensor.shape)} that all samples share; pass batch_norm='per_sample' "
                "(each sample's own statistics; the running ones are left alone) or 'frozen' (the "
                "running ones, as in evaluation), call .eval() on the model, or use "
                "track_running_stats=False, or GroupNorm "
                "(torch.func.replace_all_batch_norm_modules_)"
            )
        raise errors.CapturedWriteError(
            f"{self.call}: {name} would write in place to a tensor of shape {tuple(tensor.shape)} "
            "that all samples share "
            "(captured, or an argument "
            "with in_dim None); the loop would write to it once per sample: return the value "
            "instead, or clone the tensor inside "
            "the function"
        )

    def _check_writes(self, func: OpOverload, value: Any) -> None:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, torch.Tensor):
                self._refuse_write(func, tensor)
                if self.copies.pairs:
                    pointwise = torch.Tag.pointwise in func.tags or func is aten.copy_.default
                    self._written_beside_copies(tensor, pointwise)

    def _wrote(self, func: OpOverload, writes: tuple) -> None:
        for tensor in flat_tensors(writes):
            var = self.known(tensor)
            if var is not None and var.group in self.exposed:
                self.exposed.renew(var.group, tensor)
            if var is not None and tensor.shape != var.spec.shape:
                raise errors.EscapeError(
                    f"{self.call}: {schema_of(func).name.partition('::')[2]} gave its output, of "
                    f"shape {tuple(var.spec.shape)}, the shape "
                    f"{tuple(tensor.shape)}, at {user_line()}; pass an `out` of the result's "
                    "shape, or none"
                )

    def note_grad(self, tensor: torch.Tensor) -> None:
        """Keep the `.grad` of a tensor that python is about to set, if it was there before."""
        own = element(tensor)
        var = self.known(own)
        if self.belongs(own) or (var is not None and var.index not in self.captured):
            return  # made inside: it must die with the recording
        if not any(known is tensor for known, _ in self.grads_before):
            self.grads_before.append((tensor, tensor.grad))

    def copied(self, source: torch.Tensor, copy: torch.Tensor, indices: tuple[Any, ...]) -> None:
        """Record that `copy` replaces the view `source[indices]`, whose place differs by sample."""
        of, own = self.known(source) or self._capture(source), self.known(copy)
        assert own is not None
        self.copies.add(of.group, own.group, indices, is_dense(of.spec.shape, of.spec.stride))

    def put_back(
        self,
        source: torch.Tensor,
        value: torch.Tensor,
        indices: tuple[Any, ...],
        at: list[Place],
        put: Callable[[bool], object],
    ) -> None:
        """Run `put`, which performs `source[indices] = value`, with a clone if given True.

        `value` may be a copy that was taken there, or a view of the memory that is written.
        """
        plain, given = element(source), element(value)
        of, own = self.known(plain), self.known(given)
        if of is None or own is None:
            put(False)
            return
        shared = of.group == own.group
        if shared:
            paused, self.paused = self.paused, True
            try:
                # Those of an inner map have one dimension more, so that the indices are for others.
                apart = plain.dim() == source.dim() and given.dim() == value.dim()
                apart = apart and is_whole_or_apart(plain, indices, at, given)
            finally:
                self.paused = paused
            if not apart:
                raise self._written_copy()
        self.copies.put_back(of.group, own.group, indices, lambda: put(shared))

    def _written_beside_copies(self, tensor: torch.Tensor, pointwise: bool) -> None:
        var = self.known(tensor)
        if var is not None and any(
            group in self.captured_groups
            for group in self.copies.written(var.group, len(self.equations), pointwise)
        ):
            raise errors.CapturedWriteError(
                f"{self.call}: an in-place write to `tensor[index]` would reach a tensor that all "
                "samples share, at "
                f"{user_line()}; clone what "
                "was indexed first"
            )

    def _check_stale(self, read: Iterable[Var]) -> None:
        for var in read:
            if self.copies.stale.get(var.group, math.inf) <= len(self.equations):
                raise self._written_copy()

    def _written_copy(self) -> WrittenCopyError:
        return WrittenCopyError(
            f"{self.call}: a tensor was indexed with a tensor that differs by sample, then one of "
            f"the two was written in place and the other is used, at {user_line()}; clone what was "
            "indexed, or write with tensor[index] = value"
        )

    def _unwritten(
        self,
        info: OpInfo,
        args: tuple,
        kwargs: dict[str, Any],
        encoded: Any,
        named: Any,
        writes: Any,
    ) -> tuple[list[Var], set[int]]:
        """The variables that a call reads and no recorded call wrote, and groups that it writes."""
        overwritten = {v.group for v in map(self.known, flat_tensors(writes)) if v is not None}
        if not self.unwritten.groups:
            return [], overwritten
        read = self.unwritten.read(info, encoded, named, overwritten)
        for var in self.unwritten.constants(read, python_place(self.serial, 5)) if read else ():
            tensor = next(
                t for t in flat_tensors((*args, *kwargs.values())) if self.known(t) is var
            )
            if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
                literal = self._constant(tensor)
                write = (var, literal)
                flags = (NO_GRAD, NO_GRAD)
                self._append(Equation(aten.copy_.default, write, (), (var,), flags, False))
                self.unwritten.written((var.group,))
        read = [v for v in read if v.group in self.unwritten.groups]
        if read and (info.question or not schema_of(info.op).returns):
            raise errors.EscapeError(self._unwritten_text(schema_of(info.op).name))
        return read, overwritten

    def _unwritten_text(self, name: str) -> str:
        return (
            f"{self.call}: {name.partition('::')[2]} reads memory that torch.empty made and that "
            f"no recorded operator has written, at {user_line()}; fill it with torch operators "
            "(numpy and data_ptr writes cannot be followed), or use torch.zeros"
        )

    def _refuse_unwritten(self, outputs: tuple[Var, ...]) -> None:
        kept = {v.group for v in (*outputs, *self.inputs) if 0 not in v.spec.shape}
        for group in kept & self.unwritten.groups.keys():
            by = self.unwritten.groups[group]
            raise errors.EscapeError(
                f"{self.call}: a result depends on memory that torch.empty made and that no "
                f"recorded operator has written{f' (read by {by})' if by else ''}; fill it with "
                "torch operators (numpy and data_ptr writes cannot be followed), or use "
                "torch.zeros"
            )

    def _check_random(self, func: OpOverload) -> None:
        name = base_name(func)
        if self.randomness == "error":
            raise errors.RandomnessError(
                f"{self.call}: {name} draws random numbers and randomness is 'error'; pass "
                "randomness='different' (each sample its own draw) or 'same' (one draw for all), "
                "or switch the random layer off (model.eval())"
            )

    def refuse_seeds(self) -> None:
        """Refuse a seed set after the last draw: the next sample's draws would start from it."""
        self.given.refuse_seeds()
        generator, self.generator = self.generator, None
        if generator is not None and generator.drawn and not generator.is_as_left():
            raise errors.RandomnessError(self._seeded())

    def refuse_state(self, tensor: torch.Tensor) -> None:
        """Refuse what the state of torch's generator, or of a given one, tells the function.

        A checkpoint and `fork_rng` only give it back.
        """
        if type(tensor) is not torch.Tensor or functorch.is_functorch_wrapped_tensor(tensor):
            return
        own = self.generator is not None and self.generator.gave(tensor)
        if own or self.given.gave(tensor):
            what = "torch's generator (torch.get_rng_state)" if own else "a torch.Generator"
            raise errors.EscapeError(
                f"{self.call}: the function reads the state of {what}, which in the loop each "
                "sample finds as the one before has left it; read it outside of the function and "
                "pass it in as an argument"
            )

    def _seeded(self) -> str:
        return (
            f"{self.call}: the function sets the state of torch's generator (torch.manual_seed, "
            "torch.random.fork_rng, or a checkpoint that draws random numbers), which would give "
            f"every sample the same numbers, at {user_line()}; set the seed before the call, and "
            "pass randomness='same' (one draw for all samples) or 'different' (each its own); for "
            "checkpoints, leave dropout out of the checkpointed part, or do not checkpoint inside "
            "the map"
        )

    def _refuse_no_value(self, answer: object) -> None:
        """Refuse to read a fake tensor, which holds no value."""
        if isinstance(answer, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise errors.DataDependentError(
                f"{self.call}: python asks for a value that is not known while the call is traced "
                f"(make_fx, torch.export), at {user_line()}; use torch.where, masks or comparisons "
                "that return tensors, or call the map outside of what is traced"
            )


MOST_QUESTIONS_OF_NONE = 1000
"""Most questions about a sample of zeros, which stands for an empty batch. On zeros a loop that
ends for every sample may never end (`while a != 1: a = step(a)`); one that goes on for longer than
the adaptive solvers and decoders that are mapped (some hundreds) is held to be such a loop."""


class QuestionsOfNone(list[int]):
    """The numbers of the equations that ask about a sample of zeros: a bounded number.

    Args:
        call: The user's call, for errors.
    """

    def __init__(self, call: str):
        super().__init__()
        self._call = call
        self._count = 0

    def append(self, number: int) -> None:
        """Add one.

        Raises:
            EmptyBatchError: There are too many.
        """
        self._count += 1
        if self._count > MOST_QUESTIONS_OF_NONE:
            raise errors.EmptyBatchError(
                f"{self._call}: the batch is empty, and on a sample of zeros python asked for more "
                f"than {MOST_QUESTIONS_OF_NONE:,} values (the last at {user_line()}), so the shape "
                "of the result cannot be inferred; skip the call when there are no samples"
            )
        super().append(number)


OF_KEYS = {
    torch.Tensor.is_conj, torch.Tensor.is_neg, torch.Tensor.is_inference,
    torch.is_conj, torch.is_neg, torch.is_inference,
}  # fmt: skip
"""Questions that a sample may answer otherwise than a row: it is a plain tensor."""


def another_of_rows(call: str, asked: str, lazily: str) -> errors.EscapeError:
    """The error for such a question where rows are no plain tensors."""
    return errors.EscapeError(
        f"{call}: the function asks {asked}() of a sample, and the batch {lazily}"
    )
