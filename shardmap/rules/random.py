"""Rules of the random family: each sample draws by its own index, or all share one draw.

With `randomness="different"` the draw of a sample depends only on the seed, the recorded call and
the sample's index. With `randomness="same"` all samples have the draw that the sample of index 0
would have. Operators without a rule, whose kernels draw as they go, run sample by sample, each with
a seed of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from shardmap import errors
from shardmap._threads import fork_safe_lock
from shardmap._torch import aten, schema_of
from shardmap.program.ir import (
    GRAD,
    SAMPLE_DEVICE,
    Equation,
    GivenGenerator,
    Spec,
    generator_of,
)
from shardmap.program.private_generators import PrivateGenerators, takes_generator
from shardmap.program.schema import short_name
from shardmap.rules import philox as draws
from shardmap.rules import torch_draws
from shardmap.rules.fallback import emit_loop, writes_only
from shardmap.rules.loop_results import Results
from shardmap.rules.lowering import SEED, START, B, Lowering, Seed, V, arguments, values
from shardmap.rules.operator_loop import Arguments, OperatorLoop, row_calls
from shardmap.rules.philox import TorchDraws
from shardmap.rules.promote import aligned
from shardmap.rules.registry import overloads, register


def source(b: Lowering, eq: Equation) -> tuple[Seed, int]:
    """The source of a call's draws: a seed, and a number of the call's own.

    Calls that draw have a numbering of their own: transforms around the map change which other
    calls are recorded.
    """
    given = generator_of(eq.args, eq.kwargs)
    return (SEED, b.drawn) if given is None else (Seed(given.number + 1), given.draw)


def drawn(
    function: draws.Draw,
    size: int,
    start: draws.SampleNumbers,
    seed: int | TorchDraws,
    number: int,
    *rest: Any,
) -> torch.Tensor:
    """Draw by `function` on the stream of these samples, or by torch."""
    if isinstance(seed, TorchDraws):
        return torch_draws.drawn(function, size, seed.generator, *rest)
    return function(draws.Stream(size, start, seed, number), *rest)


def draw(
    b: Lowering,
    eq: Equation,
    function: draws.Draw,
    spec: Spec,
    dtype: torch.dtype,
    *parameters: Any,
) -> V:
    """Emit a draw of `spec.shape` for each sample, or one for all samples."""
    device = SAMPLE_DEVICE if spec.device == b.sample_device else torch.device(spec.device)
    rest = (function, B, START, *source(b, eq), list(spec.shape), dtype, device, *parameters)
    if b.randomness == "different":
        return b.call(drawn, *rest, shape=spec.shape, dtype=dtype, mapped=True)
    rest = (function, 1, 0, *rest[3:])
    one = b.call(drawn, *rest, shape=(1, *spec.shape), dtype=dtype, mapped=False)
    return b.call(aten.select.int, one, 0, 0, shape=spec.shape, dtype=dtype)


def _uniform(a: dict[str, Any]) -> tuple[Any, ...] | None:
    return (draws.uniform, float(a.get("from", 0.0)), float(a.get("to", 1.0)))


def _normal(a: dict[str, Any]) -> tuple[Any, ...] | None:
    return (draws.normal, float(a.get("mean", 0.0)), float(a.get("std", 1.0)))


def _integers(a: dict[str, Any]) -> tuple[Any, ...] | None:
    low, high = a.get("low", a.get("from", 0)), a.get("high", a.get("to"))
    if type(low) is not int or type(high) is not int or high - low >= 2**48:
        return None
    return (draws.integers, low, high)


_DRAWS: dict[str, Any] = {
    "rand": _uniform,
    "rand_like": _uniform,
    "uniform_": _uniform,
    "uniform": _uniform,
    "randn": _normal,
    "randn_like": _normal,
    "normal_": _normal,
    "normal_functional": _normal,
    "normal.float_float": _normal,
    "randint": _integers,
    "randint.low": _integers,
    "randint_like": _integers,
    "randint_like.low_dtype": _integers,
    "random_.to": _integers,
    "random_.from": _integers,
    "randperm": lambda a: (draws.permutation,),
    "bernoulli_.float": lambda a: (draws.bernoulli, float(a["p"])),
    "bernoulli.p": lambda a: (draws.bernoulli, float(a["p"])),
    "exponential_": lambda a: (draws.exponential, float(a["lambd"])),
    "exponential": lambda a: (draws.exponential, float(a["lambd"])),
    "log_normal_": lambda a: (draws.log_normal, float(a["mean"]), float(a["std"])),
    "cauchy_": lambda a: (draws.cauchy, float(a["median"]), float(a["sigma"])),
    "geometric_": lambda a: (draws.geometric, float(a["p"])),
}
"""For each operator with fixed parameters: the draw and its parameters, or None if only the loop
serves it."""

_DRAWS |= {
    f"{name}{'_' if '.' in name else '.'}generator": _DRAWS[name]
    for name in ("rand", "rand_like", "randn", "randn_like", "randint", "randint.low", "randperm")
}
_DRAWS |= {
    "randint_like.generator": _integers,
    "randint_like.low_generator_dtype": _integers,
}


@register("random", *overloads(*_DRAWS))
def plain(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch draws whose parameters are numbers."""
    name = short_name(eq.op)
    chosen = _DRAWS[name](arguments(eq, args, kwargs))
    if chosen is None:
        return NotImplemented
    function, *parameters = chosen
    spec = next(eq.results()).spec
    # What is written in place is converted as it is written.
    bits = function is draws.bernoulli and schema_of(eq.op).is_mutable
    out = draw(b, eq, function, spec, torch.bool if bits else spec.dtype, *parameters)
    if not schema_of(eq.op).is_mutable:
        return out
    b.call(aten.copy_.default, args[0], out)
    return None


def _nothing_of(t: torch.Tensor) -> torch.Tensor:
    """Zeros that follow from `t`, whatever it holds."""
    return torch.where(torch.zeros((), dtype=torch.bool, device=t.device), t, 0)


def _followed(b: Lowering, out: V, *parameters: V) -> V:
    """A draw with gradients of zero to its parameters: they are not missing."""
    for v in parameters:
        nothing = b.cast(b.call(_nothing_of, v), out.dtype)
        out = b.call(
            aten.add.Tensor,
            out,
            aligned(b, nothing, len(out.shape)),
            shape=out.shape,
            dtype=out.dtype,
        )
    return out


@register("random", *overloads("bernoulli", "bernoulli.Tensor", "bernoulli_.Tensor"))
def bernoulli(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch draws with a tensor of probabilities: they are compared with uniform numbers."""
    spec = next(eq.results()).spec
    p = args[0] if len(args) == 1 else args[1]
    uniform = draw(b, eq, draws.uniform, spec, torch.float64, 0.0, 1.0)
    below = b.call(
        aten.lt.Tensor,
        uniform,
        aligned(b, b.cast(p, torch.float64), len(spec.shape)),
        shape=spec.shape,
        dtype=torch.bool,
    )
    out = b.cast(below, spec.dtype)
    if GRAD in eq.flags:
        out = _followed(b, out, p)
    if not schema_of(eq.op).is_mutable:
        return out
    b.call(aten.copy_.default, args[0], out)
    return None


@register(
    "random", *overloads("normal.Tensor_float", "normal.Tensor_Tensor", "normal.float_Tensor")
)
def normal(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch draws with a tensor as mean or standard deviation.

    Standard normal numbers, one for each element, are scaled and shifted.
    """
    named = arguments(eq, args, kwargs)
    spec = eq.outs[0].spec
    if spec.dtype.is_complex:
        return NotImplemented
    out = draw(b, eq, draws.normal, spec, spec.dtype, 0.0, 1.0)
    given = [v for v in (named["std"], named["mean"]) if type(v) is V]
    for op, parameter in ((aten.mul, named["std"]), (aten.add, named["mean"])):
        if type(parameter) is V:
            parameter = b.call(torch.Tensor.detach, parameter)
            out = b.call(
                op.Tensor,
                out,
                aligned(b, b.cast(parameter, spec.dtype), len(spec.shape)),
                shape=spec.shape,
                dtype=spec.dtype,
            )
        else:
            out = b.call(op.Scalar, out, parameter, shape=spec.shape, dtype=spec.dtype)
    return _followed(b, out, *given) if GRAD in eq.flags else out


@register("random", aten.native_dropout.default)
def native_dropout(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch dropout and its mask."""
    x, p, train = args
    spec = eq.outs[1].spec
    if train is False or p == 0:
        return b.call(aten.clone.default, x), b.call(
            torch.ones_like, x, named={"dtype": torch.bool}
        )
    mask = draw(b, eq, draws.bernoulli, spec, spec.dtype, 1.0 - p)
    kept = b.call(aten.mul.Tensor, x, mask, shape=x.shape, dtype=x.dtype)
    return b.call(aten.mul.Scalar, kept, 1.0 / (1.0 - p) if p < 1 else 0.0), mask


@register("random", *overloads("rrelu_with_noise", "rrelu_with_noise_"))
def rrelu(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch `rrelu`: numbers that are not positive are multiplied by a slope of their own."""
    a = arguments(eq, args, kwargs)
    x, low, high = a["self"], a["lower"], a["upper"]
    if a["training"]:
        spec = eq.args[0].spec
        drawn_slope = draw(b, eq, draws.uniform, spec, spec.dtype, float(low), float(high))
        positive = b.call(aten.gt.Scalar, x, 0, shape=x.shape, dtype=torch.bool)
        one = b.call(torch.ones_like, drawn_slope)
        slope = b.call(aten.where.self, positive, one, drawn_slope, shape=x.shape, dtype=x.dtype)
        b.call(aten.copy_.default, a["noise"], slope)
        out = b.call(aten.mul.Tensor, x, slope, shape=x.shape, dtype=x.dtype)
    else:
        out = b.call(aten.leaky_relu.default, x, (low + high) / 2, shape=x.shape, dtype=x.dtype)
    if eq.op is aten.rrelu_with_noise.default:
        return out
    b.call(aten.copy_.default, x, out)
    return None


@register("random", aten.multinomial.default)
def multinomial(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Batch `multinomial`.

    Without replacement, or for one draw, the categories are those whose probabilities, divided by
    exponential numbers, are largest, as in torch; with it, uniform numbers are searched in sums of
    probabilities.
    """
    a = arguments(eq, args, kwargs)
    p, count, spec = a["self"], a["num_samples"], eq.outs[0].spec
    p = b.call(distribution, p, shape=p.shape, dtype=torch.float64)
    if count == 1 or not a["replacement"]:
        waits = draw(b, eq, draws.exponential, eq.args[0].spec, torch.float64, 1.0)
        return b.call(first_to_arrive, p, waits, count, shape=spec.shape, dtype=spec.dtype)
    uniform = draw(b, eq, draws.uniform, spec, torch.float64, 0.0, 1.0)
    return b.call(category_of, p, uniform, shape=spec.shape, dtype=spec.dtype)


def distribution(p: torch.Tensor) -> torch.Tensor:
    """Probabilities in double precision, checked as torch does."""
    p = p.detach().to(torch.float64)
    if not bool((p.isfinite() & (p >= 0)).all()):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    if not bool((p.sum(-1) > 0).all()):
        raise RuntimeError("invalid multinomial distribution (sum of probabilities <= 0)")
    return p


def first_to_arrive(p: torch.Tensor, waits: torch.Tensor, count: int) -> torch.Tensor:
    """The categories of the `count` shortest waits, which are divided by the probabilities."""
    p, waits = torch.broadcast_tensors(p, waits)
    return (p / waits).topk(count, -1).indices


def category_of(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The category of each uniform number: `[..., n], [..., count] -> [..., count]`."""
    sums = p.cumsum(-1)
    sums = sums / sums[..., -1:]
    leading = torch.broadcast_shapes(sums.shape[:-1], uniform.shape[:-1])
    sums = sums.expand(*leading, sums.shape[-1]).contiguous()
    uniform = uniform.expand(*leading, uniform.shape[-1]).contiguous()
    return torch.searchsorted(sums, uniform, right=True)


class _Drawing:
    """Function that calls a random operator for one sample, by a generator of the sample's own."""

    def __init__(self, b: Lowering, eq: Equation, mapped: bool, call: str):
        self.op = eq.op
        self.different = b.randomness == "different"
        self.mapped = mapped
        self.number = source(b, eq)[1]
        self.call = call

    def __call__(
        self, sample: int, seed: int | TorchDraws, *positional: Any, **named: Any
    ) -> torch.Tensor | Sequence[torch.Tensor] | None:
        """Call the operator for the sample of this number."""
        op = self.op
        if isinstance(seed, TorchDraws):
            if self.mapped and not self.different:
                raise errors.RandomnessError(
                    f"{self.call}: randomness='same' and {op.name()}, whose draw cannot be shared "
                    "by samples inside another map; draw outside (torch.rand) and pass the numbers "
                    "in, or pass randomness='different'"
                )
            drawing = seed.generator
            positional = tuple([drawing if type(v) is GivenGenerator else v for v in positional])
            named = {k: drawing if type(v) is GivenGenerator else v for k, v in named.items()}
            return op(*positional, **named)
        own = draws.sample_seed(seed, self.number, sample if self.different else 0)
        if takes_generator(op):
            return PrivateGenerators(own).run(op, positional, named)
        # only torch's default generators can seed it
        if any(isinstance(t, torch.Tensor) and t.is_cuda for t in positional):
            torch.manual_seed(own)
        else:
            torch.default_generator.manual_seed(own)
        return op(*positional, **named)


class SeededLoop(OperatorLoop):
    """Function that calls a random operator for each sample, or once for all samples."""

    def __init__(
        self, b: Lowering, eq: Equation, given: Arguments, results: Results | None, mapped: bool
    ):
        super().__init__(eq, given, results, b.grad or b.transformed)
        self.mapped = mapped
        self.owns_generators = takes_generator(eq.op)

    def __call__(self, size: int, start: draws.SampleNumbers, *values: Any) -> Any:
        """The results of all samples, each `[B, *shape]`; of one call if they share it."""
        return self.packed(self._drawn(size, start, values, None))

    def into(
        self, size: int, start: draws.SampleNumbers, *values: Any, out: torch.Tensor
    ) -> torch.Tensor:
        """Compute the only result into `out`."""
        self._drawn(size, start, values, [out])
        return out

    def _drawn(
        self,
        size: int,
        start: draws.SampleNumbers,
        values: Sequence[object],
        memory: list[torch.Tensor] | None,
    ) -> Sequence[torch.Tensor]:
        with contextlib.ExitStack() as stack:
            if not self.owns_generators:
                # the default generators belong to all threads: one loop at a time
                cuda = {t.device.index for t in values if isinstance(t, torch.Tensor) and t.is_cuda}
                stack.enter_context(_seeding)
                stack.enter_context(torch.random.fork_rng(devices=sorted(cuda)))
            if self.mapped:
                numbers = range(start, start + size) if isinstance(start, int) else start.tolist()
                return self.run(size, values, memory, numbers)
            found = self.calls([(0,)], *values)
            return [] if self.results is None else self.results.first(found)


_seeding = fork_safe_lock()
"""Held while operators run that only torch's default generators can seed."""


def seeded_loop(
    b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, object], call: str
) -> V | tuple[V, ...] | None:
    """Run any random operator sample by sample, each with a seeded generator of its own.

    This is the tier below the rules. `call` names the user's call in errors.
    """
    tensors = values((args, tuple(kwargs.values())))
    mapped = b.randomness == "different" or any(v.mapped for v in tensors)
    given = row_calls(
        _Drawing(b, eq, mapped, call), [source(b, eq)[0], *args], kwargs, numbered=True
    )
    results = None if writes_only(eq) else Results.of(eq, call)
    loop = SeededLoop(b, eq, given, results, mapped)
    where = (B, START) if mapped else (1, 0)
    return emit_loop(b, loop, given, *where, mapped=mapped)
