"""Results whose keys come in another order for some samples: the first sample's order counts."""

from __future__ import annotations

from collections.abc import Sequence

from shardmap import errors
from shardmap._torch import pytree
from shardmap.call.memo import Prepared
from shardmap.call.routes import Path
from shardmap.trace.key_order import in_order_of
from shardmap.trace.recording import Recording

_REORDERED = "keys in another order"


def prepared_in_order(pair: tuple[Recording, pytree.TreeSpec], wanted: pytree.TreeSpec) -> Prepared:
    """A sample's recording, its outputs in the order of the keys of an earlier recording."""
    prepared = Prepared(*in_order_of(pair, wanted))
    if prepared.structure != pair[1]:
        prepared.derived[_REORDERED] = True
    return prepared


def refuse_another_first(paths: Sequence[Path], call: str) -> None:
    """Refuse recordings of an earlier call whose first sample had its keys in another order.

    Raises:
        StaleRecordingError: The call is to be recorded anew.
    """
    for path in paths:
        if len(path.rows) and not int(path.rows[0]) and _REORDERED in path.prepared.derived:
            raise errors.StaleRecordingError(
                f"{call}: the first sample's results have their keys in another order than when "
                "the function was recorded; return them in one order, or use trace='each'"
            )


def other_structure(
    own: pytree.TreeSpec, structure: pytree.TreeSpec, call: str
) -> errors.VariesError:
    """The error for results that do not fit together."""
    return errors.VariesError(
        f"{call}: the function returns another structure for one sample than for another "
        f"({own} and {structure}), so the results do not fit together; return one structure "
        "for all samples"
    )
