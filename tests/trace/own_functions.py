"""Functions with a backward of their own, none of which is the derivative of its forward."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import Function, once_differentiable

Tensor = torch.Tensor


class StraightThrough(Function):
    """Rounds; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Clipped(Function):
    """The identity with a clipped gradient: not linear in the cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clamp(-0.1, 0.1)


class Reversed(Function):
    """Gradient reversal: a view forward, a number that is no tensor, None for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


class Swish(Function):
    """Saves its argument and an intermediate result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = x.sigmoid()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        return grads[0] * 5 * (s + x * s * (1 - s))


class Exp(Function):
    """Saves its result; the new style."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0] * ctx.saved_tensors[0]


class WithMap(Function):
    """Has a `vmap` of its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 9 * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> tuple[Tensor, int]:
        return WithMap.apply(x.movedim(in_dims[0] or 0, 0)), 0


class Linear(Function):
    """The linear layer of PyTorch's guide, with a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, w, b)
        out = x @ w.t()
        return out if b is None else out + b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, w, b = ctx.saved_tensors
        of_x = grad @ w if ctx.needs_input_grad[0] else None
        of_w = 2 * grad.t() @ x if ctx.needs_input_grad[1] else None
        return of_x, of_w, grad.sum(0) if b is not None and ctx.needs_input_grad[2] else None


class Scaled(Function):
    """Returns a gradient of another shape than its argument's: autograd sums it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * scale.exp()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0] * 2, grads[0] * ctx.saved_tensors[0]


class Two(Function):
    """Two results, whose cotangents meet."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        return a * b, a + b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grads[0] * b * 2 + grads[1], grads[0] * a + grads[1] * 3


class Sorted(Function):
    """A result that is not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        out, index = x.sort()
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(index)
        return out, index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0]).index_add(0, ctx.saved_tensors[0], 2 * grads[0])


class Unmaterialised(Function):
    """Two results; a missing cotangent is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        first, second = grads
        if second is None:
            return None if first is None else 2 * first
        return 3 * second if first is None else first + second


class Once(Function):
    """A backward that must not be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] * ctx.saved_tensors[0].cos()


class CubeBackward(Function):
    """The backward of `Cube`, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, square: Tensor) -> Tensor:
        ctx.save_for_backward(grad, x)
        return 3 * grad * square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad, x = ctx.saved_tensors
        return grads[0] * 3 * x**2, grads[0] * 6 * grad * x * 7, None


class Cube(Function):
    """The cube of PyTorch's guide to double backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x**2
        ctx.save_for_backward(x, square)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return CubeBackward.apply(grads[0], *ctx.saved_tensors)


class Sine(Function):
    """Its backward applies another Function, whose backward applies it again, without end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2 * Sine.apply(ctx.saved_tensors[0] + 1)


class Inner(Function):
    """Keeps a graph of its own between forward and backward, as implicit layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = (ctx.x * ctx.x).sin()
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * torch.autograd.grad(ctx.y, ctx.x, grads[0], retain_graph=True)[0]


class Rectified(Function):
    """Writes through a mask into a copy of the cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        grad[ctx.saved_tensors[0] < 0] = 0
        return grad


class InPlace(Function):
    """Writes into the cotangent that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].mul_(2)


class Dirty(Function):
    """Writes into its argument and returns it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.add_(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 4 * grads[0]


class Zeros(Function):
    """Zeros for every sample, with a gradient: nothing of the sample is in its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Reads(Function):
    """Its backward reads a tensor that its forward does not, and one made of python numbers."""

    weight: Tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * Reads.weight.sin() * torch.tensor([2.0, 3.0, 4.0], dtype=grads[0].dtype)


class Unread(Function):
    """No operator of its forward takes its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ones(3, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Noisy(Function):
    """Its backward draws random numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] + torch.randn_like(grads[0])


class Overwrites(Function):
    """Its backward writes into what its forward saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.buffer = x * 2
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.buffer.mul_(grads[0])


class Fails(Function):
    """Its backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ValueError("no gradient")
