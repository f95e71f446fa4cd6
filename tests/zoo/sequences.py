"""Recurrent networks and state-space models."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo import SAMPLES, Model, entry

STEPS, FEATURES = 7, 4


def series() -> tuple[torch.Tensor, torch.Tensor]:
    """Series of noise, and a value for each to predict."""
    x = torch.randn(SAMPLES, STEPS, FEATURES, dtype=torch.float64)
    return x, torch.randn(SAMPLES, 3, dtype=torch.float64)


def squared(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The squared distance from a target."""
    return (module(x) - y).square().mean()


def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The module's own output."""
    return module(x)


class Last(nn.Module):
    """A recurrent layer and a head on its last step."""

    def __init__(self, inner: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x)[0][-1])


class Stepwise(nn.Module):
    """A recurrent cell in a loop of python."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for row in x:
            state = self.cell(row, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def recurrent(name: str, make: type[nn.Module], width: int = 6, **settings: object) -> None:
    """Register a recurrent layer of torch."""

    @entry(name)
    def build() -> Model:
        module = Last(make(FEATURES, 6, **settings), width).double()
        return Model(module, squared, series(), forward)


recurrent("lstm", nn.LSTM, num_layers=2)
recurrent("lstm_bidirectional", nn.LSTM, 12, bidirectional=True)
recurrent("lstm_projected", nn.LSTM, 5, proj_size=5)
recurrent("gru", nn.GRU, num_layers=2)
recurrent("rnn", nn.RNN, nonlinearity="relu")


@entry("lstm_cell")
def lstm_cell() -> Model:
    """An LSTM stepped in python."""
    return Model(Stepwise(nn.LSTMCell(FEATURES, 6)).double(), squared, series(), forward)


@entry("lstm_packed")
def lstm_packed() -> Model:
    """An LSTM on a packed sequence."""

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x[:, None], [STEPS - 2])
        out, _ = module.inner(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out)
        return (module.head(padded[-1, 0]) - y).square().mean()

    return Model(Last(nn.LSTM(FEATURES, 6)).double(), loss, series())


class DiagonalStates(nn.Module):
    """A diagonal state-space layer (S4D, Gu et al., 2022), as a convolution by FFT."""

    def __init__(self, width: int, states: int = 4) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.rand(width, dtype=torch.float64) - 2)
        self.log_decay = nn.Parameter(torch.zeros(width, states, dtype=torch.float64))
        phases = torch.arange(states, dtype=torch.float64).repeat(width, 1)
        self.phase = nn.Parameter(phases)
        self.mix = nn.Parameter(torch.randn(width, states, dtype=torch.cdouble))
        self.skip = nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [T, width] to the same."""
        length = len(x)
        step = self.log_step.exp()[:, None]
        poles = torch.complex(-self.log_decay.exp(), self.phase) * step
        powers = torch.exp(poles[..., None] * torch.arange(length, dtype=torch.float64))
        kernel = 2 * torch.einsum("ws,wsl->wl", self.mix * (poles.exp() - 1), powers).real
        found = torch.fft.irfft(
            torch.fft.rfft(x.T, n=2 * length) * torch.fft.rfft(kernel, n=2 * length), n=2 * length
        )
        return found[:, :length].T + self.skip * x


@entry("s4d")
def s4d() -> Model:
    """Two diagonal state-space layers."""
    module = nn.Sequential(
        nn.Linear(FEATURES, 6, dtype=torch.float64), DiagonalStates(6), nn.GELU(),
        nn.Linear(6, 6, dtype=torch.float64), DiagonalStates(6), nn.Linear(6, 3, dtype=torch.float64),
    )  # fmt: skip

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (module(x).mean(0) - y).square().mean()

    return Model(module, loss, series(), lambda m, x: m(x).mean(0))


@entry("kalman")
def kalman() -> Model:
    """A Kalman filter whose matrices are learned: the likelihood of a series."""

    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Parameter(torch.eye(3) * 0.8 + 0.1 * torch.randn(3, 3))
            self.look = nn.Parameter(torch.randn(FEATURES, 3))
            self.noise = nn.Parameter(torch.zeros(FEATURES))
            self.drift = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean, spread = x.new_zeros(3), torch.eye(3, dtype=x.dtype)
            total = x.new_zeros(())
            for row in x:
                mean, spread = self.step @ mean, self.step @ spread @ self.step.T
                spread = spread + torch.diag(self.drift.exp())
                seen = self.look @ spread @ self.look.T + torch.diag(self.noise.exp())
                root = torch.linalg.cholesky(seen)
                gap = row - self.look @ mean
                total = total + torch.distributions.MultivariateNormal(
                    torch.zeros_like(gap), scale_tril=root
                ).log_prob(gap)
                gain = torch.cholesky_solve(self.look @ spread, root).T
                mean, spread = mean + gain @ gap, spread - gain @ self.look @ spread
            return total

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return -module(x)

    x, _ = series()
    return Model(Filter().double(), loss, (x,))


@entry("tcn")
def tcn() -> Model:
    """A temporal convolutional network with weight norm and causal padding."""
    from torch.nn.utils.parametrizations import weight_norm

    module = nn.Sequential(
        nn.ConstantPad1d((2, 0), 0.0), weight_norm(nn.Conv1d(FEATURES, 6, 3)), nn.ReLU(),
        nn.ConstantPad1d((4, 0), 0.0), weight_norm(nn.Conv1d(6, 3, 3, dilation=2)),
    ).double()  # fmt: skip

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (module(x.T)[:, -1] - y).square().mean()

    return Model(module, loss, series(), lambda m, x: m(x.T)[:, -1])


@entry("transformer")
def transformer() -> Model:
    """Torch's own encoder and decoder."""
    module = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True).double()

    def loss(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(y), dtype=torch.float64)
        return (module(x[None], y[None], tgt_mask=mask)[0] - y).square().mean()

    batch = [torch.randn(SAMPLES, n, 8, dtype=torch.float64) for n in (6, 5)]
    return Model(module, loss, (batch[0], batch[1]))
