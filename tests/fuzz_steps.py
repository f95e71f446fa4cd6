"""Steps of a random program that read: each writes one line of python, given what exists so far."""

from __future__ import annotations

from typing import Any

from tests.fuzz_scope import Scope, at_least, step


@step(3)
def view(s: Scope) -> str | None:
    """Another shape for the same elements."""
    v = s.pick()
    if v is None:
        return None
    t = s.tensor(v)
    shapes: list[Any] = [(-1,), tuple(t.shape), (1, *t.shape), (*t.shape, 1)]
    if t.dim() >= 2:
        shapes += [(t.shape[0] * t.shape[1], *t.shape[2:]), (-1, t.shape[-1])]
    if t.dim() and t.shape[-1] % 2 == 0:
        shapes.append((*t.shape[:-1], 2, t.shape[-1] // 2))
    return f"{s.new()} = {v}.{s.rng.choice(('view', 'reshape'))}({s.rng.choice(shapes)})"


@step(4)
def reorder(s: Scope) -> str | None:
    """Transposes and permutations."""
    v = s.pick(at_least(2))
    if v is None:
        return None
    order = list(range(s.tensor(v).dim()))
    s.rng.shuffle(order)
    call = s.rng.choice(
        (
            f"transpose({s.dim(v)}, {s.dim(v)})",
            f"permute({tuple(order)})",
            f"movedim({s.dim(v)}, {s.dim(v)})",
            "mT",
        )
    )
    return f"{s.new()} = {v}.{call}"


@step(4)
def part(s: Scope) -> str | None:
    """Selections and slices."""
    v = s.pick(at_least(1))
    if v is None:
        return None
    d = s.dim(v)
    size = s.tensor(v).shape[d]
    i = s.rng.randrange(-size, size)
    start = s.rng.randrange(size)
    call = s.rng.choice((
        f".select({d}, {i})", f"[{i}]", f"[..., {i}]", "[::2]", "[..., 1:]", f".narrow({d}, "
            f"{start}, {size - start})",
        "[None]", "[..., None]", f"[..., :{max(size - 1, 1)}]", "[:, 0]", "[1:, ..., ::2]",
    ))  # fmt: skip
    return f"{s.new()} = {v}{call}"


@step(2)
def several(s: Scope) -> str | None:
    """Calls that return more than one view."""
    v = s.pick(at_least(1))
    if v is None:
        return None
    d = s.dim(v)
    size = s.tensor(v).shape[d]
    call, count = s.rng.choice((
        (f"{v}.unbind({d})", size), (f"{v}.chunk(2, {d})", 2), (f"torch.split({v}, [1, "
            f"{size - 1}], {d})", 2),
        (f"torch.broadcast_tensors({v}, {s.pick()})", 2), (f"{v}.split(1, {d})", size),
    ))  # fmt: skip
    return f"{', '.join(s.new() for _ in range(count))}, = {call}" if count <= 4 else None


@step(2)
def resize(s: Scope) -> str | None:
    """Expanding, squeezing, diagonals, windows."""
    v = s.pick()
    if v is None:
        return None
    t = s.tensor(v)
    calls = [
        f"expand({(2, *t.shape)})",
        "squeeze()",
        f"unsqueeze({s.rng.randrange(-t.dim() - 1, t.dim() + 1)})",
        "repeat_interleave(2)",
        "contiguous()",
        "clone()",
    ]
    if t.dim():
        calls += [
            f"squeeze({s.dim(v)})",
            f"flip({s.dim(v)})",
            f"roll(1, {s.dim(v)})",
            f"unfold({s.dim(v)}, 2, 1)",
            f"repeat({(2,) * t.dim()})",
            "flatten()",
        ]
    if t.dim() >= 2:
        calls += [
            "diagonal()",
            f"diagonal(1, {s.dim(v)}, {s.dim(v)})",
            "triu()",
            "tril(-1)",
            "flatten(0, 1)",
        ]
    call = s.rng.choice(calls)
    if s.rng.random() < 0.05 and t.numel() >= 2 and t.is_contiguous() and t.storage_offset() == 0:
        call = f"as_strided((2,), ({s.rng.choice((0, 1))},))"
    return f"{s.new()} = {v}.{call}"


UNARY = [
    "torch.tanh({v})", "{v}.sin()", "{v}.cos()", "{v}.clamp(-2, 2).exp()", "{v}.abs().log1p()",
    "({v}.abs() + 0.1).sqrt()",
    "torch.sigmoid({v})",
    "F.relu({v})", "F.gelu({v})", "F.softplus({v})", "{v}.abs()", "-{v}", "{v} ** 2", "1 / "
        "({v}.abs() + 0.5)", "{v}.erf()", "{v}.atan()",
    "{v}.sign()",
    "{v}.floor()", "{v}.round()", "{v}.clamp(-0.5, 0.5)", "{v}.clamp(min=0)", "F.leaky_relu({v})",
    "F.silu({v})", "F.elu({v})",
    "{v}.square()",
    "{v} ** 3", "2 ** {v}.clamp(-3, 3)", "{v}.nan_to_num()", "F.hardtanh({v})", "{v}.trunc()",
    "{v}.frac()", "torch.logical_not({v})",
    "{v}.isfinite()",
    "F.logsigmoid({v})", "F.mish({v})", "F.glu({v})", "F.threshold({v}, 0.1, 0.2)",
    "torch.special.expit({v})", "torch.sinc({v})",
    "F.celu({v})", "F.softsign({v})",
]  # fmt: skip


BINARY = [
    "{a} + {b}", "{a} - {b}", "{a} * {b}", "{a} / ({b}.abs() + 0.5)", "torch.maximum({a}, {b})",
    "torch.minimum({a}, {b})",
    "torch.atan2({a}, {b} + 3)",
    "{a} < {b}", "{a} >= {b}", "{a} == {b}", "{a} != {b}", "torch.where({a} > {b}, {a}, {b})",
    "torch.add({a}, {b}, alpha=2)",
    "torch.logical_and({a}, {b})",
    "torch.logical_xor({a}, {b})", "torch.lerp({a}, {b}, 0.3)", "torch.addcmul({a}, {b}, {b}, "
        "value=0.5)", "torch.hypot({a}, {b} + 2)",
    "torch.rsub({a}, {b})",
    "torch.floor_divide({a}, {b}.abs() + 1)", "torch.fmod({a}, {b}.abs() + 1)", "{a} ^ {b}", "{a} "
        "& {b}", "{a} | {b}",
    "{a}.remainder({b}.abs() + 1)",
    "torch.where({a} > 0, {b}, 0.5)", "torch.where({a} > 0, {b}, {b}.sum())", "torch.where({a} > "
        "0, 1, {b})", "{a}.copysign({b})",
    "torch.xlogy({a}, {b}.abs() + 1)",
    "torch.true_divide({a}, 2) + {b}", "F.mse_loss({a}, {b})", "F.smooth_l1_loss({a}, {b}, "
        "reduction='none')",
    "torch.lerp({a}, {b}, torch.sigmoid({b}))",
    "F.binary_cross_entropy_with_logits({a}, torch.sigmoid({b}))", "torch.addcdiv({a}, {b}, "
        "{b}.abs() + 1)", "F.huber_loss({a}, {b})",
    "torch.clamp({a}, max={b})",
    "F.cosine_similarity({a}, {b}, dim=-1)", "torch.heaviside({a}, {b})", "torch.dist({a}, {b})",
    "torch.nextafter({a}, {b})",
    "torch.fmax({a}, {b})", "F.l1_loss({a}, {b})",
]  # fmt: skip


SCALAR = [
    "{v} + 1.5", "2 - {v}", "{v} * True", "{v} // 2", "{v} * 3", "{v} / 4", "{v} % 3", "{v} > 0",
    "{v} == 1",
    "{v} + torch.tensor(1.5, dtype=torch.float64)",
    "{v} * torch.tensor(2)", "torch.tensor(0.5) - {v}", "torch.where({v} > 0, {v}, "
        "torch.tensor(2.0, dtype=torch.float64))", "{v} + True",
    "{v} - 0.25",
    "torch.tensor([1.0, 2.0]).sum() * {v}", "torch.scalar_tensor(2) * {v}", "torch.full((), 0.5) + "
        "{v}", "{v} * {v}.sum()",
    "{v}.mean() - {v}", "{v}.max() > {v}",
    "torch.maximum({v}, torch.tensor(0.1))", "torch.add({v}, 2, alpha=3)", "torch.pow({v}, 2.0)",
    "torch.clamp({v}, torch.tensor(-1), torch.tensor(1))",
]  # fmt: skip


@step(10)
def unary(s: Scope) -> str | None:
    """One operand."""
    v = s.float() if s.rng.random() < 0.9 else s.pick()
    return None if v is None else f"{s.new()} = {s.rng.choice(UNARY).format(v=v)}"


@step(12)
def binary(s: Scope) -> str | None:
    """Two operands that broadcast, of any dtypes."""
    a = s.pick()
    b = s.like(s.tensor(a).shape) if a else None
    if a is None or b is None:
        return None
    a, b = (b, a) if s.rng.random() < 0.5 else (a, b)
    return f"{s.new()} = {s.rng.choice(BINARY).format(a=a, b=b)}"


@step(6)
def scalar(s: Scope) -> str | None:
    """A tensor and a python number or a zero-dimensional tensor."""
    v = s.pick()
    return None if v is None else f"{s.new()} = {s.rng.choice(SCALAR).format(v=v)}"


@step(5)
def cast(s: Scope) -> str | None:
    """Another dtype; float to bfloat16 less often, so that most programs stay precise."""
    v = s.pick()
    if v is None:
        return None
    call = s.rng.choice((
        "to(torch.float64)", "to(torch.float32)", "double()", "float()", "to(torch.int64)",
        "long()", "int()", "bool()",
        "to(torch.bfloat16)", "half()",
        f"type_as({s.pick()})", f"to({s.pick()})",
    ))  # fmt: skip
    return f"{s.new()} = {v}.{call}"


@step(8)
def reduce(s: Scope) -> str | None:
    """Reductions over one, several or all dimensions."""
    v = s.float() if s.rng.random() < 0.85 else s.pick()
    if v is None:
        return None
    t = s.tensor(v)
    keep = s.rng.choice(("", ", keepdim=True"))
    whole = [
        "sum()",
        "mean()",
        "prod()",
        "amax()",
        "max()",
        "min()",
        "norm()",
        "std()",
        "var()",
        "any()",
        "all()",
        "argmax()",
        "argmin()",
        "logsumexp(())",
        "count_nonzero()",
        "aminmax()[0]",
    ]
    if not t.dim():
        return f"{s.new()} = {v}.{s.rng.choice(whole)}"
    d = s.dim(v)
    one = [
        f"sum({d}{keep})", f"mean({d}{keep})", f"amax({d}{keep})", f"amin({d}{keep})",
        f"max({d}{keep})[0]", f"min({d}{keep})[1]",
        f"argmax({d}{keep})",
        f"logsumexp({d}{keep})", f"norm(2, {d}{keep})", f"prod({d}{keep})", f"any({d}{keep})",
        f"all({d}{keep})",
        f"sum({d}{keep}, dtype=torch.float64)",
        f"norm(1, {d}{keep})", f"count_nonzero({d})", f"nansum({d}{keep})",
    ]  # fmt: skip
    if t.shape[d] > 1:
        one += [
            f"var({d}{keep})",
            f"std({d}, correction=0{keep})",
            f"var({d}, unbiased=False{keep})",
        ]
    scans = [
        f"cumsum({d})",
        f"cumprod({d})",
        f"softmax({d})",
        f"log_softmax({d})",
        f"diff(dim={d})",
        f"cummax({d})[0]",
        f"logcumsumexp({d})",
    ]
    if t.dim() >= 2:
        e = (d + 1) % t.dim() if d >= 0 else (d + 1 + t.dim()) % t.dim()
        pair = (d, e) if (d % t.dim()) != e else (d,)
        one += [
            f"sum({pair}{keep})",
            f"mean({pair}{keep})",
            f"amax({pair}{keep})",
            f"logsumexp({pair}{keep})",
            f"norm(2, {pair}{keep})",
        ]
    return f"{s.new()} = {v}.{s.rng.choice(s.rng.choice((whole, one, one, scans)))}"


@step(1)
def order(s: Scope) -> str | None:
    """Sorting, where the values are far enough apart for one answer."""
    v = s.float(
        lambda t: (
            t.dim() >= 1
            and t.numel() > 1
            and float(t.detach().flatten().double().sort()[0].diff().min()) > 1e-3
        )
    )
    if v is None:
        return None
    d = s.dim(v)
    k = s.rng.randrange(1, s.tensor(v).shape[d] + 1)
    calls = (
        f"sort({d})[0]",
        f"sort({d}, descending=True)[1]",
        f"argsort({d})",
        f"topk({k}, {d})[0]",
        "median()",
        f"median({d})[0]",
        f"kthvalue({k}, {d})[0]",
        "msort()",
    )
    return f"{s.new()} = {v}.{s.rng.choice(calls)}"


@step(3)
def normalise(s: Scope) -> str | None:
    """Softmax and norms of a whole layer."""
    v = s.float(at_least(1))
    if v is None:
        return None
    last = s.tensor(v).shape[-1]
    weight = s.float(lambda t: tuple(t.shape) == (last,) and t.dtype == s.tensor(v).dtype)
    calls = [
        f"F.softmax({v}, -1)",
        f"F.log_softmax({v}, 0)",
        f"F.layer_norm({v}, ({last},))",
        f"F.layer_norm({v}, {tuple(s.tensor(v).shape)})",
        f"F.normalize({v}, dim=-1)",
        f"F.softmin({v}, 0)",
    ]
    if weight:
        calls += [
            f"F.layer_norm({v}, ({last},), {weight}, {weight})",
            f"F.rms_norm({v}, ({last},), {weight})",
        ]
    if s.tensor(v).dim() >= 2:
        calls += [f"F.group_norm({v}[None], 1)[0]", f"F.avg_pool1d({v}.reshape(1, 1, -1), 2)"]
        calls += [f"F.max_pool1d({v}.reshape(1, 1, -1), 2).clone()"]
    if last >= 2 and s.tensor(v).dim() == 1:
        calls.append(f"F.cross_entropy({v}, {v}.argmin())")
    return f"{s.new()} = {s.rng.choice(calls)}"
