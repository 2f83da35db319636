"""Published models on this machine: which are known, where they lie, how they get here, and how GGUF files
become checkpoint folders.

It knows files, hubs and registries, and nothing of what our models compute.
"""

from .catalog import CATALOG, Entry
from .install import installed, pull
from .store import checkpoint_folder, models_folder

__all__ = ["CATALOG", "Entry", "checkpoint_folder", "installed", "models_folder", "pull"]
