"""Ways to change what a function does between two calls: patched libraries, torch's modules, weights and hooks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.call.changes import Way, way


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.register_buffer("shift", torch.zeros(2))
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.training:
            x = x * self.scale
        return self.second(x) + self.shift


def of_net(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        return net(x)

    return f


@way
def torch_function_patched() -> Way:
    kept = torch.sin

    def f(x: Tensor) -> Tensor:
        return torch.sin(x)

    yield f
    torch.sin = torch.cos
    yield f
    torch.sin = kept


@way
def functional_patched_below_a_module() -> Way:
    kept, layer = F.relu, nn.ReLU()

    def f(x: Tensor) -> Tensor:
        return layer(x - 1)

    yield f
    F.relu = lambda x, inplace=False: x * 3
    yield f
    F.relu = kept


@way
def module_class_patched() -> Way:
    kept, layer = nn.Linear.forward, nn.Linear(3, 3)

    def f(x: Tensor) -> Tensor:
        return layer(x)

    yield f
    nn.Linear.forward = lambda self, x: x @ self.weight
    yield f
    nn.Linear.forward = kept


@way
def standard_library_patched() -> Way:
    kept = math.sqrt

    def f(x: Tensor) -> Tensor:
        return x * math.sqrt(4.0)

    yield f
    math.sqrt = lambda value: 7.0
    yield f
    math.sqrt = kept


@way
def training_flag() -> Way:
    net = Net()
    yield of_net(net)
    net.eval()
    yield of_net(net)


@way
def training_flag_of_a_child() -> Way:
    net = nn.Sequential(Net(), nn.Tanh())
    f = of_net(net)
    yield f
    net[0].training = False
    yield f


@way
def parameter_replaced() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.first.weight = nn.Parameter(torch.ones(4, 3))
    yield f


@way
def parameter_data() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.first.weight.data = torch.ones(4, 3)
    yield f


@way
def parameter_data_of_another_dtype() -> Way:
    net = Net()
    f = of_net(net)

    def g(x: Tensor) -> Tensor:
        return f(x.to(net.first.weight.dtype))

    yield g
    net.double()
    yield g


@way
def parameter_in_place() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    with torch.no_grad():
        net.first.weight.add_(1)
    yield f


@way
def load_state_dict() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.load_state_dict(Net().state_dict())
    yield f


@way
def load_state_dict_assigned() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.load_state_dict(Net().state_dict(), assign=True)
    yield f


@way
def buffer_replaced() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.shift = torch.ones(2)
    yield f


@way
def submodule_replaced() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.second = nn.Linear(4, 2)
    yield f


@way
def submodule_of_another_kind() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.second = nn.Sequential(nn.Linear(4, 2), nn.Tanh())
    yield f


@way
def submodule_appended() -> Way:
    net = nn.Sequential(nn.Linear(3, 3))
    f = of_net(net)
    yield f
    net.append(nn.ReLU())
    yield f


@way
def module_number() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.scale = 5.0
    yield f


@way
def forward_hook() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.first.register_forward_hook(lambda module, args, out: out + 1)
    yield f


@way
def forward_hook_removed() -> Way:
    net = Net()
    f = of_net(net)
    handle = net.first.register_forward_hook(lambda module, args, out: out + 1)
    yield f
    handle.remove()
    yield f


@way
def forward_pre_hook() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.second.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    yield f


@way
def global_forward_hook() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 1)
    yield f
    handle.remove()


@way
def what_a_hook_closes_over() -> Way:
    net, shift = Net(), [1.0]
    net.first.register_forward_hook(lambda module, args, out: out + shift[0])
    f = of_net(net)
    yield f
    shift[0] = 4.0
    yield f


@way
def backward_hook_on_a_module() -> Way:
    net = Net()

    def f(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net(x).sum(), x)[0]

    yield f
    net.first.register_full_backward_hook(lambda module, gin, gout: (gin[0] * 3,))
    yield f


@way
def hook_on_a_parameter() -> Way:
    net = Net()

    def f(x: Tensor) -> Tensor:
        return torch.autograd.grad(net(x).sum(), net.first.weight)[0]

    yield f
    net.first.weight.register_hook(lambda grad: grad * 3)
    yield f


@way
def requires_grad_of_a_parameter() -> Way:
    net = Net()

    def f(x: Tensor) -> Tensor:
        loss = net(x).sum()
        wanted = [p for p in net.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])

    yield f
    net.first.weight.requires_grad_(False)
    yield f


@way
def a_parametrization() -> Way:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    net = Net()
    f = of_net(net)
    yield f
    parametrize.register_parametrization(net.first, "weight", Twice())
    yield f


@way
def a_parametrization_that_is_removed() -> Way:
    net = Net()
    parametrizations.weight_norm(net.first)
    f = of_net(net)
    yield f
    parametrize.remove_parametrizations(net.first, "weight", leave_parametrized=True)
    yield f


@way
def forward_of_one_module() -> Way:
    net = Net()
    f = of_net(net)
    yield f
    net.first.forward = lambda x: torch.ones(4) * x.sum()
    yield f


@way
def dropout_probability() -> Way:
    drop = nn.Dropout(1.0)

    def f(x: Tensor) -> Tensor:
        return F.dropout(x, drop.p, training=drop.p == 1.0)

    yield f
    drop.p = 0.5
    yield f
