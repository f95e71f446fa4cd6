"""The zoo: what the `test` extra can build on turning days, the rest if asked for."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.zoo import entries
from tests.zoo.judge import judge

ENTRIES = entries()
IN_TEST_EXTRA = ("torch", "transformers", "torchdiffeq")
IN_CI = (
    "gpt2 llama gemma3 gpt_oss mamba bert t5 bart vit swin clip whisper wav2vec2 siren deeponet "
    "fno1d neural_ode_rk4 hamiltonian lstm s4d real_nvp spline_flow weight_norm spectral_norm "
    "checkpointed_gpt2 quantisation_aware maml unet"
).split()
"""A model of each kind; a third of them runs on each day."""


def is_right(name: str) -> None:
    """Judge one model."""
    verdict = judge(ENTRIES[name])
    if verdict.kind == "missing package":  # of the `zoo` extra, which CI does not install
        pytest.skip(verdict.detail)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("name", IN_CI)
def test_models_of_the_test_extra(name: str) -> None:
    assert ENTRIES[name].package in IN_TEST_EXTRA
    assert find_spec(ENTRIES[name].package), "a package of the test extra"
    is_right(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in IN_CI])
def test_models(name: str) -> None:
    is_right(name)


def test_forty_architectures_and_their_exceptions() -> None:
    assert len(ENTRIES) >= 40
    excused = [name for name, entry in ENTRIES.items() if entry.loops]
    assert all(all(entry.loops.values()) for entry in ENTRIES.values()), "a reason for each"
    assert len(excused) <= 6, excused
