"""Published models on this machine: which are known, where they lie, how they get here, and how GGUF files
become checkpoint folders.

It knows files, hubs and registries, and nothing of what our models compute.
"""

from .catalog import CATALOG, DELTAS, Delta, Entry
from .install import RECORD, NotFetched, installed, pull
from .store import building, checkpoint_folder, models_folder, sha256_of

__all__ = [
    "CATALOG",
    "DELTAS",
    "RECORD",
    "Delta",
    "Entry",
    "NotFetched",
    "building",
    "checkpoint_folder",
    "installed",
    "models_folder",
    "pull",
    "sha256_of",
]
