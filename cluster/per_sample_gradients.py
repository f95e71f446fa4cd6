"""Per-sample gradients of the digits on a Ray cluster: `configs/digits_gradients.yaml` with `devices=ray`.

Submitted from the repository's root (cluster/README.md has the whole way):

    ray job submit --address http://HEAD:8265 --working-dir . -- python cluster/per_sample_gradients.py --output /shared/digits
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shardmap.cli import main

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits_gradients.yaml"


def run(arguments: list[str]) -> int:
    """Carry out the run on the cluster that this process belongs to, or on a local Ray if it belongs to none.

    Args:
        arguments: `--output FOLDER`, and overrides of the configuration, as for `shardmap run`.

    Returns:
        The exit code of `shardmap run`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="the run; %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path.home() / "shardmap-runs" / "digits_gradients",
        help="the run folder, on the machine where the job's driver runs: a job's working directory is deleted afterwards; %(default)s",
    )
    options, overrides = parser.parse_known_args(arguments)
    return main(["run", str(options.config), "--devices", "ray", "--output", str(options.output), *overrides])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
