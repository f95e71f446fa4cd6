"""The builder of calls that work on factors: activations and cotangents instead of their product.

It knows the values of recorded tensors, and the factors of those that are products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardmap.factors.find import Factored, Factors
from shardmap.program.ir import Equation, Program, Var
from shardmap.rules.lowering import Lowering, V


class FactorBuilder:
    """The factors of one program, and the builder of calls that work on them.

    Args:
        program: The program of one sample.
        b: Its lowering.
        env: The values of its variables so far.
        written: Memory groups that are written in place.
        mapped: Memory groups that differ by sample.
        enabled: False to use no factors.
    """

    def __init__(
        self,
        program: Program,
        b: Lowering,
        env: Mapping[int, V],
        written: set[int],
        mapped: set[int],
        enabled: bool,
    ):
        self.b = b
        self.env = env
        self.enabled = enabled
        self.factors = Factors(program, written, mapped)
        self.kept: list[Factored] = []
        """Products that are computed in any case: outputs that are not summed, and products whose
        norm is cheaper to take from them."""
        self.notes: dict[int, str] = {}
        """Texts on the rewritten calls, by number of the recorded call."""
        self._numbers = {id(eq): i for i, eq in enumerate(program.equations)}
        self._made: dict[Any, V] = {}

    def value(self, var: Var) -> V:
        """The value of a recorded tensor."""
        return self.env[var.index]

    def batched(self, var: Var) -> V:
        """The value of a recorded tensor, with the mapped dimension."""
        v = self.env[var.index]
        return v if v.mapped else self.b.batch(v)

    def number(self, var: Var) -> V:
        """A recorded tensor of one element as a number for each sample, `[B]`, or for all."""
        return self.b.reshape(self.env[var.index], ())

    def wanted(self, var: Var) -> bool:
        """True if the product `var` is computed in any case: see `kept`."""
        found = self.factors.of(var)
        factors = (
            {(t.left.index, t.right.index) for t in found.terms} if found is not None else set()
        )
        return any(
            (t.left.index, t.right.index) in factors for kept in self.kept for t in kept.terms
        )

    def once(self, name: str, target: Callable[..., Any], *args: Any, shape: tuple[int, ...]) -> V:
        """Emit a call that several results share, once."""
        key = name, *[a.index if type(a) is V else tuple(a) if type(a) is list else a for a in args]
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self.b.call(target, *args, shape=shape)
        return made

    def note(self, eq: Equation | None, text: str) -> None:
        """Note for `plan.explain()` how a recorded call was rewritten."""
        if eq is not None:
            self.notes[self._numbers[id(eq)]] = text
