"""Training data: documents from files, texts or generators, in weighted mixtures, packed into sequences, with
a position.

Every stream has `state_dict` and `load_state_dict`; a stream that resumes from a state gives exactly what it
would have given.
"""

from .batches import PackedSequence, StageData

__all__ = ["PackedSequence", "StageData"]
