"""The options that several commands take, each written once.

An option alone is an annotated type. Options that always come together are a dataclass: a command decorated
with `with_options` asks for the dataclass, and typer sees its fields as if they stood in the signature.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .sizes import byte_count

if TYPE_CHECKING:
    from ..contexts.manifest import Manifest
    from ..contexts.prefixes import PrefixFolder
    from ..engine import Engine, SamplingParams
    from ..engine import EngineOptions as Bounds

Contexts = Annotated[list[str], typer.Argument(metavar="CTX...", help="Folders of contexts.")]
Context = Annotated[str, typer.Argument(metavar="CTX", help="Folder of a context.")]
ContextOutput = Annotated[
    str,
    typer.Option(
        "--output", "-o", help="Folder of the context; a reading that was stopped goes on from there."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Documents = Annotated[
    list[str],
    typer.Argument(
        metavar="DOC...", help="Files (text, source code, Markdown, PDF), directories, pipes, or - for stdin."
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        help="Bytes of a context's keys and values to have in memory at most, as 800MB; what is wanted "
        "beyond is read from disk when it is wanted. Default: what was wanted stays."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result and its measurements as one JSON object.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub name of a MiniCPM-SALA checkpoint, or name of a pulled one (opensala models). "
        "Default: the small model that ships here."
    ),
]
Plan = Annotated[bool, typer.Option("--plan", help="Print what would be run and stop.")]
Quiet = Annotated[bool, typer.Option(help="Only the result: no progress bars, no plan, no notes.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a run that was stopped; the other options as before.")
]

Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of what is drawn at random.")]


@dataclass
class EngineOptions:
    """How a checkpoint is loaded and how it attends."""

    attention_mode: Annotated[
        str | None,
        typer.Option(
            help="auto (dense below the model's dense_len, sparse from there), dense or sparse. "
            "Default: what the checkpoint says."
        ),
    ] = None
    block_search: Annotated[
        str | None,
        typer.Option(
            help="How sparse layers look for blocks: exact, or hierarchical for contexts near a million "
            "tokens. Default: what the checkpoint says."
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16. auto: what the GPU or (measured once) this CPU is fast "
            "in, and never less than the checkpoint has."
        ),
    ] = "auto"
    kv_dtype: Annotated[
        str,
        typer.Option(
            help="Keys and values that are kept: auto, or on a CPU float32, bfloat16, half of it, or int8, "
            "about a quarter. auto: what a context was made with; else on a CPU with --dtype auto bfloat16 "
            "for a bfloat16 checkpoint; else as they are computed."
        ),
    ] = "auto"
    device: Device = "auto"
    device_memory: Annotated[
        str | None,
        typer.Option(
            help="Bytes of keys and values on the GPU at most, as 4GB; the others lie in main memory. "
            "Default: all on the GPU."
        ),
    ] = None

    def load(
        self,
        model: str | None,
        quiet: bool,
        options: "Bounds | None" = None,
        context: "Manifest | None" = None,
    ) -> "Engine":
        """The engine of a checkpoint (None: the small one) with these bounds, to open a context if there is
        one; without progress bars and notes if `quiet`."""
        from huggingface_hub.utils import disable_progress_bars

        from ..engine import EngineOptions as Bounds
        from ..engine import load_engine

        if model is not None and not model.strip():
            raise ValueError("--model is empty: name a checkpoint folder or a hub name, or omit it")
        above = None if self.device_memory is None else byte_count(self.device_memory, "--device-memory")
        bounds = replace(options or Bounds(), kv_dtype=self.kv_dtype, device_memory=above)
        if quiet:
            disable_progress_bars()
            logging.getLogger("opensala").setLevel(logging.ERROR)
        return load_engine(
            model,
            device=self.device,
            dtype=self.dtype,
            attention_mode=self.attention_mode,
            block_search=self.block_search,
            options=bounds,
            context_kv_dtype=None if context is None else context.kv_dtype,
        )


def host_bytes(host_memory: str | None) -> int | None:
    """`--host-memory` in bytes; ValueError for what is no size."""
    return None if host_memory is None else byte_count(host_memory, "--host-memory")


@dataclass
class PrefixOptions:
    """Where what was read outlives the process."""

    prefix_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which beginnings of texts are kept over restarts: what was read once is not read "
            "again. One process at a time has it. Default: none."
        ),
    ] = None
    prefix_limit: Annotated[
        str, typer.Option(help="Bytes of that folder, as 10GB; the least recently used texts give way.")
    ] = "10GB"

    def check(self) -> int:
        """The limit in bytes; ValueError for what is no size."""
        return byte_count(self.prefix_limit, "--prefix-limit")

    def open(self, engine: "Engine") -> "PrefixFolder | None":
        """The folder, in use by the engine from now on until it is closed; None if none is wanted."""
        from ..contexts.prefixes import PrefixFolder

        if self.prefix_dir is None:
            return None
        engine.prefixes = folder = PrefixFolder(self.prefix_dir, engine, self.check())
        return folder


@dataclass
class SamplingOptions:
    """How tokens are chosen."""

    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens that together have this probability.")
    ] = 1.0
    top_k: Annotated[int, typer.Option(help="Sample from so many most likely tokens; 0 for all.")] = 0
    seed: Seed = None
    speculate: Annotated[
        int,
        typer.Option(help="Tokens to draft at most by prompt lookup; the text stays the same. 0 for none."),
    ] = 8

    def checked(self) -> "SamplingParams":
        """The engine's form of them; ValueError for one out of range."""
        from ..engine import SamplingParams

        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            speculate=self.speculate,
        )


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with the fields of its dataclass parameters in their place in the signature."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += _fields(groups[name]) if name in groups else [parameter]

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    expanded.__dict__["__signature__"] = signature.replace(parameters=keyword)
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _fields(group: Any) -> list[inspect.Parameter]:
    types = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
        )
        for field in fields(group)
    ]
