"""Kernels of one kind of device, avoided: recurrent layers by products and pointwise operators.

Torch computes them by kernels that exist on one kind of device: oneDNN's LSTM on CPUs, cuDNN's
layers on GPUs. A recording of such a kernel could run nowhere else, and the switches that turn the
kernels off hold for all threads of the process. So these layers are computed here while a function
is recorded, step by step, as torch's own kernels for other devices do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear

State = tuple[torch.Tensor, ...]
Cell = Callable[[torch.Tensor, State, Sequence[torch.Tensor]], State]
"""`cell(x, state, weights)`: the next state from the input's part of the gates, `[rows, gates]`."""


def _hidden_part(state: State, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return linear(state[0], weights[1], weights[3] if len(weights) > 3 else None)


def _lstm_cell(x: torch.Tensor, state: State, weights: Sequence[torch.Tensor]) -> State:
    into, forget, cell, out = (_hidden_part(state, weights) + x).chunk(4, 1)
    cy = forget.sigmoid() * state[1] + into.sigmoid() * cell.tanh()
    hy = out.sigmoid() * cy.tanh()
    if len(weights) in (3, 5):  # a projection
        hy = linear(hy, weights[-1])
    return hy, cy


def _gru_cell(x: torch.Tensor, state: State, weights: Sequence[torch.Tensor]) -> State:
    x_reset, x_keep, x_new = x.chunk(3, 1)
    h_reset, h_keep, h_new = _hidden_part(state, weights).chunk(3, 1)
    new = (x_new + h_new * (h_reset + x_reset).sigmoid()).tanh()
    return ((state[0] - new) * (h_keep + x_keep).sigmoid() + new,)


def _tanh_cell(x: torch.Tensor, state: State, weights: Sequence[torch.Tensor]) -> State:
    return ((_hidden_part(state, weights) + x).tanh(),)


def _relu_cell(x: torch.Tensor, state: State, weights: Sequence[torch.Tensor]) -> State:
    return ((_hidden_part(state, weights) + x).relu(),)


CELLS: dict[Any, Cell] = {
    torch.lstm: _lstm_cell,
    torch.gru: _gru_cell,
    torch.rnn_tanh: _tanh_cell,
    torch.rnn_relu: _relu_cell,
}


def served(func: Any, args: tuple) -> bool:
    """True if a call would run a kernel of one kind of device, and is computed here instead."""
    if func not in CELLS or not args[0].numel():
        return False
    return args[0].is_cuda or func is torch.lstm


def recurrent(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Compute `torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`: the output and the last states.

    Args:
        func: The function of torch.
        args: Its arguments: a padded batch `[steps, rows, features]`, or a packed sequence
            `[elements, features]` with the number of rows of each step.
        kwargs: Always empty in torch's own modules; names are those of torch's signature.
    """
    packed = isinstance(args[1], torch.Tensor) and (
        func is torch.lstm or isinstance(args[2], torch.Tensor)
    )
    names = ["hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional"]
    given: dict[str, Any] = {**dict(zip(names, args[2 if packed else 1 :], strict=False)), **kwargs}
    batch_first = not packed and (args[8] if len(args) > 8 else kwargs.get("batch_first", False))
    directions = 2 if given["bidirectional"] else 1
    first: State = (given["hx"],) if isinstance(given["hx"], torch.Tensor) else tuple(given["hx"])
    count = len(given["params"]) // (given["num_layers"] * directions)
    x: torch.Tensor = args[0].transpose(0, 1) if batch_first else args[0]
    sizes = args[1].tolist() if packed else None
    last: list[State] = []
    for layer in range(given["num_layers"]):
        outs = []
        for direction in range(directions):
            number = layer * directions + direction
            weights = given["params"][number * count : (number + 1) * count]
            bias = weights[2] if given["has_biases"] else None
            gates = linear(x, weights[0], bias)
            steps = list(gates.unbind(0) if sizes is None else gates.split(sizes))
            initial = tuple([s[number] for s in first])
            found, state = _layer(CELLS[func], steps, initial, weights, direction == 1)
            outs.append(torch.stack(found) if sizes is None else torch.cat(found))
            last.append(state)
        x = outs[0] if directions == 1 else torch.cat(outs, -1)
        if given["dropout"] and given["train"] and layer < given["num_layers"] - 1:
            x = drop(x, given["dropout"], True)
    states = [torch.stack(column) for column in zip(*last, strict=True)]
    return (x.transpose(0, 1) if batch_first else x, *states)


def _layer(
    cell: Cell,
    steps: list[torch.Tensor],
    initial: State,
    weights: Sequence[torch.Tensor],
    backwards: bool,
) -> tuple[list[torch.Tensor], State]:
    """The outputs of one layer in one direction, by step, and its last state.

    The steps of a packed sequence have fewer and fewer rows: forwards, the rows that end keep the
    state they have; backwards, rows begin with the initial state.
    """
    if backwards:
        steps = steps[::-1]
    size = len(steps[0])
    state = tuple([s.narrow(0, 0, size) for s in initial])
    outs: list[torch.Tensor] = []
    ended: list[State] = []
    for x in steps:
        rows = len(x)
        if rows < size:
            ended.append(tuple([s.narrow(0, rows, size - rows) for s in state]))
            state = tuple([s.narrow(0, 0, rows) for s in state])
        elif rows > size:
            begun = [s.narrow(0, size, rows - size) for s in initial]
            state = tuple([torch.cat(pair) for pair in zip(state, begun, strict=True)])
        size = rows
        state = cell(x, state, weights)
        outs.append(state[0])
    if ended:
        parts = [state, *reversed(ended)]
        state = tuple([torch.cat(column) for column in zip(*parts, strict=True)])
    return (outs[::-1] if backwards else outs), state


CUDNN_FLAGS = {torch.batch_norm: 8, torch.instance_norm: 8}
"""Functions with an argument that allows cuDNN's kernel, and its position."""


def without_cudnn(func: Callable[..., object], args: tuple) -> tuple:
    """The arguments of a call without cuDNN, so that it is recorded as a kernel of all devices."""
    position = CUDNN_FLAGS[func]
    return (*args[:position], False, *args[position + 1 :])
