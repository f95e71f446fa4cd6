"""The steps that a random program is made of: each writes one line of python, given what exists so far.

A step is a function of a `Scope`; it returns source text, or None where nothing at hand fits it. It need not be careful:
the generator runs each line on every row and takes back those that raise, blow up or return something unusable.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32)

Step = Callable[["Scope"], "str | None"]
STEPS: list[tuple[float, Step]] = []


class Scope:
    """What a step may look at: the tensors of the first row by name, and the dice."""

    def __init__(self, rng: random.Random, env: dict[str, Any], names: list[str], owned: Callable[[str], bool], serial: int) -> None:
        self.rng, self.env, self.names, self.owned, self.serial = rng, env, names, owned, serial
        self.new_names: list[str] = []

    def tensor(self, name: str) -> torch.Tensor:
        """The first row's value."""
        return self.env[name]

    def pick(self, test: Callable[[torch.Tensor], bool] = lambda t: True) -> str | None:
        """A name whose tensor passes `test`, later ones more often."""
        fits = [n for n in self.names if test(self.env[n])]
        return self.rng.choices(fits, [1 + i for i in range(len(fits))])[0] if fits else None

    def float(self, test: Callable[[torch.Tensor], bool] = lambda t: True) -> str | None:
        """A floating-point tensor that passes `test`."""
        return self.pick(lambda t: t.is_floating_point() and test(t))

    def target(self, test: Callable[[torch.Tensor], bool] = lambda t: True) -> str | None:
        """A tensor to write to: made inside the program, hardly ever a mapped input."""
        fits = [n for n in self.names if self.owned(n) and test(self.env[n])]
        return self.rng.choice(fits) if fits else None

    def like(self, shape: torch.Size, test: Callable[[torch.Tensor], bool] = lambda t: True) -> str | None:
        """A tensor that broadcasts to `shape`."""

        def fits(t: torch.Tensor) -> bool:
            try:
                return torch.broadcast_shapes(t.shape, shape) == shape and test(t)
            except RuntimeError:
                return False

        return self.pick(fits)

    def new(self) -> str:
        """A fresh name."""
        name = f"v{self.serial + len(self.new_names)}"
        self.new_names.append(name)
        return name

    def dim(self, name: str) -> int:
        """One of the dimensions, counted from either end."""
        ndim = self.tensor(name).dim()
        return self.rng.randrange(-ndim, ndim)

    def shape(self) -> tuple[int, ...]:
        """A small shape."""
        return tuple(self.rng.choice((1, 2, 3, 4)) for _ in range(self.rng.randrange(4)))


def step(weight: float = 1.0) -> Callable[[Step], Step]:
    """Registers a step with its relative frequency."""

    def register(function: Step) -> Step:
        STEPS.append((weight, function))
        return function

    return register


def is_int(t: torch.Tensor) -> bool:
    """Whether `t` can index."""
    return t.dtype in INTS


def has_dims(n: int) -> Callable[[torch.Tensor], bool]:
    """A test for exactly `n` dimensions."""
    return lambda t: t.dim() == n


def at_least(n: int) -> Callable[[torch.Tensor], bool]:
    """A test for `n` dimensions or more, none empty."""
    return lambda t: t.dim() >= n and t.numel() > 0


# ---------------------------------------------------------------------------------------------- views


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
    call = s.rng.choice((f"transpose({s.dim(v)}, {s.dim(v)})", f"permute({tuple(order)})", f"movedim({s.dim(v)}, {s.dim(v)})", "mT"))
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
        f".select({d}, {i})", f"[{i}]", f"[..., {i}]", "[::2]", "[..., 1:]", f".narrow({d}, {start}, {size - start})",
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
        (f"{v}.unbind({d})", size), (f"{v}.chunk(2, {d})", 2), (f"torch.split({v}, [1, {size - 1}], {d})", 2),
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
    calls = [f"expand({(2, *t.shape)})", "squeeze()", f"unsqueeze({s.rng.randrange(-t.dim() - 1, t.dim() + 1)})", "repeat_interleave(2)", "contiguous()", "clone()"]
    if t.dim():
        calls += [f"squeeze({s.dim(v)})", f"flip({s.dim(v)})", f"roll(1, {s.dim(v)})", f"unfold({s.dim(v)}, 2, 1)", f"repeat({(2,) * t.dim()})", "flatten()"]
    if t.dim() >= 2:
        calls += ["diagonal()", f"diagonal(1, {s.dim(v)}, {s.dim(v)})", "triu()", "tril(-1)", "flatten(0, 1)"]
    call = s.rng.choice(calls)
    if s.rng.random() < 0.05 and t.numel() >= 2 and t.is_contiguous() and t.storage_offset() == 0:
        call = f"as_strided((2,), ({s.rng.choice((0, 1))},))"
    return f"{s.new()} = {v}.{call}"


# ---------------------------------------------------------------------------------------------- elementwise

UNARY = [
    "torch.tanh({v})", "{v}.sin()", "{v}.cos()", "{v}.clamp(-2, 2).exp()", "{v}.abs().log1p()", "({v}.abs() + 0.1).sqrt()", "torch.sigmoid({v})",
    "F.relu({v})", "F.gelu({v})", "F.softplus({v})", "{v}.abs()", "-{v}", "{v} ** 2", "1 / ({v}.abs() + 0.5)", "{v}.erf()", "{v}.atan()", "{v}.sign()",
    "{v}.floor()", "{v}.round()", "{v}.clamp(-0.5, 0.5)", "{v}.clamp(min=0)", "F.leaky_relu({v})", "F.silu({v})", "F.elu({v})", "{v}.square()",
    "{v} ** 3", "2 ** {v}.clamp(-3, 3)", "{v}.nan_to_num()", "F.hardtanh({v})", "{v}.trunc()", "{v}.frac()", "torch.logical_not({v})", "{v}.isfinite()",
    "F.logsigmoid({v})", "F.mish({v})", "F.glu({v})", "F.threshold({v}, 0.1, 0.2)", "torch.special.expit({v})", "torch.sinc({v})", "F.celu({v})", "F.softsign({v})",
]  # fmt: skip
BINARY = [
    "{a} + {b}", "{a} - {b}", "{a} * {b}", "{a} / ({b}.abs() + 0.5)", "torch.maximum({a}, {b})", "torch.minimum({a}, {b})", "torch.atan2({a}, {b} + 3)",
    "{a} < {b}", "{a} >= {b}", "{a} == {b}", "{a} != {b}", "torch.where({a} > {b}, {a}, {b})", "torch.add({a}, {b}, alpha=2)", "torch.logical_and({a}, {b})",
    "torch.logical_xor({a}, {b})", "torch.lerp({a}, {b}, 0.3)", "torch.addcmul({a}, {b}, {b}, value=0.5)", "torch.hypot({a}, {b} + 2)", "torch.rsub({a}, {b})",
    "torch.floor_divide({a}, {b}.abs() + 1)", "torch.fmod({a}, {b}.abs() + 1)", "{a} ^ {b}", "{a} & {b}", "{a} | {b}", "{a}.remainder({b}.abs() + 1)",
    "torch.where({a} > 0, {b}, 0.5)", "torch.where({a} > 0, {b}, {b}.sum())", "torch.where({a} > 0, 1, {b})", "{a}.copysign({b})", "torch.xlogy({a}, {b}.abs() + 1)",
    "torch.true_divide({a}, 2) + {b}", "F.mse_loss({a}, {b})", "F.smooth_l1_loss({a}, {b}, reduction='none')", "torch.lerp({a}, {b}, torch.sigmoid({b}))",
    "F.binary_cross_entropy_with_logits({a}, torch.sigmoid({b}))", "torch.addcdiv({a}, {b}, {b}.abs() + 1)", "F.huber_loss({a}, {b})", "torch.clamp({a}, max={b})",
    "F.cosine_similarity({a}, {b}, dim=-1)", "torch.heaviside({a}, {b})", "torch.dist({a}, {b})", "torch.nextafter({a}, {b})", "torch.fmax({a}, {b})", "F.l1_loss({a}, {b})",
]  # fmt: skip
SCALAR = [
    "{v} + 1.5", "2 - {v}", "{v} * True", "{v} // 2", "{v} * 3", "{v} / 4", "{v} % 3", "{v} > 0", "{v} == 1", "{v} + torch.tensor(1.5, dtype=torch.float64)",
    "{v} * torch.tensor(2)", "torch.tensor(0.5) - {v}", "torch.where({v} > 0, {v}, torch.tensor(2.0, dtype=torch.float64))", "{v} + True", "{v} - 0.25",
    "torch.tensor([1.0, 2.0]).sum() * {v}", "torch.scalar_tensor(2) * {v}", "torch.full((), 0.5) + {v}", "{v} * {v}.sum()", "{v}.mean() - {v}", "{v}.max() > {v}",
    "torch.maximum({v}, torch.tensor(0.1))", "torch.add({v}, 2, alpha=3)", "torch.pow({v}, 2.0)", "torch.clamp({v}, torch.tensor(-1), torch.tensor(1))",
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
        "to(torch.float64)", "to(torch.float32)", "double()", "float()", "to(torch.int64)", "long()", "int()", "bool()", "to(torch.bfloat16)", "half()",
        f"type_as({s.pick()})", f"to({s.pick()})",
    ))  # fmt: skip
    return f"{s.new()} = {v}.{call}"


# ---------------------------------------------------------------------------------------------- reductions and scans


@step(8)
def reduce(s: Scope) -> str | None:
    """Reductions over one, several or all dimensions."""
    v = s.float() if s.rng.random() < 0.85 else s.pick()
    if v is None:
        return None
    t = s.tensor(v)
    keep = s.rng.choice(("", ", keepdim=True"))
    whole = ["sum()", "mean()", "prod()", "amax()", "max()", "min()", "norm()", "std()", "var()", "any()", "all()", "argmax()", "argmin()", "logsumexp(())", "count_nonzero()", "aminmax()[0]"]
    if not t.dim():
        return f"{s.new()} = {v}.{s.rng.choice(whole)}"
    d = s.dim(v)
    one = [
        f"sum({d}{keep})", f"mean({d}{keep})", f"amax({d}{keep})", f"amin({d}{keep})", f"max({d}{keep})[0]", f"min({d}{keep})[1]", f"argmax({d}{keep})",
        f"logsumexp({d}{keep})", f"norm(2, {d}{keep})", f"prod({d}{keep})", f"any({d}{keep})", f"all({d}{keep})", f"sum({d}{keep}, dtype=torch.float64)",
        f"norm(1, {d}{keep})", f"count_nonzero({d})", f"nansum({d}{keep})",
    ]  # fmt: skip
    if t.shape[d] > 1:
        one += [f"var({d}{keep})", f"std({d}, correction=0{keep})", f"var({d}, unbiased=False{keep})"]
    scans = [f"cumsum({d})", f"cumprod({d})", f"softmax({d})", f"log_softmax({d})", f"diff(dim={d})", f"cummax({d})[0]", f"logcumsumexp({d})"]
    if t.dim() >= 2:
        e = (d + 1) % t.dim() if d >= 0 else (d + 1 + t.dim()) % t.dim()
        pair = (d, e) if (d % t.dim()) != e else (d,)
        one += [f"sum({pair}{keep})", f"mean({pair}{keep})", f"amax({pair}{keep})", f"logsumexp({pair}{keep})", f"norm(2, {pair}{keep})"]
    return f"{s.new()} = {v}.{s.rng.choice(s.rng.choice((whole, one, one, scans)))}"


@step(1)
def order(s: Scope) -> str | None:
    """Sorting, where the values are far enough apart for one answer."""
    v = s.float(lambda t: t.dim() >= 1 and t.numel() > 1 and float(t.detach().flatten().double().sort()[0].diff().min()) > 1e-3)
    if v is None:
        return None
    d = s.dim(v)
    k = s.rng.randrange(1, s.tensor(v).shape[d] + 1)
    calls = (f"sort({d})[0]", f"sort({d}, descending=True)[1]", f"argsort({d})", f"topk({k}, {d})[0]", "median()", f"median({d})[0]", f"kthvalue({k}, {d})[0]", f"msort()")  # noqa: F541
    return f"{s.new()} = {v}.{s.rng.choice(calls)}"


@step(3)
def normalise(s: Scope) -> str | None:
    """Softmax and norms of a whole layer."""
    v = s.float(at_least(1))
    if v is None:
        return None
    last = s.tensor(v).shape[-1]
    weight = s.float(lambda t: tuple(t.shape) == (last,) and t.dtype == s.tensor(v).dtype)
    calls = [f"F.softmax({v}, -1)", f"F.log_softmax({v}, 0)", f"F.layer_norm({v}, ({last},))", f"F.layer_norm({v}, {tuple(s.tensor(v).shape)})", f"F.normalize({v}, dim=-1)", f"F.softmin({v}, 0)"]
    if weight:
        calls += [f"F.layer_norm({v}, ({last},), {weight}, {weight})", f"F.rms_norm({v}, ({last},), {weight})"]
    if s.tensor(v).dim() >= 2:
        calls += [f"F.group_norm({v}[None], 1)[0]", f"F.avg_pool1d({v}.reshape(1, 1, -1), 2)", f"F.max_pool1d({v}.reshape(1, 1, -1), 2)"]
    if last >= 2 and s.tensor(v).dim() == 1:
        calls.append(f"F.cross_entropy({v}, {v}.argmin())")
    return f"{s.new()} = {s.rng.choice(calls)}"


# ---------------------------------------------------------------------------------------------- matrices, joins


@step(7)
def matrix(s: Scope) -> str | None:
    """The matmul family."""
    a = s.float(at_least(1))
    if a is None:
        return None
    t = s.tensor(a)
    if t.dim() == 1:
        b = s.float(lambda u: u.dim() in (1, 2) and u.shape[0] == t.shape[0] and u.dtype == t.dtype)
        if b is None:
            return f"{s.new()} = torch.outer({a}, {a})"
        if s.tensor(b).dim() == 1:
            return f"{s.new()} = " + s.rng.choice((f"torch.dot({a}, {b})", f"{a} @ {b}", f"torch.einsum('i,i->', {a}, {b})", f"torch.outer({a}, {b})", f"torch.inner({a}, {b})"))
        return f"{s.new()} = " + s.rng.choice((f"{a} @ {b}", f"{b}.mT.mv({a})", f"torch.einsum('i,ij->j', {a}, {b})", f"F.linear({a}, {b}.mT)"))
    b = s.float(lambda u: u.dim() in (1, 2, 3) and u.shape[-2 if u.dim() > 1 else 0] == t.shape[-1] and u.dtype == t.dtype)
    if b is None:
        return f"{s.new()} = {a} @ {a}.mT"
    u = s.tensor(b)
    calls = [f"{a} @ {b}", f"torch.matmul({a}, {b})"]
    if t.dim() == 2 and u.dim() == 2:
        calls += [f"torch.mm({a}, {b})", f"torch.einsum('ij,jk->ik', {a}, {b})", f"F.linear({a}, {b}.t())", f"torch.addmm({a} @ {b}, {a}, {b}, alpha=0.5)", f"torch.einsum('ij,jk->k', {a}, {b})", f"torch.tensordot({a}, {b}, 1)"]
    if t.dim() == 3 and u.dim() == 3:
        calls += [f"torch.bmm({a}, {b})", f"torch.einsum('bij,bjk->bik', {a}, {b})", f"torch.baddbmm({a} @ {b}, {a}, {b}, beta=2)", f"F.scaled_dot_product_attention({a}, {a}, {a})"]
    if u.dim() == 1:
        calls += [f"{a} @ {b}", f"torch.einsum('...j,j->...', {a}, {b})"]
    if t.dim() == 2 and u.dim() == 1:
        calls += [f"torch.mv({a}, {b})", f"F.linear({b}, {a})", f"torch.addmv({a} @ {b}, {a}, {b})"]
    return f"{s.new()} = {s.rng.choice(calls)}"


@step(4)
def join(s: Scope) -> str | None:
    """Several tensors into one."""
    a = s.pick(at_least(1)) if s.rng.random() < 0.8 else s.pick()
    if a is None:
        return None
    shape = s.tensor(a).shape
    b = s.pick(lambda t: t.shape == shape)
    calls = [f"torch.stack([{a}, {b}])", f"torch.stack([{a}, {b}, {a}], -1)"]
    if shape:
        calls += [f"torch.cat([{a}, {b}], {s.dim(a)})", f"torch.hstack([{a}, {b}])", f"F.pad({a}, (1, 2))", f"torch.cat([{a}, {a}[:1]])", f"F.pad({a}, (0, 1), value=0.5)"]
    return f"{s.new()} = {s.rng.choice(calls)}"


@step(4)
def make(s: Scope) -> str | None:
    """Tensors made inside, that no sample changes yet."""
    v = s.pick()
    if v is None:
        return None
    shape = s.rng.choice((s.shape(), tuple(s.tensor(v).shape)))
    calls = (
        f"torch.zeros({shape})", f"torch.ones({shape})", f"torch.zeros_like({v})", f"{v}.new_zeros({shape})", f"torch.full({shape}, 0.5)", f"torch.arange({s.rng.randrange(1, 5)})",
        f"torch.empty_like({v}).fill_(0.25)", f"{v}.new_full({shape}, 2)", "torch.eye(3)", "torch.tensor([0.5, -1.0, 2.0])", f"torch.zeros({shape}, dtype=torch.float64)", "torch.linspace(0, 1, 4)",
        f"torch.full_like({v}, 1)", f"torch.zeros({shape}, dtype=torch.int64)", f"torch.ones_like({v}, dtype=torch.float64)", f"torch.tensor([[1, 2], [0, 1]])",  # noqa: F541
    )  # fmt: skip
    return f"{s.new()} = {s.rng.choice(calls)}"


# ---------------------------------------------------------------------------------------------- indexing


@step(6)
def index(s: Scope) -> str | None:
    """Reading by index tensors, mapped or not."""
    v = s.pick(at_least(1))
    if v is None:
        return None
    t = s.tensor(v)
    d = s.dim(v)
    size = t.shape[d]
    i = s.pick(lambda u: is_int(u) and u.dim() <= 2)
    at = f"({i} % {size})" if i and s.rng.random() < 0.8 else f"torch.tensor({[s.rng.randrange(size) for _ in range(s.rng.randrange(1, 4))]})"
    first, last = f"({i} % {t.shape[0]})" if i else "torch.tensor([0, 0])", f"({i} % {t.shape[-1]})" if i else "torch.tensor([0])"
    mask = s.like(t.shape, lambda u: u.dtype == torch.bool)
    calls = [
        f"{v}[{first}]", f"{v}[..., {last}]", f"{v}[[0, 0]]", f"{v}.index_select({d}, {at}.flatten())", f"{v}.take({at} % {t.numel()})", f"{v}[{first}, ..., 0]",
        f"{v}.masked_fill({v} > 0, 0.5)", f"F.embedding({first}.long(), {v})", f"{v}.index_fill({d}, {at}.flatten().long(), 1)", f"{v}[None, {first}]",
        f"{v}.index_add({d}, torch.tensor([0]), {v}.narrow({d}, 0, 1))", f"{v}.index_copy({d}, torch.tensor([{size - 1}]), {v}.narrow({d}, 0, 1))",
        f"torch.where({v} > 0)[0].shape[0] * 0 + {v}" if s.rng.random() < 0.02 else f"{v}[-1]",
    ]  # fmt: skip
    if i:
        like = f"torch.ones_like({v}, dtype=torch.int64) * ({i}.flatten()[0].long() % {size})"
        calls += [f"{v}.gather({d}, {like})", f"torch.take_along_dim({v}, {like}, {d})", f"F.one_hot({i}.long() % 4, 4)", f"{v}.scatter({d}, {like}, 0.5)", f"{v}.scatter_add({d}, {like}, {v})", f"{v}.scatter_reduce({d}, {like}, {v}, 'amax')"]
        if t.dim() >= 2:
            calls += [f"{v}[{first}, {first} % {t.shape[1]}]", f"{v}[:, ({i} % {t.shape[1]})]", f"{v}[torch.arange({t.shape[0]}), ({i}.flatten()[:1] % {t.shape[1]})]"]
    if mask:
        calls += [f"{v}.masked_fill({mask}, 0)", f"torch.where({mask}, {v}, 0)", f"{v}.masked_fill(~{mask}, {v}.sum())"]
    return f"{s.new()} = {s.rng.choice(calls)}"


# ---------------------------------------------------------------------------------------------- writing in place


@step(9)
def write(s: Scope) -> str | None:
    """In-place operators on tensors made inside, and on their views."""
    t = s.target()
    if t is None:
        return None
    u = s.tensor(t)
    w = s.like(u.shape)
    calls = [
        f"{t}.add_({w})", f"{t}.mul_({w})", f"{t}.sub_({w}, alpha=0.5)", f"{t}.copy_({w})", f"{t}.zero_()", f"{t}.fill_(0.5)", f"{t}.clamp_(-1, 1)", f"{t}.tanh_()", f"{t} += {w}", f"{t} *= 2",
        f"{t}.masked_fill_({t} > 0, 0.25)", f"{t}.fill_({w}.sum())", f"{t}.addcmul_({t}.detach(), {w}, value=0.5)", f"{t}.neg_()", f"{t}.copy_({w}.flatten()[:1].squeeze())", f"torch.add({t}, {w}, out={t})" if s.rng.random() < 0.1 else f"{t}.relu_()",
        f"{t}.unsqueeze_(0)" if s.rng.random() < 0.2 else f"{t}.mul_(0.5)", f"{t}.where({t} > 0, {w}).add_(1)", f"{t}.pow_(2)", f"{t}.lerp_({w}, 0.5)", f"{t}.div_({w}.abs() + 1)", f"{t}.bernoulli_" if False else f"{t}.sigmoid_()",
    ]  # fmt: skip
    if u.dim() >= 2:
        calls += [f"{t}.t_()" if u.dim() == 2 and s.rng.random() < 0.2 else f"{t}.mT.add_(1)", f"{t}.diagonal().add_(1)", f"{t}.flatten()[0].add_(1)", f"{t}.transpose(0, 1)[0].mul_(3)"]
    return s.rng.choice(calls)


@step(9)
def assign(s: Scope) -> str | None:
    """Assignments to parts by index, slice and mask."""
    t = s.target(at_least(1))
    if t is None:
        return None
    u = s.tensor(t)
    i = s.rng.randrange(-u.shape[0], u.shape[0])
    w0, w = s.like(u[0].shape), s.like(u.shape)
    number = s.pick(is_int)
    at = f"({number} % {u.shape[0]})" if number and s.rng.random() < 0.7 else f"torch.tensor([{s.rng.randrange(u.shape[0])}])"
    calls = [
        f"{t}[{i}] = {w0}", f"{t}[{i}] += {w0}", f"{t}[:1] = {w0}", f"{t}[1:] *= 2", f"{t}[..., 0] = 0.5", f"{t}[:] = {w}", f"{t}[{t} > 0] = 0.25", f"{t}[{at}] = {w0}", f"{t}[{at}] = 1",
        f"{t}.index_add_(0, {at}.flatten()[:1].long(), {t}[:1].clone())", f"{t}.index_fill_(0, {at}.flatten().long(), 0.5)", f"{t}[{i}].copy_({w0})", f"{t}[{i}].fill_(1)", f"{t}[..., -1].add_(1)",
        f"{t}.index_put_(({at},), torch.tensor(1.5).to({t}.dtype), accumulate=True)", f"{t}.scatter_(0, torch.zeros_like({t}, dtype=torch.int64)[:1], {t}[:1].clone())", f"{t}[::2] = {t}[::2].flip(0)",
        f"{t}[{i}], {t}[0] = {t}[0].clone(), {t}[{i}].clone()", f"{t}.select(-1, 0).zero_()", f"{t}.masked_fill_({w} > 0, 1)",
    ]  # fmt: skip
    if u.dim() >= 2:
        calls += [f"{t}[:, 0] = {w0}.flatten()[0]", f"{t}[{i}, 0] = {w0}.sum()", f"{t}[:, {s.rng.randrange(u.shape[1])}] += 1", f"{t}[0, {s.rng.randrange(u.shape[1])}] = {w0}.mean()"]
    return s.rng.choice(calls)


# ---------------------------------------------------------------------------------------------- gradients inside


@step(3)
def cut(s: Scope) -> str | None:
    """Detached copies, some of which require grad anew."""
    v = s.float()
    return None if v is None else f"{s.new()} = {v}.{s.rng.choice(('detach()', 'detach().clone()', 'detach().clone().requires_grad_()', 'detach().requires_grad_()'))}"


@step(4)
def inner_gradient(s: Scope) -> str | None:
    """A gradient taken inside, with its graph kept or not."""
    y, x = s.float(lambda t: t.grad_fn is not None), s.float(lambda t: t.requires_grad)
    if y is None or x is None:
        return None
    how = s.rng.choice(("create_graph=True", "create_graph=True", "retain_graph=True", "retain_graph=True", ""))
    total = s.rng.choice(("{y}.sum()", "{y}.tanh().sum()", "({y} ** 2).mean()", "{y}")).format(y=y)
    extra = f", torch.ones_like({y})" if total == y else ""
    return f"{s.new()}, = torch.autograd.grad({total}, {x}{extra}{', ' + how if how else ''})"


FUNCTIONAL = [
    "torch.func.grad(lambda t: torch.tanh(t * {b}).sum())({a})", "torch.func.vjp(lambda t: t.sin() * {b}, {a})[1](torch.ones_like({a} * {b}))[0]",
    "torch.func.jvp(lambda t: (t * {b}).sin(), ({a},), ({a},))[1]", "torch.func.jacrev(lambda t: (t * {b}).tanh())({a})", "torch.func.jacfwd(lambda t: t.sin() * 2)({a})",
    "torch.func.hessian(lambda t: (t ** 3).sum())({a})", "torch.vmap(lambda t: torch.tanh(t) * 2)({a})", "vmap(lambda t: torch.tanh(t).sum())({a})", "vmap(lambda t: t * {b}, -1, -1)({a})",
    "torch.autograd.functional.vjp(lambda t: (t * {b}).sin(), {a}, torch.ones_like({a} * {b}))[1]", "torch.autograd.functional.jacobian(lambda t: t ** 2, {a})",
    "torch.autograd.functional.hvp(lambda t: (t ** 3).sum(), {a}, {a})[1]", "torch.utils.checkpoint.checkpoint(lambda t: torch.tanh(t) * {b}, {a}, use_reentrant=False)",
    "vmap(lambda t, u: (t * u).sum(), (0, None))({a}, {b})", "torch.func.grad(torch.func.grad(lambda t: t ** 3))({a}.sum())",
]  # fmt: skip


@step(2)
def functional(s: Scope) -> str | None:
    """Transforms and nested maps inside."""
    a = s.float(lambda t: 0 < t.numel() <= 12)
    b = s.like(s.tensor(a).shape, lambda t: t.is_floating_point()) if a else None
    return None if b is None else f"{s.new()} = {s.rng.choice(FUNCTIONAL).format(a=a, b=b)}"
