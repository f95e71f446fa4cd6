"""Operators that torch computes by calling others, recorded as the calls that they make.

They are composite below autograd, so that a recording sees them whole: `torch.func.vmap` loops over
the samples for each of them.
"""

from __future__ import annotations

import functools

from shardmap._torch import dense_key, has_kernel, kernel_under, operator_names, overload, overloads
from shardmap.rules.registry import register_decomposition

_NAMES = """
    _chunk_cat conv_tbc rrelu_with_noise_backward embedding_renorm linalg__powsum
    _native_batch_norm_legit_functional _batch_norm_with_update_functional _batch_norm_no_update
    _amp_update_scale _fused_moving_avg_obs_fq_helper_functional
"""


def _on_lists() -> list[str]:
    """The operators on lists of tensors (`torch._foreach_add`), as optimisers call them.

    torch itself falls back to one call for each tensor where a list has mixed shapes or dtypes.
    """
    names = [full.partition("::")[2] for full in operator_names()]
    return [n for n in names if n.startswith("_foreach_") and not n.endswith("out")]


for _op in (*overloads(*_NAMES.split()), *filter(None, map(overload, _on_lists()))):
    if has_kernel(_op.name(), "CompositeExplicitAutograd"):
        register_decomposition(_op, functools.partial(kernel_under(_op), dense_key))
