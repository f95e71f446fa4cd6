"""Rewrite recorded calls whose argument is a product.

This is the one place that tries each rewrite.
"""

from __future__ import annotations

from shardmap.factors import norms, project
from shardmap.factors.builder import FactorBuilder
from shardmap.program.ir import Equation
from shardmap.rules.lowering import V


def from_factors(builder: FactorBuilder, eq: Equation) -> V | None:
    """The result of a recorded call, computed from factors of its argument.

    None if it has no factors, or they do not pay.
    """
    found = norms.norm(builder, eq)
    return project.from_factors(builder, eq) if found is None else found
