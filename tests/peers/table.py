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
    # Six of its tests map. torchvision's wheel is built for CUDA: beside a CPU build of torch, empty
    # its `_meta_registrations.py` in the folder of packages.
    "opacus": Peer("opacus", "opacus/tests", ("opt_einsum", "torchvision", "pillow")),
    # The distribution lacks `tests/scenarios.py` and the folders `laplace`, `vi` and `ekf`, which
    # call most maps: the repository has them.
    "posteriors": Peer(
        "posteriors", "tests", ("tensordict", "pyvers", "torchopt", "optree", "graphviz")
    ),
    "pydvl": Peer(
        "pyDVL",
        needs=(
            "dask",
            "distributed",
            "tornado",
            "msgpack",
            "sortedcontainers",
            "tblib",
            "zict",
            "importlib_metadata",
            "zipp",
            "lazy_importer",
            "pyDeprecate==0.3.2",
            "pandas",
            "toolz",
            "locket",
            "partd",
        ),
    ),
    "pypose": Peer("pypose"),
    "tensordict": Peer("tensordict", needs=("pyvers", "orjson", "cloudpickle")),
    # For python 3.12: on an older one, put a class in the place of the `type` statement of
    # `jet/utils.py`, in the folder of packages and in the sources.
    "torch-jet": Peer("jet-for-pytorch", "test", ("einops",)),
    "torchjd": Peer("torchjd", needs=("qpsolvers", "quadprog")),
    "trak": Peer("traker", "tests"),
}
