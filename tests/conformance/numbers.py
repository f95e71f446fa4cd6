"""Numbers: reductions, dtypes, complex and integer arithmetic, and python's numbers."""

from __future__ import annotations

import math

import torch

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()
turn = weight(4, seed=12)
C = torch.complex64


@case(max_paths=200)
def an_item_as_a_factor(r):
    return r * r.detach().sum().item()


@case(max_paths=200, orders=0)
def pythons_mathematics(r):
    return torch.tensor(math.sin(float(r[0])) + math.exp(r[1].item()))


@case()
def a_float_that_was_rounded(r):
    return r * float(r.detach().sum().round())


@case()
def a_number_compared_in_python(r):
    x = r.sum().round().item()
    return r * 2 if x > 0 else r * 3


@case(orders=0)
def through_a_list(r):
    return torch.tensor([math.tanh(v) for v in r.tolist()])


@case()
def promoted(r):
    return r + torch.arange(4), r * torch.tensor(2.0, dtype=torch.float64), r.long() / 2


@case()
def promoted_by_a_vector(r):
    return r * torch.ones(4, dtype=torch.float64), r.half() + 1.5


@case(dtype=torch.int64, orders=0)
def integer_division(r):
    return r // 2, r % 3, r / 2, torch.div(r, 2, rounding_mode="trunc"), r**2


@case(dtype=torch.int64, orders=0)
def bits(r):
    return r & 1, r | 2, r ^ 3, ~r, r << 1, r >> 1


@case(dtype=torch.int32, orders=0)
def sums_of_small_integers(r):
    return r.sum(), r.prod(), r.cumsum(0), r.float().mean(), r.max()


@case(dtype=torch.uint8, orders=0, positive=True)
def bytes_that_wrap(r):
    return r - 5, r * 100, r.sum()


@case(dtype=torch.bool, orders=0)
def truths(r):
    return r.any(), r.all(), r.sum(), r & ~r.flip(0), r.float().mean(), r ^ True


@case(dtype=torch.float64)
def in_double(r):
    return r.log1p().nan_to_num(0.5) + math.pi


@case(dtype=torch.float16, orders=0)
def in_half(r):
    return r * 2 + r.sum()


@case(dtype=torch.bfloat16, orders=0)
def in_brain_float(r):
    return r.float().softmax(0).to(r.dtype)


@case(dtype=C)
def complex_products(r):
    return r * r.conj() + r.sum()


@case(dtype=C)
def parts_of_complex(r):
    return r.real * r.imag, r.abs().square()


@case(weights=[turn])
def complex_from_parts(r):
    return torch.complex(r, turn) * torch.polar(r.abs() + 1, r)


@case()
def complex_as_real(r):
    return torch.view_as_real(torch.view_as_complex(r.view(2, 2)) ** 2)


@case(dtype=C, orders=0)
def angles(r):
    return r.angle(), r.sgn(), r.isfinite(), r.conj().resolve_conj()


@case(3, 4)
def reductions(r):
    return r.var(), r.std(1), r.amax(0), r.amin(1), r.logsumexp(0), r.norm(p=1), r.mean((0, 1))


@case(3, 4)
def variance_and_mean(r):
    return torch.var_mean(r, dim=1, correction=0), r.aminmax(dim=0)


@case()
def cumulative(r):
    return r.cumsum(0), r.cumprod(0), r.softmax(0).cumsum(0).flip(0)


@case(3, 4, orders=0)
def positions_of_extremes(r):
    return r.argmax(), r.argmin(1), r.argsort(1, descending=True), r.max(1).indices


@case(positive=True)
def special_functions(r):
    return torch.lgamma(r) + torch.digamma(r) + torch.erf(r) + torch.special.i0(r)


@case(positive=True)
def powers_of_all_kinds(r):
    return r**r + 2**r + r**0.5 + torch.pow(r, 3) + torch.float_power(r, 2)


@case()
def remainders(r):
    return r % 1.0 + torch.fmod(r, 2) + r.frac() + r.floor() + r.ceil() + r.trunc()


@case()
def clamps(r):
    return r.clamp(-1, 1), r.clamp(min=r.mean()), torch.minimum(r, r.flip(0)), r.relu()


@case()
def nan_and_infinity(r):
    y = (r / 0.0).nan_to_num(1.0, 2.0, -2.0)
    return y * r + torch.where(r > 0, r.log(), r).nansum()


@case()
def exponents_and_mantissas(r):
    return torch.ldexp(r, torch.tensor(3)), torch.copysign(r, r.flip(0)), torch.hypot(r, r + 1)


@case(orders=0)
def bits_as_another_type(r):
    return r.view(torch.int32)


@case()
def shifted_scalars(r):
    return 1 - r, 2 / (r.abs() + 1), -r, abs(r), 3 * r - r * 3.5, r.sum() ** 2


@case()
def zero_dimensional(r):
    a, b = r[0], r[1]
    return a * b, torch.stack([a, b]).prod(), a.reshape(1), torch.atan2(a, b)


@case()
def similarity(r):
    f = torch.nn.functional
    return f.cosine_similarity(r, r.flip(0), dim=0), f.normalize(r, dim=0), f.one_hot(r.argmax(), 4)


@case()
def a_default_from_data(r):
    return r.new_tensor([1.0, 2.0, 3.0, 4.0]) * r + torch.linspace(0, 1, 4) + r.new_full((4,), 2)


@case(max_paths=200, orders=0)
def a_tensor_of_counts(r):
    return torch.tensor([int((r > k).sum()) for k in (-1, 0, 1)])


@case()
def full_of_a_value(r):
    return torch.full((3,), 2.0) * r[0] + torch.ones(3).fill_(0.5) * r[1]


@case()
def formatted_and_hashed(r):
    label = f"{int((r > 0).sum())} positive"
    return r * len(label) + {"0 positive": 1, "1 positive": 2}.get(label, 3)
