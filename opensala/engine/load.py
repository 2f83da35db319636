"""From the name of a checkpoint to an engine."""

from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from ..hub import checkpoint_folder
from ..model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from ..model.auto_round import int4_kernel, use_auto_round
from .engine import Engine
from .options import EngineOptions
from .precision import apply_precision, choose_kv_dtype, measured_precision, own_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shipped_model() -> Path:
    """Folder of the small model that comes with the package."""
    return Path(str(resources.files("opensala") / "assets" / "small"))


def load_engine(
    model: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention_mode: str | None = None,
    block_search: str | None = None,
    options: EngineOptions | None = None,
    context_kv_dtype: str | None = None,
) -> Engine:
    """Load a model with its tokenizer.

    Args:
        model: folder or hub name of a MiniCPM-SALA checkpoint, or name of a pulled model; None for the
            shipped one.
        device: `auto`, `cpu`, `cuda`, ...; `auto` takes a CUDA GPU if there is one.
        dtype: `auto`, `float32`, `bfloat16` or `float16`, for everything; `auto` is bfloat16 on a GPU, and
            on a CPU float32 with weights in the checkpoint's own 16 bits and products in them as far as
            they are faster here (`engine/precision.py` measures and says so).
        attention_mode: `auto`, `dense` or `sparse`; None for what the checkpoint says.
        block_search: `exact` or `hierarchical`; None for what the checkpoint says.
        options: bounds of the engine. Its `kv_dtype` auto is on a CPU: what `context_kv_dtype` says; else
            bfloat16, if `dtype` is auto and the checkpoint in bfloat16; else the dtype computed in.
        context_kv_dtype: in what a context that is to be opened keeps keys and values
            (`Manifest.kv_dtype`).

    Raises:
        ValueError: an unknown device or dtype, a checkpoint that is missing, broken or of another kind; a
            kernel for 4 bits that is named by OPENSALA_INT4_KERNEL and cannot run.
    """
    name = str(shipped_model()) if model is None else model
    where = _device(device)
    if options is not None and options.device_memory is not None and where.type == "cpu":
        raise ValueError(  # before seconds of loading
            "device_memory bounds what lies on one GPU, and this model is on cpu: leave it out, or use "
            "host_memory"
        )
    kind, precision, kernel = _dtype(dtype, where), None, int4_kernel()
    source = str(checkpoint_folder(name))
    config = _config(source)
    if attention_mode is not None:
        config.attention_mode = attention_mode
    if block_search is not None:
        config.block_search = block_search
    config.check()
    options, own = options or EngineOptions(), own_dtype(config) if dtype == "auto" else kind
    if where.type == "cpu" and options.kv_dtype == "auto":
        options = replace(options, kv_dtype=choose_kv_dtype(own, kind, context_kv_dtype))
    if where.type == "cpu" and dtype == "auto":
        precision = measured_precision(config, own, options.kv_dtype)
        kind = precision.storage  # as it lies in the file, so that nothing is there twice
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no usable tokenizer ({_first_line(error)})") from error
    try:
        weights = MiniCPMSALAForCausalLM.from_pretrained(source, config=config, dtype=kind)
    except OSError as error:
        raise ValueError(f"{name}: cannot be loaded ({_first_line(error)})") from error
    if precision is not None:
        apply_precision(weights, precision)
    if kernel == "auto-round":
        use_auto_round(weights)
    if where.type == "cuda":  # straight to where they stay, so that nothing lies there twice
        weights.model.merge_projections(where)
    return Engine(weights.to(where), tokenizer, options, name=name)


def checkpoint_config(model: str | None) -> MiniCPMSALAConfig:
    """The configuration of a checkpoint by its folder or hub name, or of a pulled model; None for the shipped
    one.

    Raises:
        ValueError: a checkpoint that is missing, or of another kind.
    """
    return _config(str(shipped_model()) if model is None else str(checkpoint_folder(model)))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: no CUDA GPU is usable here; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _config(name: str) -> MiniCPMSALAConfig:
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(f"{name}: no such checkpoint folder (and not a hub name like owner/model)")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"{name}: no checkpoint to be found there ({_first_line(error)})") from error
    if not isinstance(config, MiniCPMSALAConfig):
        raise ValueError(
            f"{name}: a {config.model_type} model; this command runs {MiniCPMSALAConfig.model_type} "
            "checkpoints"
        )
    return config
