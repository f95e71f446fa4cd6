"""What users map: per-sample gradients of models, Jacobians, a Hessian, an ensemble, next to nothing."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardmap
from benchmarks import jacobians, models, user_models, user_twins

Call = Callable[[], Any]
Loss = Callable[[Tensor, Tensor], Tensor]
SAMPLES = 32


@dataclass(frozen=True)
class Case:
    """A map and the ways to write it."""

    loop: Call
    """The results of the samples one by one, by plain autograd, in a list."""
    ours: Callable[[Mapping[str, Any]], Call]
    """Makes the map of this library with these options."""
    func: Mapping[str, Callable[[int | None], Callable[..., Any]]]
    """For each way of torch.func: makes the mapped function for a chunk size."""
    arguments: tuple[Any, ...]
    """What the function of torch.func is called with."""
    chunks: tuple[int | None, ...]
    """Chunk sizes that a user of torch.func would try, None for the whole batch."""
    opacus: Callable[[], Call] | str
    """Makes the same by Opacus, or says why there is none."""
    jax: Callable[[], Call] | str
    """Makes the same by jax.jit, or says why there is none."""
    target: float | None = 1.0
    """Time over torch.func's at its best that ours should keep to."""


NO_GRADIENTS = "Opacus has per-sample gradients only"
NO_TWIN = "no twin in JAX was written"


def sizes(samples: int) -> tuple[int | None, ...]:
    """Chunk sizes up to half the batch, and none."""
    return (None, *[chunk for chunk in (1, 2, 4, 8, 16, 32, 64, 128) if chunk < samples])


def classified(out: Tensor, targets: Tensor) -> Tensor:
    """The sum over the samples of their cross entropies."""
    return F.cross_entropy(out, targets, reduction="sum")


def predicted(out: Tensor, tokens: Tensor) -> Tensor:
    """The sum over the samples of the mean cross entropy of the next token."""
    logits, after = out[..., :-1, :].flatten(0, -2), tokens[..., 1:]
    return F.cross_entropy(logits, after.flatten(), reduction="sum") / after.shape[-1]


def squared(out: Tensor, targets: Tensor) -> Tensor:
    """The sum of the squared differences."""
    return (out - targets).square().sum()


def gradients(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    opacus: str = "",
    jax: Callable[..., Any] | None = None,
) -> Case:
    """Make the case of a model's per-sample gradients.

    Args:
        model: Maps a batch of inputs to outputs.
        loss: Sums the losses of a batch, or takes one sample without a batch dimension.
        inputs: The batch.
        targets: What the loss compares the outputs with, a row for each sample.
        opacus: Why Opacus does not serve this model, where it does not.
        jax: The loss of one sample by the parameters' names, its input and its target.
    """
    names, values = zip(*model.named_parameters(), strict=True)
    detached = {n: v.detach() for n, v in zip(names, values, strict=True)}

    def gradient(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss(model(x[None]), y[None]), values)
        return dict(zip(names, found, strict=True))

    def functional(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    def ours(options: Mapping[str, Any]) -> Call:
        mapped = shardmap.per_sample_grad(model, loss, batch_of_one=True, **options)
        return lambda: mapped(inputs, targets)

    def by_func(chunk: int | None) -> Callable[..., Any]:
        return torch.func.vmap(torch.func.grad(functional), (None, 0, 0), chunk_size=chunk)

    def by_opacus() -> Call:
        from opacus import GradSampleModule

        hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum", strict=False)
        parameters: dict[str, Any] = {
            name.removeprefix("_module."): value for name, value in hooked.named_parameters()
        }

        def run() -> dict[str, Tensor]:
            loss(hooked(inputs), targets).backward()
            found = {name: value.grad_sample for name, value in parameters.items()}
            for value in parameters.values():
                value.grad = value.grad_sample = None
            return found

        return run

    def by_jax() -> Call:
        import jax as j

        assert jax is not None
        mapped = j.jit(j.vmap(j.grad(jax), (None, 0, 0)))
        arrays = {name: value.cpu().numpy() for name, value in detached.items()}
        x, y = inputs.cpu().numpy(), targets.cpu().numpy()
        return lambda: j.block_until_ready(mapped(arrays, x, y))

    return Case(
        loop=lambda: [gradient(x, y) for x, y in zip(inputs, targets, strict=True)],
        ours=ours,
        func={"grad": by_func},
        arguments=(detached, inputs, targets),
        chunks=sizes(len(inputs)),
        opacus=opacus or by_opacus,
        jax=NO_TWIN if jax is None else by_jax,
    )


def derivatives(kind: str, batch: Tensor, case: jacobians.Case) -> Case:
    """Make the case of a batch of Jacobians or Hessians.

    `shardmap.jacobian` chooses its mode, so its peer is the faster mode of torch.func; the peer of
    `jacrev` is torch.func's `jacrev`.
    """
    mapped = shardmap.hessian if case.hessian else getattr(shardmap, kind)
    modes = ("hessian",) if case.hessian else ("jacrev", "jacfwd")
    modes = modes if kind in ("hessian", "jacobian") else (kind,)
    # the loop of what is mapped: one row at a time, which no chunk or lane of ours takes part in
    plain = (torch.func.hessian if case.hessian else torch.func.jacfwd)(case.function)

    def ours(options: Mapping[str, Any]) -> Call:
        f = mapped(case.function, **options)
        return lambda: f(batch)

    def by_func(mode: str) -> Callable[[int | None], Callable[..., Any]]:
        transform = getattr(torch.func, mode)
        return lambda chunk: torch.func.vmap(transform(case.function), chunk_size=chunk)

    def by_jax() -> Call:
        import jax as j

        mode = "hessian" if case.hessian else kind if kind != "jacobian" else "jacfwd"
        f = j.jit(j.vmap(getattr(j, mode)(case.jax())))
        x = batch.cpu().numpy()
        return lambda: j.block_until_ready(f(x))

    return Case(
        loop=lambda: [plain(row) for row in batch],
        ours=ours,
        func={mode: by_func(mode) for mode in modes},
        arguments=(batch,),
        chunks=sizes(len(batch)),
        opacus=NO_GRADIENTS,
        jax=by_jax,
        target=0.9,
    )


def ensemble(members: int, inputs: Tensor, targets: Tensor) -> Case:
    """Make the case of an ensemble: the gradients of many nets on the same batch."""
    device = inputs.device
    nets = [models.mlp().to(device) for _ in range(members)]
    stacked, _ = torch.func.stack_module_state(nets)
    stacked = {name: value.detach() for name, value in stacked.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(nets[0], parameters, (x,)), y)

    def ours(options: Mapping[str, Any]) -> Call:
        mapped = shardmap.vmap(torch.func.grad(loss), (0, None, None), **options)
        return lambda: mapped(stacked, inputs, targets)

    def loop() -> list[dict[str, Tensor]]:
        found = []
        for net in nets:
            value = F.cross_entropy(net(inputs), targets)
            grads = torch.autograd.grad(value, tuple(net.parameters()))
            found.append(dict(zip(dict(net.named_parameters()), grads, strict=True)))
        return found

    def by_jax() -> Call:
        import jax as j

        def of_batch(parameters: Mapping[str, Any], x: Any, y: Any) -> Any:
            one = j.vmap(user_twins.cross_entropy(models.mlp_jax), (None, 0, 0))
            return one(parameters, x, y).mean()

        mapped = j.jit(j.vmap(j.grad(of_batch), (0, None, None)))
        arrays = {name: value.cpu().numpy() for name, value in stacked.items()}
        x, y = inputs.cpu().numpy(), targets.cpu().numpy()
        return lambda: j.block_until_ready(mapped(arrays, x, y))

    return Case(
        loop=loop,
        ours=ours,
        func={
            "grad": lambda chunk: torch.func.vmap(
                torch.func.grad(loss), (0, None, None), chunk_size=chunk
            )
        },
        arguments=(stacked, inputs, targets),
        chunks=sizes(members),
        opacus="Opacus has no ensembles",
        jax=by_jax,
    )


def collocation(points: Tensor) -> Case:
    """Make the case of a step of a physics-informed net: a map inside of `torch.func.grad`.

    The loss is the mean squared residual of Poisson's equation over the points; its gradient by
    the weights is one result, which stands in the place of a sample.
    """
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    net = net.to(points.device)
    weights = {name: value.detach() for name, value in net.named_parameters()}

    def residual(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        def solution(x: Tensor) -> Tensor:
            return torch.func.functional_call(net, weights, (x,)).squeeze()

        return torch.func.hessian(solution)(x).diagonal().sum() - x.sin().prod()

    def step(vmap: Callable[..., Any]) -> Callable[..., Any]:
        def loss(weights: dict[str, Tensor], points: Tensor) -> Tensor:
            return vmap(lambda x: residual(weights, x))(points).square().mean()

        def gradient(weights: dict[str, Tensor], points: Tensor) -> dict[str, Tensor]:
            found = torch.func.grad(loss)(weights, points)
            return {name: value[None] for name, value in found.items()}

        return gradient

    def loop() -> list[dict[str, Tensor]]:
        plain = step(lambda f: lambda rows: torch.stack([f(row) for row in rows]))
        return [{name: value[0] for name, value in plain(weights, points).items()}]

    def ours(options: Mapping[str, Any]) -> Call:
        mapped = step(lambda f: shardmap.vmap(f, **options))
        return lambda: mapped(weights, points)

    def by_func(chunk: int | None) -> Callable[..., Any]:
        return step(lambda f: torch.func.vmap(f, chunk_size=chunk))

    return Case(
        loop=loop,
        ours=ours,
        func={"grad": by_func},
        arguments=(weights, points),
        chunks=sizes(len(points)),
        opacus="Opacus has no derivatives by inputs",
        jax=NO_TWIN,
    )


def one_more(batch: Tensor) -> Case:
    """Make the case of a map that does next to nothing: what a call costs."""

    def function(x: Tensor) -> Tensor:
        return x + 1

    def ours(options: Mapping[str, Any]) -> Call:
        mapped = shardmap.vmap(function, **options)
        return lambda: mapped(batch)

    def by_jax() -> Call:
        import jax as j

        mapped = j.jit(j.vmap(lambda x: x + 1))
        x = batch.cpu().numpy()
        return lambda: j.block_until_ready(mapped(x))

    return Case(
        loop=lambda: [function(row) for row in batch],
        ours=ours,
        func={"vmap": lambda chunk: torch.func.vmap(function, chunk_size=chunk)},
        arguments=(batch,),
        chunks=(None,),
        opacus=NO_GRADIENTS,
        jax=by_jax,
    )


def cases(device: str, samples: int = SAMPLES) -> dict[str, Callable[[], Case]]:
    """Return what makes each case, by name; the same weights and data every time."""

    def images(
        model: Callable[[], nn.Module],
        size: int,
        jax: models.JaxForward | None = None,
        opacus: str = "",
    ) -> Callable[[], Case]:
        def make() -> Case:
            torch.manual_seed(0)
            x, y = torch.randn(samples, 3, size, size), torch.randint(10, (samples,))
            twin = None if jax is None else user_twins.cross_entropy(jax)
            return gradients(
                model().to(device), classified, x.to(device), y.to(device), opacus=opacus, jax=twin
            )

        return make

    def text(
        model: Callable[[], nn.Module],
        loss: Loss,
        classes: int,
        opacus: str = "",
        jax: Callable[..., Any] | None = None,
    ) -> Callable[[], Case]:
        def make() -> Case:
            torch.manual_seed(0)
            x = torch.randint(user_models.VOCABULARY, (samples, user_models.TOKENS)).to(device)
            y = torch.randint(classes, (samples,)).to(device) if classes else x
            return gradients(model().to(device), loss, x, y, opacus, jax)

        return make

    def vectors(
        model: Callable[[], nn.Module],
        shape: tuple[int, ...],
        targets: Callable[[], Tensor],
        loss: Loss,
        opacus: str = "",
        jax: Callable[..., Any] | None = None,
    ) -> Callable[[], Case]:
        def make() -> Case:
            torch.manual_seed(0)
            x, y = torch.randn(samples, *shape).to(device), targets().to(device)
            return gradients(model().to(device), loss, x, y, opacus, jax)

        return make

    def derivative(kind: str, name: str, rows: int) -> Callable[[], Case]:
        def make() -> Case:
            case = jacobians.cases()[name]
            if isinstance(net := case.function, nn.Module):
                net.to(device)
            elif name.startswith("Hessian"):
                for cell in case.function.__closure__ or ():
                    cell.cell_contents.to(device)
            return derivatives(kind, case.batch[:rows].to(device), case)

        return make

    def of_many() -> Case:
        torch.manual_seed(0)
        x, y = torch.randn(64, 784).to(device), torch.randint(10, (64,)).to(device)
        return ensemble(min(16, samples), x, y)

    def of_points() -> Case:
        torch.manual_seed(0)
        return collocation(torch.rand(3 if few else 256, 2).to(device))

    def of_little() -> Case:
        torch.manual_seed(0)
        return one_more(torch.randn(8, 4).to(device))

    held = "Opacus' hooks see modules, and this model holds parameters of its own"
    few = samples < SAMPLES
    packaged = importlib.util.find_spec("transformers") is not None  # others have other names
    return {
        "GPT-2, 6 layers": text(
            user_models.gpt2, predicted, 0, "Opacus has no rule for tied weights",
            user_twins.next_token(user_twins.gpt2) if packaged else None,
        ),
        "BERT, 4 layers": text(
            user_models.bert, classified, 2, "Opacus refuses positions without a batch",
            user_twins.cross_entropy(user_twins.bert) if packaged else None,
        ),
        "small transformer": text(
            user_models.SmallTransformer, classified, 10,
            "Opacus has no hook for nn.MultiheadAttention",
            user_twins.cross_entropy(user_twins.small_transformer),
        ),
        "CNN": images(models.cifar_cnn, 32, models.cifar_cnn_jax),
        "ResNet-18, group norm": images(user_models.resnet18, 64, user_twins.resnet18),
        "LSTM": vectors(
            user_models.LastOfLSTM, (24, 16), lambda: torch.randint(10, (samples,)), classified,
            "Opacus has no hook for nn.LSTM", user_twins.cross_entropy(user_twins.lstm),
        ),
        "ViT, 4 layers": images(user_models.ViT, 32, user_twins.vit, held),
        "equivariant network": vectors(
            user_models.Equivariant, (user_models.ATOMS, 3), lambda: torch.randn(samples), squared,
            held, user_twins.squared(user_twins.equivariant),
        ),
        "ensemble of 16": of_many,
        "neural ODE": vectors(
            user_models.NeuralODE, (8,), lambda: torch.randn(samples, 8), squared, "",
            user_twins.squared(user_twins.ode),
        ),
        "Jacobian 32 -> 2048": derivative("jacobian", "32 -> 2048, batch 64", 3 if few else 64),
        "jacrev 32 -> 2048": derivative("jacrev", "32 -> 2048, batch 64", 3 if few else 64),
        "Hessian, 64 inputs": derivative("hessian", "Hessian, 64 inputs, batch 256", 3 if few else 256),
        "Lorenz-96 flow": derivative("jacobian", "Lorenz-96, 50 steps, batch 512", 3 if few else 512),
        "physics-informed net": of_points,
        "x + 1": of_little,
    }  # fmt: skip
