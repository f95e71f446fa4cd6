"""Loops whose length a sample decides."""

from __future__ import annotations

import torch

from tests.conformance.suite import Cases, weight

Tensor = torch.Tensor
case = Cases()

pull = weight(4, 4, seed=2)


@case(1, positive=True)
def newtons_square_root(r):
    a = r[0]
    x = a
    while (x * x - a).abs() > 1e-3:
        x = 0.5 * (x + a / x)
    return x


@case()
def halved_until_small(r):
    while r.norm() > 1:
        r = r / 2
    return r


@case()
def as_often_as_positive(r):
    y = r
    for _ in range(int((r > 0).sum())):
        y = y.sin() + r
    return y


@case(weights=[pull])
def a_fixed_point(r):
    m = pull / (2 * torch.linalg.matrix_norm(pull))
    x = r
    for _ in range(40):
        new = torch.tanh(m @ x + r)
        if (new - x).norm() < 1e-1:
            break
        x = new
    return x


@case(weights=[pull])
def power_iteration(r):
    m, v = pull @ pull.T, r / r.norm()
    for _ in range(3):
        v = m @ v
        v = v / v.norm()
    return v @ m @ v


@case()
def collatz_length(r):
    n = int(r.abs().sum()) + 1
    steps = 0
    while n != 1 and steps < 12:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return r * steps


@case(2, positive=True)
def bisection_of_a_cube(r):
    low, high = torch.zeros(()), r.sum() + 1
    while high - low > 1:
        middle = (low + high) / 2
        if middle**3 > r[0]:
            high = middle
        else:
            low = middle
    return (low + high) * r


@case(2)
def mandelbrot_escape(r):
    z, n = r, 0
    while z.square().sum() < 4 and n < 8:
        z = torch.stack([z[0] ** 2 - z[1] ** 2, 2 * z[0] * z[1]]) + r
        n += 1
    return z.tanh() + n


@case()
def an_adaptive_step(r):
    t, h, y = 0.0, 0.5, r
    while t < 1:
        slow, fast = y - h * y, y - h * y + 0.5 * h * h * y
        if (fast - slow).abs().max() > 0.2 and h > 0.1:
            h = h / 2
            continue
        y, t = fast, t + h
    return y


@case()
def backtracking(r):
    def f(x):
        return (x**4).sum() + x.square().sum()

    step, gradient = 1.0, 4 * r**3 + 2 * r
    while f(r - step * gradient) > f(r):
        step *= 0.5
    return r - step * gradient


@case(positive=True)
def euclids_algorithm(r):
    a, b = int(r[0] * 12), int(r[1] * 9)
    while b:
        a, b = b, a % b
    return r * a


@case()
def over_rows_of_an_outer_product(r):
    out = []
    for row in torch.outer(r, r):
        out.append(row.softmax(0) @ r)
    return torch.stack(out)


@case()
def enumerate_and_zip(r):
    s = torch.zeros(())
    for i, (a, b) in enumerate(zip(r[:-1], r[1:], strict=True)):
        s = s + a * b * i
    return s


@case(weights=[pull])
def a_recurrence_to_the_argmax(r):
    h = torch.zeros(4)
    for t in range(int(r.argmax()) + 1):
        h = torch.tanh(pull @ h + r[t])
    return h


@case()
def horner(r):
    y = torch.zeros(())
    for c in r.unbind():
        y = y * 0.5 + c
    return y


@case()
def bubble_sort(r):
    v = list(r)
    for i in range(3):
        for j in range(3 - i):
            if v[j] > v[j + 1]:
                v[j], v[j + 1] = v[j + 1], v[j]
    return torch.stack(v)


@case(3)
def a_while_with_else(r):
    k = 0
    while k < 3:
        if r[k] > 1:
            break
        k += 1
    else:
        return r.sum() * r
    return r[k] * r


@case()
def gradient_descent_until_flat(r):
    x = r
    for _ in range(10):
        g = 2 * x + x.cos()
        if g.norm() < 1:
            return x
        x = x - 0.2 * g
    return x


@case(5, dtype=torch.int64, orders=0)
def a_scan_for_a_stop_token(r):
    n = 0
    for token in r.tolist():
        if token == 0:
            break
        n += 1
    return torch.tensor(n)


@case()
def recursion_by_value(r):
    def f(x, depth):
        return x if depth == 0 or x.sum() > 2 else f(x * 1.5 + 0.1, depth - 1)

    return f(r, 4)
