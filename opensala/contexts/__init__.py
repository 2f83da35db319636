"""Contexts as things one keeps: documents read once, saved, opened again, extended and forked."""

from .checks import DamagedContext
from .context import Context
from .manifest import Manifest, read_manifest

__all__ = ["Context", "DamagedContext", "Manifest", "read_manifest"]
