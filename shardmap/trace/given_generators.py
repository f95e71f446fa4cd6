"""The user's `torch.Generator`s that a function draws from while it is recorded.

Recorded draws come from private generators; the user's are left in the state they had. In
between they are advanced, so that a function that sets the state of one is detected: in the
loop, such draws are the same for all samples.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable

import torch

from shardmap import errors
from shardmap._torch import generator_id, without_dispatch, without_functions
from shardmap.program.ir import GivenGenerator
from shardmap.trace.generator import bytes_of
from shardmap.trace.recording import user_line

_ENGINE = 625
"""Number of draws that replace all words of a generator's state."""


class GivenGenerators:
    """The user's generators, in the order in which the recording meets them.

    Args:
        call: The user's call, for errors.
        known: Generators that the function draws from, or may draw from.
    """

    def __init__(self, call: str, known: Iterable[torch.Generator] = ()):
        self.call = call
        self._all: list[torch.Generator] = []
        self._met: list[int] = []
        """The generators that it has drawn from, by index in `_all`."""
        self._draws: list[int] = []
        """Number of draws from each of them."""
        self._before: dict[int, torch.Tensor] = {}
        """The original state of each generator, by index in `_all`."""
        self._left: dict[int, torch.Tensor] = {}
        """The state of each after its last recorded draw, by index in `_all`."""
        self._states: set[tuple[int, int]] = set()
        """Size and hash of each state that they were given here, which nobody outside has read."""
        self._objects: dict[int, weakref.ref[torch.Generator] | torch.Generator] = {}
        self._known = tuple(known)

    def start(self) -> None:
        """Advance the known generators before the function runs."""
        for generator in self._known:
            self._advance(self._place(generator), _ENGINE)

    def encoded(self, generator: torch.Generator) -> GivenGenerator | None:
        """Encode a generator for one call that draws; None for torch's own.

        Raises:
            RandomnessError: The function has set its state.
        """
        if is_default(generator):
            return None
        place = self._place(generator)
        self._check(place)
        self._advance(place, 1)
        if place not in self._met:
            self._met.append(place)
            self._draws.append(0)
        number = self._met.index(place)
        self._draws[number] += 1
        return GivenGenerator(number, self._draws[number] - 1)

    def seen(self, generator: torch.Generator) -> None:
        """Keep the user's own object: operators get another object for the same generator."""
        self._objects[generator_id(generator)] = weakref.ref(generator) if _WEAK else generator

    def refuse_seeds(self) -> None:
        """Refuse a state set after the last draw: the next sample's draws would start from it."""
        for place in self._met:
            self._check(place)

    def finish(self) -> tuple[torch.Generator, ...]:
        """The generators that the function has drawn from, once it has returned.

        Raises:
            RandomnessError: It has made one itself.
        """
        found = tuple([self._all[place] for place in self._met])
        for generator in found:
            held = self._objects.get(generator_id(generator))
            if held is not None and _is_gone(held):
                raise errors.RandomnessError(
                    f"{self.call}: the function makes a torch.Generator and draws from it, which "
                    "would give every sample the same numbers; make it before the call, and pass "
                    "randomness='same' (one draw for all samples) or 'different' (each its own)"
                )
        return found

    def restore(self) -> None:
        """Restore the original states of all generators."""
        for place, state in self._before.items():
            self._all[place].set_state(state)
        self._before.clear()

    def _place(self, generator: torch.Generator) -> int:
        for place, known in enumerate(self._all):
            if generator_id(known) == generator_id(generator):
                return place
        self._all.append(generator)
        with without_dispatch(), without_functions():
            self._before[len(self._all) - 1] = generator.get_state()
        return len(self._all) - 1

    def _advance(self, place: int, numbers: int) -> None:
        generator = self._all[place]
        with without_dispatch(), without_functions():
            torch.rand(numbers, generator=generator, device=generator.device)
            self._left[place] = generator.get_state()
            self._states.add((self._left[place].numel(), hash(bytes_of(self._left[place]))))

    def gave(self, tensor: torch.Tensor) -> bool:
        """True if a tensor of bytes holds a state that was read while the function is recorded."""
        if all(size != tensor.numel() for size, _ in self._states) or tensor.device.type != "cpu":
            return False
        return (tensor.numel(), hash(bytes_of(tensor))) in self._states

    def _check(self, place: int) -> None:
        left = self._left.get(place)
        if left is None:
            return
        with without_dispatch(), without_functions():
            same = torch.equal(self._all[place].get_state(), left)
        if not same:
            raise errors.RandomnessError(
                f"{self.call}: the function sets the state of a torch.Generator that it draws from "
                "(manual_seed, set_state), or draws from it where the recording does not look, "
                f"which would give every sample the same numbers, at {user_line()}; set its seed "
                "before the call, and pass randomness='same' (one draw for all samples) or "
                "'different' (each its own)"
            )


def is_default(generator: torch.Generator) -> bool:
    """True if a generator is torch's own of its device."""
    defaults: tuple[torch.Generator, ...] = (torch.default_generator,)
    if generator.device.type == "cuda":
        defaults = torch.cuda.default_generators
    return any(generator_id(generator) == generator_id(own) for own in defaults)


_WEAK = torch.Generator.__weakrefoffset__ != 0
"""True if there are weak references to generators, which torch 2.11 does not have."""
_OWN = 4
"""Number of references to a generator that are ours, while `_is_gone` counts them."""


def _is_gone(held: weakref.ref[torch.Generator] | torch.Generator) -> bool:
    """True if nobody else holds a generator any more."""
    if isinstance(held, weakref.ref):
        return held() is None
    return sys.getrefcount(held) <= _OWN
