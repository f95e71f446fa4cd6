"""Steps of a random program that write in place, and those that take gradients inside."""

from __future__ import annotations

from tests.fuzz_scope import Scope, at_least, is_int, step

# -- writing in place ------------------------------------------------------------------------------


@step(9)
def write(s: Scope) -> str | None:
    """In-place operators on tensors made inside, and on their views."""
    t = s.target()
    if t is None:
        return None
    u = s.tensor(t)
    w = s.like(u.shape)
    calls = [
        f"{t}.add_({w})", f"{t}.mul_({w})", f"{t}.sub_({w}, alpha=0.5)", f"{t}.copy_({w})",
        f"{t}.zero_()", f"{t}.fill_(0.5)",
        f"{t}.clamp_(-1, 1)", f"{t}.tanh_()", f"{t} += {w}", f"{t} *= 2",
        f"{t}.masked_fill_({t} > 0, 0.25)", f"{t}.fill_({w}.sum())", f"{t}.addcmul_({t}.detach(), "
            f"{w}, value=0.5)", f"{t}.neg_()",
        f"{t}.copy_({w}.flatten()[:1].squeeze())",
        f"torch.add({t}, {w}, out={t})" if s.rng.random() < 0.1 else f"{t}.relu_()",
        f"{t}.unsqueeze_(0)" if s.rng.random() < 0.2 else f"{t}.mul_(0.5)", f"{t}.where({t} > 0, "
            f"{w}).add_(1)", f"{t}.pow_(2)",
        f"{t}.lerp_({w}, 0.5)", f"{t}.div_({w}.abs() + 1)", f"{t}.sigmoid_()",
    ]  # fmt: skip
    if u.dim() >= 2:
        calls += [
            f"{t}.t_()" if u.dim() == 2 and s.rng.random() < 0.2 else f"{t}.mT.add_(1)",
            f"{t}.diagonal().add_(1)",
            f"{t}.flatten()[0].add_(1)",
            f"{t}.transpose(0, 1)[0].mul_(3)",
        ]
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
    at = (
        f"({number} % {u.shape[0]})"
        if number and s.rng.random() < 0.7
        else f"torch.tensor([{s.rng.randrange(u.shape[0])}])"
    )
    calls = [
        f"{t}[{i}] = {w0}", f"{t}[{i}] += {w0}", f"{t}[:1] = {w0}", f"{t}[1:] *= 2", f"{t}[..., 0] "
            "= 0.5", f"{t}[:] = {w}",
        f"{t}[{t} > 0] = 0.25", f"{t}[{at}] = {w0}", f"{t}[{at}] = 1",
        f"{t}.index_add_(0, {at}.flatten()[:1].long(), {t}[:1].clone())", f"{t}.index_fill_(0, "
            f"{at}.flatten().long(), 0.5)",
        f"{t}[{i}].copy_({w0})", f"{t}[{i}].fill_(1)", f"{t}[..., -1].add_(1)",
        f"{t}.index_put_(({at},), torch.tensor(1.5).to({t}.dtype), accumulate=True)",
        f"{t}.scatter_(0, torch.zeros_like({t}, dtype=torch.int64)[:1], {t}[:1].clone())",
        f"{t}[::2] = {t}[::2].flip(0)",
        f"{t}[{i}], {t}[0] = {t}[0].clone(), {t}[{i}].clone()", f"{t}.select(-1, 0).zero_()",
        f"{t}.masked_fill_({w} > 0, 1)",
    ]  # fmt: skip
    if u.dim() >= 2:
        calls += [
            f"{t}[:, 0] = {w0}.flatten()[0]",
            f"{t}[{i}, 0] = {w0}.sum()",
            f"{t}[:, {s.rng.randrange(u.shape[1])}] += 1",
            f"{t}[0, {s.rng.randrange(u.shape[1])}] = {w0}.mean()",
        ]
    return s.rng.choice(calls)


# -- gradients inside ------------------------------------------------------------------------------


@step(3)
def cut(s: Scope) -> str | None:
    """Detached copies, some of which require grad anew."""
    v = s.float()
    call = s.rng.choice(
        (
            "detach()",
            "detach().clone()",
            "detach().clone().requires_grad_()",
            "detach().requires_grad_()",
        )
    )
    return None if v is None else f"{s.new()} = {v}.{call}"


@step(4)
def inner_gradient(s: Scope) -> str | None:
    """A gradient taken inside, with its graph kept or not."""
    y, x = s.float(lambda t: t.grad_fn is not None), s.float(lambda t: t.requires_grad)
    if y is None or x is None:
        return None
    how = s.rng.choice(
        ("create_graph=True", "create_graph=True", "retain_graph=True", "retain_graph=True", "")
    )
    total = s.rng.choice(("{y}.sum()", "{y}.tanh().sum()", "({y} ** 2).mean()", "{y}")).format(y=y)
    extra = f", torch.ones_like({y})" if total == y else ""
    return f"{s.new()}, = torch.autograd.grad({total}, {x}{extra}{', ' + how if how else ''})"


FUNCTIONAL = [
    "torch.func.grad(lambda t: torch.tanh(t * {b}).sum())({a})",
    "torch.func.vjp(lambda t: t.sin() * {b}, {a})[1](torch.ones_like({a} * {b}))[0]",
    "torch.func.jvp(lambda t: (t * {b}).sin(), ({a},), ({a},))[1]", "torch.func.jacrev(lambda t: "
        "(t * {b}).tanh())({a})",
    "torch.func.jacfwd(lambda t: t.sin() * 2)({a})",
    "torch.func.hessian(lambda t: (t ** 3).sum())({a})", "torch.vmap(lambda t: torch.tanh(t) * "
        "2)({a})",
    "vmap(lambda t: torch.tanh(t).sum())({a})", "vmap(lambda t: t * {b}, -1, -1)({a})",
    "torch.autograd.functional.vjp(lambda t: (t * {b}).sin(), {a}, torch.ones_like({a} * {b}))[1]",
    "torch.autograd.functional.jacobian(lambda t: t ** 2, {a})",
    "torch.autograd.functional.hvp(lambda t: (t ** 3).sum(), {a}, {a})[1]",
    "torch.utils.checkpoint.checkpoint(lambda t: torch.tanh(t) * {b}, {a}, use_reentrant=False)",
    "vmap(lambda t, u: (t * u).sum(), (0, None))({a}, {b})",
    "torch.func.grad(torch.func.grad(lambda t: t ** 3))({a}.sum())",
]  # fmt: skip


@step(2)
def functional(s: Scope) -> str | None:
    """Transforms and nested maps inside."""
    a = s.float(lambda t: 0 < t.numel() <= 12)
    b = s.like(s.tensor(a).shape, lambda t: t.is_floating_point()) if a else None
    return None if b is None else f"{s.new()} = {s.rng.choice(FUNCTIONAL).format(a=a, b=b)}"
