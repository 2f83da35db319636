"""Long-context inference: documents in, answers out. Never imports training or conversion."""

from .ask import ask, build_prompt
from .documents import Document, read_documents
from .generate import Engine, Generation, Sampling, shipped_model
from .prefill import prefill

__all__ = [
    "Document",
    "Engine",
    "Generation",
    "Sampling",
    "ask",
    "build_prompt",
    "prefill",
    "read_documents",
    "shipped_model",
]
