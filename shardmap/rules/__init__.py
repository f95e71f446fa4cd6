"""Batching rules: one file per operator family, registered on import."""

from shardmap.rules import (
    attention,
    conv,
    embedding,
    factory,
    index,
    linalg,
    losses,
    matmul,
    nll,
    norm,
    pointwise,
    pool,
    random,
    reduce,
    search,
    view,
)

__all__ = [
    "attention",
    "conv",
    "embedding",
    "factory",
    "index",
    "linalg",
    "losses",
    "matmul",
    "nll",
    "norm",
    "pointwise",
    "pool",
    "random",
    "reduce",
    "search",
    "view",
]
