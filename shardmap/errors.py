"""Every error that a user of shardmap can cause, one name each.

Each message carries the call, the argument, its value and the remedy. The classes derive from the
builtin that `torch.func.vmap` raises in the same situation, so that code written for it keeps
working.
"""

from __future__ import annotations


class ShardmapError(Exception):
    """Base of all errors raised on purpose by shardmap."""


class InDimsError(ShardmapError, ValueError):
    """`in_dims` or `kw_in_dims` do not fit the arguments.

    Structure, range, sizes, or nothing mapped.
    """


class OutDimsError(ShardmapError, ValueError):
    """`out_dims` does not fit the outputs."""


class OptionError(ShardmapError, ValueError):
    """An option (`chunk_size`, `randomness`, `trace`, ...) has a value that is not allowed."""


class DeviceError(ShardmapError, ValueError):
    """`devices` names a device that is unknown, absent, or malformed."""


class OutputError(ShardmapError, ValueError):
    """The mapped function returned something that is not a pytree of tensors."""


class TransformError(ShardmapError, ValueError):
    """A function cannot be differentiated in the requested way.

    Its arguments or results, or the named parameters, do not fit.
    """


class EmptyBatchError(ShardmapError, ValueError):
    """The batch is empty and the shape of the result cannot be inferred."""


class CapturedWriteError(ShardmapError, RuntimeError):
    """The mapped function writes in place to a tensor that all samples share."""


class EscapeError(ShardmapError, RuntimeError):
    """A value that differs by sample is read by python without an operator that can be batched."""


class DataDependentError(ShardmapError, RuntimeError):
    """Python control flow in the mapped function depends on a value that differs by sample."""


class RandomnessError(ShardmapError, RuntimeError):
    """The mapped function draws random numbers in a way that `randomness` does not allow."""


class AutogradFunctionError(ShardmapError, RuntimeError):
    """A `torch.autograd.Function` inside the mapped function would lose its own backward."""


class HistoryError(ShardmapError, RuntimeError):
    """A gradient inside the function goes on into what was computed outside of it."""


class UnsupportedOperatorError(ShardmapError, NotImplementedError):
    """No rule batches an operator that the mapped function calls."""


class TorchVersionError(ShardmapError, NotImplementedError):
    """This version of torch lacks a private part that shardmap needs for the call."""


class RuleError(ShardmapError, RuntimeError):
    """A batching rule returned anything else than the batch of results of its operator."""


class StaleRecordingError(ShardmapError, RuntimeError):
    """A value that the recording relied on has changed since."""


class StaleReplayError(ShardmapError, RuntimeError):
    """A function does something else than its recording that calls before have replayed."""


class VariesError(DataDependentError, StaleRecordingError):
    """A shape or value on which the recording relied is another for a later sample."""


class RaggedError(VariesError):
    """Results have shapes that differ by sample, and `ragged` does not allow that."""

    REMEDY = (
        "call the mapped function with ragged='list' or ragged='nested' to get them as they are "
        "(a plan is of results of one shape), or pad them to one shape"
    )
    """The end of its text where results cannot be stacked."""


class MismatchError(ShardmapError, RuntimeError):
    """The replay does not give the function's own results for the recorded sample."""


class MissingExtraError(ShardmapError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


class ConfigError(ShardmapError, ValueError):
    """A run's configuration is wrong: the message names the key, the value and the remedy."""


class OverBudget(ShardmapError, MemoryError):
    """A map needs more memory than its budget; nothing has run."""


class OutOfMemory(ShardmapError, MemoryError):
    """Memory ran out although chunks are as small as they can be."""


class DeviceLostError(ShardmapError, RuntimeError):
    """A device failed, and no other could take over its chunks."""


class SlowLoopWarning(UserWarning):
    """An operator, or the whole function, runs sample by sample because nothing batches it."""


class DeviceLostWarning(UserWarning):
    """A device failed, and the others compute its chunks."""


class ClusterError(ShardmapError, ConnectionError):
    """The Ray cluster cannot be reached, or is not the one that this process has joined."""


class WorkerError(ShardmapError, RuntimeError):
    """A remote worker failed while it computed a chunk."""


class StoreError(ShardmapError, RuntimeError):
    """A store cannot be made, opened, written or read.

    The message names the place, what failed and the remedy.
    """


class StoreMismatchError(StoreError):
    """A stored run is not the one that a call resumes."""


class StoreDamagedError(StoreError):
    """Committed rows differ from what was written: a file is gone, cut short, or changed."""


class SourceError(ShardmapError, ValueError):
    """Samples cannot be read from the given object or path.

    Unknown kind, missing path, columns of unequal length.
    """


class CompileWarning(UserWarning):
    """A program that was to be compiled, or captured as a graph, runs as it is."""
