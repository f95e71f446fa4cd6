"""Graph networks of torch_geometric: one graph per sample, its edges too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.zoo import SAMPLES, Model, entry

NODES, EDGES, FEATURES, CLASSES = 6, 10, 5, 3


def node_loss(
    module: nn.Module, x: torch.Tensor, edges: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Cross entropy over the nodes of one graph."""
    return nn.functional.cross_entropy(module(x, edges), labels)


def graphs() -> tuple[torch.Tensor, ...]:
    """Features of nodes, edges and labels, other ones in each sample."""
    x = torch.randn(SAMPLES, NODES, FEATURES, dtype=torch.float64)
    start = torch.randint(NODES, (SAMPLES, EDGES))
    end = (start + torch.randint(1, NODES, (SAMPLES, EDGES))) % NODES  # no loops
    return x, torch.stack([start, end], 1), torch.randint(CLASSES, (SAMPLES, NODES))


def of_graphs(
    name: str, make: Callable[[], nn.Module], loops: dict[str, str] | None = None
) -> None:
    """Register a network of nodes."""

    @entry(name, "torch_geometric", loops)
    def build() -> Model:
        return Model(make().double().eval(), node_loss, graphs())


def basic(kind: str, **settings: object) -> Callable[[], nn.Module]:
    """One of the package's models of two layers."""

    def make() -> nn.Module:
        from torch_geometric.nn import models

        return getattr(models, kind)(FEATURES, 8, 2, CLASSES, **settings)

    return make


of_graphs("gcn", basic("GCN"))
of_graphs("gat", basic("GAT", heads=2))
of_graphs("gatv2", basic("GAT", heads=2, v2=True))
of_graphs("sage", basic("GraphSAGE"))
of_graphs("sage_max", basic("GraphSAGE", aggr="max"))
of_graphs("sage_project", basic("GraphSAGE", project=True, aggr="mean"))
of_graphs("gin", basic("GIN"))
of_graphs("edge_cnn", basic("EdgeCNN"))
of_graphs("gcn_jump", basic("GCN", jk="cat", norm="layer"))


def stacked(kind: str, **settings: object) -> Callable[[], nn.Module]:
    """Two of the package's layers with an activation between."""

    def make() -> nn.Module:
        import torch_geometric.nn as gnn

        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = getattr(gnn, kind)(FEATURES, 8, **settings)
                self.second = getattr(gnn, kind)(8, CLASSES, **settings)

            def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
                return self.second(self.first(x, edges).relu(), edges)

        return Two()

    return make


of_graphs("transformer_conv", stacked("TransformerConv"))
of_graphs("cheb", stacked("ChebConv", K=3))
of_graphs("tag", stacked("TAGConv", K=2))
of_graphs("graph_conv", stacked("GraphConv", aggr="mean"))
of_graphs("arma", stacked("ARMAConv"))


@entry("pna", "torch_geometric")
def pna() -> Model:
    """Principal neighbourhood aggregation, which scales by degrees."""
    from torch_geometric.nn import PNAConv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = PNAConv(
                FEATURES, CLASSES, ["mean", "min", "max", "std"],
                ["identity", "amplification", "attenuation"], torch.tensor([1, 2, 3, 2]),
            )  # fmt: skip

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return self.conv(x, edges)

    return Model(Net().double().eval(), node_loss, graphs())


@entry("graph_classifier", "torch_geometric")
def graph_classifier() -> Model:
    """A graph's class from the mean of its nodes."""
    from torch_geometric.nn import global_mean_pool
    from torch_geometric.nn.models import GIN

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gin, self.head = GIN(FEATURES, 8, 2), nn.Linear(8, CLASSES)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return self.head(global_mean_pool(self.gin(x, edges), None))

    def loss(
        module: nn.Module, x: torch.Tensor, edges: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        return nn.functional.cross_entropy(module(x, edges), label[:1])

    return Model(Net().double().eval(), loss, graphs())
