"""A run's configuration: merged from defaults, a YAML file and the command line, and checked.

A configuration names functions by import path, and an import runs code: treat a configuration
like a script.
"""

from shardmap.jobs.config.binding import BoundCall, BoundRun, bind, import_object
from shardmap.jobs.config.reading import from_mapping, load, to_yaml
from shardmap.jobs.config.schema import IDENTITY_KEYS, Bounds, Call, Files, RunConfig

__all__ = [
    "IDENTITY_KEYS",
    "BoundCall",
    "BoundRun",
    "Bounds",
    "Call",
    "Files",
    "RunConfig",
    "bind",
    "from_mapping",
    "import_object",
    "load",
    "to_yaml",
]
