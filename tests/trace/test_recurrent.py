"""Recurrent layers while they are recorded: torch's own values, whatever other threads compute."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import shardmap
from shardmap.trace.recurrent import recurrent
from tests import oracle

LAYERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, torch.lstm, {}),
    "projected lstm": (nn.LSTM, torch.lstm, {"proj_size": 3}),
    "gru": (nn.GRU, torch.gru, {}),
    "tanh": (nn.RNN, torch.rnn_tanh, {}),
    "relu": (nn.RNN, torch.rnn_relu, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize(
    ("layers", "both", "first", "bias"),
    list(itertools.product((1, 2), (False, True), (False, True), (True, False))),
)
@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients(kind: str, layers: int, both: bool, first: bool, bias: bool) -> None:
    """Padded and packed, against the kernels of torch in float64."""
    module, func, options = LAYERS[kind]
    net = module(4, 5, layers, bias=bias, batch_first=first, bidirectional=both, **options).double()
    width = options.get("proj_size", 5)

    def initial(rows: int) -> Any:
        count = layers * (2 if both else 1)
        hidden = torch.randn(count, rows, width).double()
        if module is not nn.LSTM:
            return hidden
        return [hidden, torch.randn(count, rows, 5).double()]

    x = torch.randn(3, 6, 4).double().requires_grad_()
    packed = pack_padded_sequence(
        torch.randn(4, 5, 4).double(), torch.tensor([5, 3, 3, 1]), batch_first=True
    )
    rest = (net._flat_weights, bias, layers, 0.0, False, both)
    for args in (
        (x, initial(3 if first else 6), *rest, first),
        (packed.data.requires_grad_(), packed.batch_sizes, initial(4), *rest),
    ):
        wanted, found = func(*args), recurrent(func, args, {})
        for a, b in zip(wanted, found, strict=True):
            torch.testing.assert_close(b, a)
        inputs = (args[0], *net.parameters())
        torch.testing.assert_close(
            torch.autograd.grad([t.sin().sum() for t in found], inputs),
            torch.autograd.grad([t.sin().sum() for t in wanted], inputs),
        )


def test_dropout_between_layers() -> None:
    """In training each layer but the last is followed by dropout: with p = 1, zeros go on."""
    net = nn.LSTM(4, 5, 2, dropout=1.0).double()
    args = ([torch.zeros(2, 3, 5).double()] * 2, net._flat_weights, True, 2, 1.0, True, False)
    x = torch.randn(6, 3, 4).double()
    for a, b in zip(
        torch.lstm(x, *args, False), recurrent(torch.lstm, (x, *args, False), {}), strict=True
    ):
        torch.testing.assert_close(b, a)


def test_other_threads_keep_their_kernels() -> None:
    """No process-wide switch changes: an LSTM beside a recording gives its usual bits."""
    net = nn.LSTM(8, 16)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, rows = torch.randn(7, 2, 8), torch.randn(3, 7, 8)
    with torch.no_grad():
        wanted = net(x)[0], layer(x)
    over, faults, turns = threading.Event(), [], []

    def beside() -> None:
        with torch.no_grad():
            while not over.is_set() or len(turns) < 5:
                turns.append(torch._C._get_mkldnn_enabled())  # type: ignore[attr-defined]
                turns.append(torch.backends.mha.get_fastpath_enabled())
                if not (torch.equal(net(x)[0], wanted[0]) and torch.equal(layer(x), wanted[1])):
                    faults.append(len(turns))

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        for _ in range(20):

            def function(r: Tensor) -> Tensor:
                return net(r)[0] + layer(r[None])[0].sum()

            with torch.no_grad():
                oracle.assert_same(
                    shardmap.vmap(function)(rows), oracle.loop(function)(rows), "an LSTM"
                )
    finally:
        over.set()
        thread.join()
    assert not faults
    assert all(turns)
