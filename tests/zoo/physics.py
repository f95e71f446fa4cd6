"""Networks of physics, written as their papers have them, and differential equations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.zoo import SAMPLES, Model, entry


def rows(*shape: int) -> torch.Tensor:
    """Samples of noise."""
    return torch.randn(SAMPLES, *shape, dtype=torch.float64)


def squared(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The squared distance from a target."""
    return (module(x) - y).square().mean()


def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The module's own output."""
    return module(x)


class Sine(nn.Module):
    """A layer of SIREN (Sitzmann et al., 2020)."""

    def __init__(self, inputs: int, outputs: int, first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else (6 / inputs) ** 0.5 / 30
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(30 * self.linear(x))


@entry("siren")
def siren() -> Model:
    """SIREN, fitted to a value."""
    module = nn.Sequential(Sine(2, 16, True), Sine(16, 16), nn.Linear(16, 1)).double()
    return Model(module, squared, (rows(2), rows(1)), forward)


@entry("siren_laplacian")
def siren_laplacian() -> Model:
    """SIREN, fitted to a Laplacian: the loss holds second derivatives."""
    module = nn.Sequential(Sine(2, 16, True), Sine(16, 16), nn.Linear(16, 1)).double()

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        second = [
            torch.autograd.grad(slope[k], x, create_graph=True, retain_graph=True)[0][k]
            for k in range(2)
        ]
        return (sum(second) - y).square().sum()

    return Model(module, loss, (rows(2) / 10, rows(1)))


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with activations between."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


@entry("deeponet")
def deeponet() -> Model:
    """DeepONet (Lu et al., 2021): a function's values at sensors, and places to evaluate at."""

    class DeepONet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.trunk = mlp(10, 16, 8), mlp(1, 16, 8)
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, u: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return torch.einsum("k,pk->p", self.branch(u), self.trunk(places)) + self.bias

    def loss(
        module: nn.Module, u: torch.Tensor, places: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        return (module(u, places) - y).square().mean()

    return Model(DeepONet().double(), loss, (rows(10), rows(5, 1), rows(5)))


class Spectral(nn.Module):
    """A layer of the Fourier neural operator (Li et al., 2021), in one or two dimensions."""

    def __init__(self, width: int, modes: int, dims: int) -> None:
        super().__init__()
        self.modes, self.dims = modes, dims
        corners = 1 if dims == 1 else 2
        weights = torch.randn(corners, width, width, *[modes] * dims, dtype=torch.cfloat) / width
        self.weights = nn.Parameter(weights)
        self.local = (nn.Conv1d, nn.Conv2d)[dims - 1](width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.modes
        if self.dims == 1:
            found = torch.fft.rfft(x)
            out = torch.zeros_like(found)
            out[..., :m] = torch.einsum("bix,iox->box", found[..., :m], self.weights[0])
            return self.local(x) + torch.fft.irfft(out, n=x.shape[-1])
        found = torch.fft.rfft2(x)
        out = torch.zeros_like(found)
        for corner, at in enumerate((slice(None, m), slice(-m, None))):
            out[..., at, :m] = torch.einsum(
                "bixy,ioxy->boxy", found[..., at, :m], self.weights[corner]
            )
        return self.local(x) + torch.fft.irfft2(out, s=x.shape[-2:])


def fno(dims: int) -> Model:
    """The Fourier neural operator: lift, two spectral layers, project."""
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
    module = nn.Sequential(
        conv(1, 6, 1), Spectral(6, 3, dims), nn.GELU(), Spectral(6, 3, dims), conv(6, 1, 1)
    ).double()
    for layer in module:  # `double` makes complex weights real
        if isinstance(layer, Spectral):
            layer.weights = nn.Parameter(torch.randn_like(layer.weights, dtype=torch.cdouble) / 6)

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (module(x[None])[0] - y).square().mean()

    shape = (1, *[8] * dims)
    return Model(module, loss, (rows(*shape), rows(*shape)), lambda m, x: m(x[None])[0])


entry("fno1d")(lambda: fno(1))
entry("fno2d")(lambda: fno(2))


class Field(nn.Module):
    """The right-hand side of a differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 12, 2)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([state, t.reshape(1)]))


def neural_ode(method: str, adjoint: bool = False) -> Model:
    """A neural ODE, from a start to a target."""
    import torchdiffeq

    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    times = torch.linspace(0, 1, 4, dtype=torch.float64)

    def output(module: nn.Module, start: torch.Tensor) -> torch.Tensor:
        return solve(module, start, times, method=method)[-1]

    def loss(module: nn.Module, start: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (output(module, start) - y).square().sum()

    return Model(Field().double(), loss, (rows(2), rows(2)), output)


ADAPTIVE = {"the function itself": "each sample accepts steps of its own, and few go one way"}
entry("neural_ode_rk4", "torchdiffeq")(lambda: neural_ode("rk4"))
entry("neural_ode_dopri5", "torchdiffeq", ADAPTIVE)(lambda: neural_ode("dopri5"))
entry("neural_ode_adjoint", "torchdiffeq")(lambda: neural_ode("rk4", True))
entry("neural_ode_adams", "torchdiffeq")(lambda: neural_ode("explicit_adams"))


@entry("hamiltonian")
def hamiltonian() -> Model:
    """A Hamiltonian network (Greydanus et al., 2019): derivatives of an energy are the dynamics."""

    def dynamics(module: nn.Module, state: torch.Tensor) -> torch.Tensor:
        state = state if state.requires_grad else state.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(state).sum(), state, create_graph=True)
        q, p = slope.chunk(2)
        return torch.cat([p, -q])

    def loss(module: nn.Module, state: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (dynamics(module, state) - y).square().sum()

    return Model(mlp(4, 12, 12, 1).double(), loss, (rows(4), rows(4)), dynamics)


@entry("lagrangian")
def lagrangian() -> Model:
    """A Lagrangian network (Cranmer et al., 2020): accelerations by solving with a Hessian."""

    def accelerations(module: nn.Module, state: torch.Tensor) -> torch.Tensor:
        def energy(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return module(torch.cat([q, v])).sum() + v.square().sum()

        q, v = state.chunk(2)
        mass = torch.func.hessian(energy, 1)(q, v)
        force = torch.func.grad(energy, 0)(q, v)
        mixed = torch.func.jacrev(torch.func.grad(energy, 1), 0)(q, v)
        return torch.linalg.solve(mass, force - mixed @ v)

    def loss(module: nn.Module, state: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (accelerations(module, state) - y).square().sum()

    return Model(mlp(4, 12, 1, activation=nn.Softplus).double(), loss, (rows(4), rows(2)))


@entry("pinn")
def pinn() -> Model:
    """A physics-informed network: the residual of Burgers' equation at points of one sample."""

    def loss(module: nn.Module, points: torch.Tensor) -> torch.Tensor:
        points = points.clone().requires_grad_()
        u = module(points)[:, 0]
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(du[:, 1].sum(), points, create_graph=True)
        return (du[:, 0] + u * du[:, 1] - 0.01 * second[:, 1]).square().mean()

    return Model(mlp(2, 12, 12, 1).double(), loss, (rows(5, 2),))


@entry("egnn")
def egnn() -> Model:
    """An equivariant graph network (Satorras et al., 2021) on the complete graph of five atoms."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.weight, self.update = mlp(9, 8, 4), mlp(4, 8, 1), mlp(8, 8, 4)

        def forward(self, h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            count = len(h)
            i, j = (~torch.eye(count, dtype=torch.bool)).nonzero().T
            apart = x[i] - x[j]
            m = self.message(torch.cat([h[i], h[j], apart.square().sum(-1, keepdim=True)], -1))
            x = x + torch.zeros_like(x).index_add(0, i, apart * self.weight(m)) / count
            total = torch.zeros(count, 4, dtype=x.dtype).index_add(0, i, m)
            return h + self.update(torch.cat([h, total], -1)), x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList([Layer(), Layer()]), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                h, x = layer(h, x)
            return self.head(h).sum()

    def loss(module: nn.Module, x: torch.Tensor, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        energy = module(x, h)
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return (force + y).square().mean() + energy.square()

    return Model(Net().double(), loss, (rows(5, 3), rows(5, 4), rows(5, 3)))
