"""Rules of the random family: each sample draws by its own index, or all share one draw.

With `randomness="different"` the draw of a sample depends only on the seed, the recorded call and
the sample's index. With `randomness="same"` all samples have the draw that the sample of index 0
would have. Operators without a rule, whose kernels draw as they go, run sample by sample, each with
a seed of its own.
"""

from __future__ import annotations

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
    variables,
)
from shardmap.program.private_generators import PrivateGenerators, takes_generator
from shardmap.rules import philox as draws
from shardmap.rules import torch_draws
from shardmap.rules.fallback import _fill, _split
from shardmap.rules.losses import arguments
from shardmap.rules.lowering import SEED, START, B, Lowering, Seed, V
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
    name = eq.op.name().removeprefix("aten::")
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


_seeding = fork_safe_lock()
"""Held while an operator runs that only torch's default generators can seed."""


def _on_cuda(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def seeded_loop(b: Lowering, eq: Equation, args: tuple, kwargs: dict[str, Any], call: str) -> Any:
    """Run any random operator sample by sample, each with a seeded generator of its own.

    This is the tier below the rules. `call` names the user's call in errors.
    """
    tensors, template, names, symbols, _ = _split(b, args, kwargs)
    op, count, different = eq.op, len(tensors), b.randomness == "different"
    seed_of, number = source(b, eq)
    batched = [v.mapped for v in tensors]
    mapped = different or any(batched)
    outs = list(variables(eq.outs))
    in_place = {v.index for v in eq.inputs()} >= {v.index for v in outs}

    def one(seed: int | TorchDraws, sample: int, rows: Sequence[Any]) -> Any:
        positional, values = _fill(template, tuple(rows))
        named = dict(zip(names, values, strict=True))
        if isinstance(seed, TorchDraws):
            if mapped and not different:
                raise errors.RandomnessError(
                    f"{call}: randomness='same' and {op.name()}, whose draw cannot be shared by "
                    "samples inside another map; draw outside (torch.rand) and pass the numbers "
                    "in, or pass randomness='different'"
                )
            drawing = seed.generator
            positional, values = [
                [drawing if type(v) is GivenGenerator else v for v in given]
                for given in (positional, values)
            ]
            return op(*positional, **dict(zip(names, values, strict=True)))
        own = draws.sample_seed(seed, number, sample if different else 0)
        if takes_generator(op):
            return PrivateGenerators(own).run(op, tuple(positional), named)
        # Only torch's default generators can seed it, and they belong to all threads: one call at a
        # time.
        cuda = {t.device.index for t in rows if _on_cuda(t)}
        with _seeding, torch.random.fork_rng(devices=sorted(cuda)):
            torch.manual_seed(own)
            return op(*positional, **named)

    def random_loop(
        size: int, start: draws.SampleNumbers, seed: int | TorchDraws, *values: Any
    ) -> Any:
        results = []
        for i in range(size):
            rows = [t[i] if m else t for t, m in zip(values[:count], batched, strict=True)]
            results.append(one(seed, draws.number_of(start, i), [*rows, *values[count:]]))
        if in_place:
            return None
        if not mapped:
            return results[0]
        if not results:
            device = values[0].device
            empty = [
                torch.empty((0, *v.spec.shape), dtype=v.spec.dtype, device=device) for v in outs
            ]
            return empty[0] if len(outs) == 1 else tuple(empty)
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results)
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    where = (B, START, seed_of) if mapped else (1, 0, seed_of)
    if in_place:
        b.effect(random_loop, *where, *tensors, *symbols)
        return None
    if len(eq.outs) == 1:
        return b.call(random_loop, *where, *tensors, *symbols, mapped=mapped)
    return b.calls_several(random_loop, len(eq.outs), *where, *tensors, *symbols, mapped=mapped)
