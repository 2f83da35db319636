"""Long-context inference: documents in, answers out. Never imports training or conversion."""

from .answer import Generation, generate
from .ask import ask, build_prompt
from .decode import check_text
from .documents import Document, Reading, Skipped, read_documents
from .engine import Engine
from .grammar import Grammar
from .load import load_engine, shipped_model
from .options import EngineOptions
from .prefill import prefill
from .request import Completion, FinishReason, Reuse, SamplingParams, Selection, TokenEvent

__all__ = [
    "Completion",
    "Document",
    "Engine",
    "EngineOptions",
    "FinishReason",
    "Generation",
    "Grammar",
    "Reading",
    "Reuse",
    "SamplingParams",
    "Selection",
    "Skipped",
    "TokenEvent",
    "ask",
    "build_prompt",
    "check_text",
    "generate",
    "load_engine",
    "prefill",
    "read_documents",
    "shipped_model",
]
