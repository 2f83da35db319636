"""Where results come from: fingerprints of model and tokenizer, settings, versions, machine."""

import hashlib
import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import Any

import torch

from ..engine import Engine, shipped_model

_VALUES = 65_536  # of each tensor at most


def model_fingerprint(engine: Engine) -> str:
    """Hash of the configuration and of up to 65,536 evenly spaced values of every weight.

    Two checkpoints that differ anywhere by training or quantisation differ here; reading an 18 GB model takes
    seconds.
    """
    digest = hashlib.sha256(engine.config.to_json_string().encode())
    for name, weight in sorted(engine.model.state_dict().items()):
        flat = weight.detach().flatten()
        step = -(-flat.numel() // _VALUES)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(engine: Engine) -> str:
    """Hash of the vocabulary and the chat template."""
    vocabulary = sorted(engine.tokenizer.get_vocab().items())
    return hashlib.sha256(repr((vocabulary, engine.tokenizer.chat_template)).encode()).hexdigest()[:32]


def identity(engine: Engine, chat: bool) -> dict[str, Any]:
    """What must not change between the samples of one folder of results."""
    return {
        "model": model_fingerprint(engine),
        "tokenizer": tokenizer_fingerprint(engine),
        "chat template": chat,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "keys and values": str(engine.storage.kv_dtype).removeprefix("torch."),
        "attention mode": engine.config.attention_mode,
        "block search": engine.config.block_search,
        "decoding": "greedy",
    }


def circumstances(engine: Engine) -> dict[str, Any]:
    """Versions, machine and time: written down for every run, but allowed to differ between them."""
    machine = (
        torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else platform.machine()
    )
    versions = {name: _version(name) for name in ("opensala", "torch", "transformers", "numpy")}
    name = "shipped model" if engine.name == str(shipped_model()) else engine.name
    return {
        "name": name,
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "device": str(engine.device),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ""
