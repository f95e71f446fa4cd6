"""Normalising flows, Gaussian processes, variational autoencoders and diffusion."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.zoo import SAMPLES, Model, entry
from tests.zoo.physics import mlp, rows

WIDTH = 4


def likelihood(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of one sample, by change of variables from a normal one."""
    z, logdet = module(x)
    return 0.5 * z.square().sum() + 0.5 * WIDTH * math.log(2 * math.pi) - logdet


class Chain(nn.Module):
    """Several invertible layers, each of which returns its log-determinant."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x.new_zeros(())
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return x, total


class Coupling(nn.Module):
    """An affine coupling layer (RealNVP, Dinh et al., 2017)."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.net, self.swap = mlp(2, 8, 4), swap

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = x.chunk(2)
        a, b = (b, a) if self.swap else (a, b)
        scale, shift = self.net(a).chunk(2)
        scale = scale.tanh()
        b = b * scale.exp() + shift
        return torch.cat([b, a] if self.swap else [a, b]), scale.sum()


class Mixing(nn.Module):
    """Glow's invertible linear layer (Kingma and Dhariwal, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight @ x, torch.linalg.slogdet(self.weight)[1]


class Planar(nn.Module):
    """A planar layer (Rezende and Mohamed, 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.w = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = self.w @ self.u
        u = self.u + (nn.functional.softplus(inner) - 1 - inner) * self.w / self.w.square().sum()
        h = torch.tanh(self.w @ x + self.b)
        return x + u * h, torch.log(torch.abs(1 + (1 - h**2) * (u @ self.w)))


class Spline(nn.Module):
    """A rational-quadratic spline in each coordinate (Durkan et al., 2019)."""

    def __init__(self, bins: int = 5) -> None:
        super().__init__()
        self.widths, self.heights = (nn.Parameter(torch.randn(WIDTH, bins)) for _ in range(2))
        self.slopes = nn.Parameter(torch.randn(WIDTH, bins + 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        edges = nn.functional.pad(self.widths.softmax(-1).cumsum(-1), (1, 0)) * 8 - 4
        levels = nn.functional.pad(self.heights.softmax(-1).cumsum(-1), (1, 0)) * 8 - 4
        slopes = nn.functional.softplus(self.slopes) + 1e-3
        inside = (x > -4) & (x < 4)
        at = torch.where(inside, x, 0.0)
        k = (torch.searchsorted(edges.contiguous(), at[:, None], right=True) - 1).clamp(0, 4)

        def pick(t: torch.Tensor, shift: int = 0) -> torch.Tensor:
            return t.gather(-1, k + shift)[:, 0]

        width, height = pick(edges, 1) - pick(edges), pick(levels, 1) - pick(levels)
        mean, left, right = height / width, pick(slopes), pick(slopes, 1)
        part = (at - pick(edges)) / width
        below = mean + (left + right - 2 * mean) * part * (1 - part)
        y = pick(levels) + height * (mean * part**2 + left * part * (1 - part)) / below
        slope = right * part**2 + 2 * mean * part * (1 - part) + left * (1 - part) ** 2
        logdet = torch.log(mean**2 * slope / below**2)
        return torch.where(inside, y, x), torch.where(inside, logdet, 0.0).sum()


class Masked(nn.Linear):
    """A linear layer of a masked autoregressive flow."""

    def __init__(self, inputs: int, outputs: int, mask: torch.Tensor) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class Autoregressive(nn.Module):
    """A masked autoregressive layer (Papamakarios et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        inputs, hidden = torch.arange(WIDTH), torch.arange(12) % (WIDTH - 1)
        self.first = Masked(WIDTH, 12, (hidden[:, None] >= inputs).double())
        self.second = Masked(12, 2 * WIDTH, (inputs.repeat(2)[:, None] > hidden).double())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, scale = self.second(self.first(x).relu()).chunk(2)
        return (x - mean) * torch.exp(-scale), -scale.sum()


def flow(name: str, *layers: object) -> None:
    """Register a flow."""

    @entry(name)
    def build() -> Model:
        module = Chain(*[layer() for layer in layers]).double()  # pyright: ignore
        return Model(module, likelihood, (rows(WIDTH),), lambda m, x: m(x)[0])


flow("real_nvp", lambda: Coupling(False), lambda: Coupling(True), lambda: Coupling(False))
flow("glow", lambda: Coupling(False), Mixing, lambda: Coupling(True), Mixing)
flow("planar_flow", Planar, Planar)
flow("spline_flow", Spline, Mixing, Spline)
flow("masked_flow", Autoregressive, Mixing, Autoregressive)


@entry("residual_flow")
def residual_flow() -> Model:
    """A residual flow: the exact log-determinant of a Jacobian, taken inside."""

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        jacobian = torch.func.jacrev(lambda x: x + 0.3 * module(x))(x)
        z = x + 0.3 * module(x)
        return 0.5 * z.square().sum() - torch.linalg.slogdet(jacobian)[1]

    return Model(mlp(WIDTH, 8, WIDTH).double(), loss, (rows(WIDTH),))


@entry("continuous_flow", "torchdiffeq")
def continuous_flow() -> Model:
    """A continuous flow with the exact trace (FFJORD, Grathwohl et al., 2019)."""
    import torchdiffeq

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(WIDTH, 8, WIDTH)

        def forward(
            self, t: torch.Tensor, state: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                x = state[0].requires_grad_() if state[0].is_leaf else state[0]
                y = self.net(x)
                trace = [
                    torch.autograd.grad(y[k], x, create_graph=True)[0][k] for k in range(WIDTH)
                ]
            return y, torch.stack(trace).sum()

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        times = torch.linspace(0, 1, 3, dtype=torch.float64)
        start = (x.clone().requires_grad_(), x.new_zeros(()))
        z, logdet = torchdiffeq.odeint(module, start, times, method="rk4")
        return 0.5 * z[-1].square().sum() - logdet[-1]

    return Model(Field().double(), loss, (rows(WIDTH),))


@entry("vae")
def vae() -> Model:
    """A variational autoencoder whose noise is passed in."""

    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = mlp(6, 8, 6), mlp(3, 8, 6)

    def loss(module: nn.Module, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, log = module.encode(x).chunk(2)
        posterior = torch.distributions.Normal(mean, log.exp())
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        found = module.decode(mean + noise * log.exp())
        return (found - x).square().sum() + torch.distributions.kl_divergence(
            posterior, prior
        ).sum()

    return Model(Auto().double(), loss, (rows(6), rows(3)))


def kernels(kind: str) -> Model:
    """A Gaussian process's marginal likelihood of one sample's data."""
    import gpytorch

    class Process(gpytorch.models.ExactGP):
        def __init__(self, likelihood: nn.Module) -> None:
            super().__init__(None, None, likelihood)
            self.mean = gpytorch.means.ConstantMean()
            made = getattr(gpytorch.kernels, kind)
            inner = made(ard_num_dims=2) if kind != "LinearKernel" else made()
            self.kernel = gpytorch.kernels.ScaleKernel(inner)

        def forward(self, x: torch.Tensor) -> object:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    module = Process(likelihood).double()

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found = likelihood(module.forward(x))
        return -found.log_prob(y) / len(y)

    return Model(module, loss, (rows(7, 2), rows(7)))


entry("gp_rbf", "gpytorch")(lambda: kernels("RBFKernel"))
entry("gp_matern", "gpytorch")(lambda: kernels("MaternKernel"))
entry("gp_periodic", "gpytorch")(lambda: kernels("PeriodicKernel"))


@entry("gp_deep_kernel", "gpytorch")
def deep_kernel() -> Model:
    """A Gaussian process on features of a network."""
    model = kernels("RBFKernel")
    features = mlp(2, 8, 2).double()

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.process = features, model.module

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model.loss(module.process, module.features(x), y)

    return Model(Deep(), loss, model.batch)


@entry("gp_posterior", "gpytorch")
def gp_posterior() -> Model:
    """A Gaussian process's prediction at one sample, given data that all share."""
    import gpytorch

    x, y = rows(6, 2).flatten(0, 1)[:6], rows(6).flatten()[:6]

    class Process(gpytorch.models.ExactGP):
        def __init__(self, likelihood: nn.Module) -> None:
            super().__init__(x, y, likelihood)
            self.mean = gpytorch.means.ConstantMean()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: torch.Tensor) -> object:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    module = Process(gpytorch.likelihoods.GaussianLikelihood()).double()
    module.train()

    def loss(module: nn.Module, at: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        module.eval()
        found = module(at)
        loss = -found.log_prob(value)
        module.train()
        return loss

    return Model(module, loss, (rows(3, 2), rows(3)))


@entry("diffusion")
def diffusion() -> Model:
    """Denoising (Ho et al., 2020): a step and noise for each sample."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.net = nn.Embedding(10, 4), mlp(8, 12, 4, activation=nn.SiLU)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.net(torch.cat([x, self.embed(t)]))

    keeps = torch.linspace(0.99, 0.1, 10, dtype=torch.float64).cumprod(0)

    def loss(
        module: nn.Module, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        noisy = keeps[t].sqrt() * x + (1 - keeps[t]).sqrt() * noise
        return (module(noisy, t) - noise).square().mean()

    return Model(Denoiser().double(), loss, (rows(4), torch.randint(10, (SAMPLES,)), rows(4)))


@entry("score_matching")
def score_matching() -> Model:
    """Exact score matching (Hyvarinen, 2005): the trace of a Jacobian in the loss."""

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        score = module(x)
        jacobian = torch.func.jacfwd(module)(x)
        return jacobian.trace() + 0.5 * score.square().sum()

    return Model(mlp(WIDTH, 8, WIDTH).double(), loss, (rows(WIDTH),))


@entry("deep_equilibrium")
def deep_equilibrium() -> Model:
    """A deep equilibrium layer: a fixed point by a fixed number of steps, and its implicit slope."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.inner.weight.data.mul_(0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                z = torch.zeros_like(x)
                for _ in range(8):
                    z = torch.tanh(self.inner(z) + self.outer(x))
            return torch.tanh(self.inner(z) + self.outer(x))

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x).square().sum()

    return Model(Layer().double(), loss, (rows(WIDTH),), lambda m, x: m(x))
