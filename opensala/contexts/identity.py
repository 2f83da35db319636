"""What a context is bound to: weights, configuration, tokenizer and dtype of the model that read it.

Keys, values and states mean something to that model only. A context is opened by a model whose identity is
the same, field by field; what differs is named.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..engine import Engine
from ..model import MiniCPMSALAConfig
from .checks import checksum
from .segment import as_bytes

# fields of a configuration that change nothing in what is read
_WITHOUT_EFFECT = {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "keys_to_ignore_at_inference",
    "max_position_embeddings",
    "model_type",
    "pad_token_id",
    "use_cache",
}
_NAMED = 4  # differences that are written out

_known: "WeakKeyDictionary[Engine, tuple[tuple[Any, ...], dict[str, Any]]]" = WeakKeyDictionary()


def identity(engine: Engine) -> dict[str, Any]:
    """The identity of an engine's model: `weights` by tensor, `config`, `tokenizer`, `chat_template`,
    `dtype`, and `kv_dtype` with `compressed_dtype` where keys and values have another one.

    Every weight is read for it, once for each engine and state of the weights.
    """
    weights = engine.model.state_dict(keep_vars=True)
    config = _config(engine.config)
    key = (json.dumps(config), *((w.data_ptr(), w._version) for w in weights.values()))
    if engine not in _known or _known[engine][0] != key:
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            each = pool.map(partial(_sum, dtype=engine.dtype), weights.values())
            sums = dict(zip(weights, each, strict=True))
        found: dict[str, Any] = {"config": config, "dtype": _name(engine.dtype)}
        if engine.kv_dtype is not None:
            found["kv_dtype"] = _name(engine.kv_dtype)
            found["compressed_dtype"] = _name(engine.storage.compressed_dtype)
        _known[engine] = key, {"weights": sums, **found}
    return {**_known[engine][1], **_tokenizer(engine.tokenizer)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sum(weight: Tensor, dtype: torch.dtype) -> str:
    """Of what is computed with: weights stored in fewer bits than `dtype` (exactly widened) count as wide."""
    data = weight.detach().cpu()
    if data.is_floating_point() and data.itemsize < dtype.itemsize:
        data = data.to(dtype)
    return checksum(str(tuple(data.shape)).encode(), as_bytes(data.reshape(1, -1)).data)[:8].hex()


def _config(config: MiniCPMSALAConfig) -> dict[str, Any]:
    every = config.to_dict()
    names = (
        n for c in type(config).__mro__ if c is not object for n in c.__dict__.get("__annotations__", ())
    )
    ours = {n for n in names if n in MiniCPMSALAConfig.__annotations__} - _WITHOUT_EFFECT
    return {name: every[name] for name in sorted(ours) if name in every}


def _tokenizer(tokenizer: Any) -> dict[str, str | None]:
    if tokenizer is None:
        return {"tokenizer": None, "chat_template": None}
    if tokenizer.is_fast:
        record = json.loads(tokenizer.backend_tokenizer.to_str())
        text = json.dumps({k: v for k, v in record.items() if k not in ("truncation", "padding")})
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    template = tokenizer.chat_template
    return {
        "tokenizer": checksum(text.encode("utf-8", "surrogatepass")).hex(),
        "chat_template": None if not template else checksum(json.dumps(template).encode()).hex(),
    }


_ADVICE = "Open it with the model and the options that made it, or ingest its documents again"


def check_identity(
    folder: Path, there: dict[str, Any], here: dict[str, Any], what: str = "context", advice: str = _ADVICE
) -> None:
    """Refuse a context of another model.

    Args:
        folder: where it lies.
        there, here: identities of the context and of the model.
        what, advice: for the message, what it is and what to do.

    Raises:
        ValueError: naming each thing that differs.
    """
    found = [*_weights(there.get("weights"), here["weights"])]
    found += _fields(there.get("config"), here["config"], what)
    for name in ("dtype", "tokenizer", "chat_template"):
        if there.get(name) != here[name]:
            found.append(f"{name} is {there.get(name)!r} in the {what} and {here[name]!r} in the model")
    for name, title in (("kv_dtype", "keys and values"), ("compressed_dtype", "compressed keys")):
        kept = [str(record.get(name, record.get("dtype"))) for record in (there, here)]
        if kept[0] != kept[1] and any(name in record for record in (there, here)):  # or dtype says it
            found.append(f"{title} are kept in {name} {kept[0]} in the {what} and {kept[1]} here")
    if found:
        if len(found) > _NAMED:
            found[_NAMED:] = [f"and {len(found) - _NAMED} more"]
        raise ValueError(f"{folder}: the {what} was made by another model: {'; '.join(found)}. {advice}")


def _weights(there: Any, here: dict[str, str]) -> list[str]:
    there = there if isinstance(there, dict) else {}
    different = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if not different:
        return []
    share = "all" if len(different) == len({*there, *here}) else f"{len(different)} of {len({*there, *here})}"
    return [f"weights differ in {share} tensors, the first of them {different[0]}"]


def _fields(there: Any, here: dict[str, Any], what: str) -> list[str]:
    there = there if isinstance(there, dict) else {}
    a, b = _flat(there), _flat(here)
    return [
        f"config.{name} is {a.get(name)!r} in the {what} and {b.get(name)!r} in the model"
        for name in sorted({*a, *b})
        if a.get(name) != b.get(name)
    ]


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries under dotted names; lists are leaves."""
    leaves: dict[str, Any] = {}
    for name, value in record.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
