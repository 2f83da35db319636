"""Pages of the engine's pool whose keys and values lie in segments on disk: see `model.tiers`."""

from ..model.tiers import Tiers

DiskBacking = Tiers  # a segment is a source of pages; `DiskBacking.of(engine)` are the engine's tiers
