"""Long-context inference: documents in, answers out. Never imports training or conversion."""

from .ask import ask, build_prompt
from .decode import check_text
from .documents import Document, Reading, Skipped, read_documents
from .generate import Engine, Generation, Sampling, shipped_model
from .prefill import prefill

__all__ = [
    "Document",
    "Engine",
    "Generation",
    "Reading",
    "Sampling",
    "Skipped",
    "ask",
    "build_prompt",
    "check_text",
    "prefill",
    "read_documents",
    "shipped_model",
]
