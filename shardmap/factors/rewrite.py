"""What a recorded call becomes where its argument is a product.

One place that asks each of the ways.
"""

from __future__ import annotations

from shardmap.factors import norms, project
from shardmap.factors.builder import FactorBuilder
from shardmap.program.ir import Equation
from shardmap.rules.lowering import V


def from_factors(builder: FactorBuilder, eq: Equation) -> V | None:
    """The result of a recorded call, computed from factors of its argument.

    None where it has none, or that would not pay.
    """
    found = norms.norm(builder, eq)
    return project.from_factors(builder, eq) if found is None else found
