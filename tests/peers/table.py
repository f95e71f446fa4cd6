"""The peers: what each is called, what it needs, and where its tests are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A library that calls `torch.func.vmap`."""

    package: str
    """Its name on PyPI."""
    tests: str = ""
    """Folder of the tests in the source distribution; empty if it has none, or they are not in it:
    then `--tests` names them."""
    needs: tuple[str, ...] = ()
    """Other packages, without what torch brings."""
    options: tuple[str, ...] = ()
    """For pytest."""


PEERS = {
    "curvlinops": Peer(
        "curvlinops-for-pytorch",
        "test",
        (
            "backpack-for-pytorch",
            "einconv",
            "einops",
            "unfoldNd",
            "linear_operator",
            "jaxtyping",
            "wadler_lindig",
            "opt_einsum",
            "scipy",
        ),
    ),
    "dattri": Peer("dattri", "test", ("pretty_midi", "mido", "torchvision")),
    # Its conftest starts Ray in a mode that Ray no longer has: take that out of a checkout.
    "evotorch": Peer(
        "evotorch",
        "tests",
        ("pandas", "python-dateutil", "gymnasium", "farama-notifications", "cma"),
    ),
    "evox": Peer("evox"),
    "opacus": Peer("opacus", "opacus/tests", ("opt_einsum",)),
    "posteriors": Peer("posteriors", "tests", ("tensordict", "pyvers", "torchopt", "optree")),
    "pydvl": Peer("pyDVL", needs=("dask", "pandas", "toolz", "locket", "partd")),
    "pypose": Peer("pypose"),
    "tensordict": Peer("tensordict", needs=("pyvers", "orjson", "cloudpickle")),
    "torch-jet": Peer("jet-for-pytorch", "test", ("einops",)),
    "torchjd": Peer("torchjd", needs=("qpsolvers", "quadprog")),
    "trak": Peer("traker", "tests"),
}
