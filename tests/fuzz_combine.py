"""Steps of the fuzzer that combine tensors: matrix products, joins, indices, new tensors."""

from __future__ import annotations

import torch

from tests import fuzz_steps  # noqa: F401  (its steps are registered first)
from tests.fuzz_scope import Scope, at_least, is_int, step


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
            return f"{s.new()} = " + s.rng.choice(
                (
                    f"torch.dot({a}, {b})",
                    f"{a} @ {b}",
                    f"torch.einsum('i,i->', {a}, {b})",
                    f"torch.outer({a}, {b})",
                    f"torch.inner({a}, {b})",
                )
            )
        return f"{s.new()} = " + s.rng.choice(
            (
                f"{a} @ {b}",
                f"{b}.mT.mv({a})",
                f"torch.einsum('i,ij->j', {a}, {b})",
                f"F.linear({a}, {b}.mT)",
            )
        )
    b = s.float(
        lambda u: (
            u.dim() in (1, 2, 3)
            and u.shape[-2 if u.dim() > 1 else 0] == t.shape[-1]
            and u.dtype == t.dtype
        )
    )
    if b is None:
        return f"{s.new()} = {a} @ {a}.mT"
    u = s.tensor(b)
    calls = [f"{a} @ {b}", f"torch.matmul({a}, {b})"]
    if t.dim() == 2 and u.dim() == 2:
        calls += [
            f"torch.mm({a}, {b})",
            f"torch.einsum('ij,jk->ik', {a}, {b})",
            f"F.linear({a}, {b}.t())",
            f"torch.addmm({a} @ {b}, {a}, {b}, alpha=0.5)",
            f"torch.einsum('ij,jk->k', {a}, {b})",
            f"torch.tensordot({a}, {b}, 1)",
        ]
    if t.dim() == 3 and u.dim() == 3:
        calls += [
            f"torch.bmm({a}, {b})",
            f"torch.einsum('bij,bjk->bik', {a}, {b})",
            f"torch.baddbmm({a} @ {b}, {a}, {b}, beta=2)",
            f"F.scaled_dot_product_attention({a}, {a}, {a})",
        ]
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
        calls += [
            f"torch.cat([{a}, {b}], {s.dim(a)})",
            f"torch.hstack([{a}, {b}])",
            f"F.pad({a}, (1, 2))",
            f"torch.cat([{a}, {a}[:1]])",
            f"F.pad({a}, (0, 1), value=0.5)",
        ]
    return f"{s.new()} = {s.rng.choice(calls)}"


@step(4)
def make(s: Scope) -> str | None:
    """Tensors made inside that do not depend on the sample yet."""
    v = s.pick()
    if v is None:
        return None
    shape = s.rng.choice((s.shape(), tuple(s.tensor(v).shape)))
    calls = (
        f"torch.zeros({shape})", f"torch.ones({shape})", f"torch.zeros_like({v})",
        f"{v}.new_zeros({shape})", f"torch.full({shape}, 0.5)",
        f"torch.arange({s.rng.randrange(1, 5)})",
        f"torch.empty_like({v}).fill_(0.25)", f"{v}.new_full({shape}, 2)", "torch.eye(3)",
        "torch.tensor([0.5, -1.0, 2.0])",
        f"torch.zeros({shape}, dtype=torch.float64)", "torch.linspace(0, 1, 4)",
        f"torch.full_like({v}, 1)", f"torch.zeros({shape}, dtype=torch.int64)",
        f"torch.ones_like({v}, dtype=torch.float64)",
        "torch.tensor([[1, 2], [0, 1]])",
    )  # fmt: skip
    return f"{s.new()} = {s.rng.choice(calls)}"


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
    at = (
        f"({i} % {size})"
        if i and s.rng.random() < 0.8
        else f"torch.tensor({[s.rng.randrange(size) for _ in range(s.rng.randrange(1, 4))]})"
    )
    first, last = (
        f"({i} % {t.shape[0]})" if i else "torch.tensor([0, 0])",
        f"({i} % {t.shape[-1]})" if i else "torch.tensor([0])",
    )
    mask = s.like(t.shape, lambda u: u.dtype == torch.bool)
    calls = [
        f"{v}[{first}]", f"{v}[..., {last}]", f"{v}[[0, 0]]", f"{v}.index_select({d}, "
            f"{at}.flatten())", f"{v}.take({at} % {t.numel()})",
        f"{v}[{first}, ..., 0]",
        f"{v}.masked_fill({v} > 0, 0.5)", f"F.embedding({first}.long(), {v})",
        f"{v}.index_fill({d}, {at}.flatten().long(), 1)",
        f"{v}[None, {first}]",
        f"{v}.index_add({d}, torch.tensor([0]), {v}.narrow({d}, 0, 1))",
        f"{v}.index_copy({d}, torch.tensor([{size - 1}]), {v}.narrow({d}, 0, 1))",
        f"torch.where({v} > 0)[0].shape[0] * 0 + {v}" if s.rng.random() < 0.02 else f"{v}[-1]",
    ]  # fmt: skip
    if i:
        like = f"torch.ones_like({v}, dtype=torch.int64) * ({i}.flatten()[0].long() % {size})"
        calls += [
            f"{v}.gather({d}, {like})",
            f"torch.take_along_dim({v}, {like}, {d})",
            f"F.one_hot({i}.long() % 4, 4)",
            f"{v}.scatter({d}, {like}, 0.5)",
            f"{v}.scatter_add({d}, {like}, {v})",
            f"{v}.scatter_reduce({d}, {like}, {v}, 'amax')",
        ]
        if t.dim() >= 2:
            calls += [
                f"{v}[{first}, {first} % {t.shape[1]}]",
                f"{v}[:, ({i} % {t.shape[1]})]",
                f"{v}[torch.arange({t.shape[0]}), ({i}.flatten()[:1] % {t.shape[1]})]",
            ]
    if mask:
        calls += [
            f"{v}.masked_fill({mask}, 0)",
            f"torch.where({mask}, {v}, 0)",
            f"{v}.masked_fill(~{mask}, {v}.sum())",
        ]
    return f"{s.new()} = {s.rng.choice(calls)}"
