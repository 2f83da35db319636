"""GGUF files (llama.cpp's) to checkpoint folders that transformers and we can read.

Weights are dequantised to float32. Tokenizers are rebuilt from the file: its `tokenizer.ggml.pre` says how
text is split before merging, which must be known, or ids would differ from those the model was trained on
without a word (transformers 5.24 reads a file of SmolLM2 without splitting digits: `"\\n\\n1"` becomes other
tokens).

It reads Llama and Qwen3 files with byte-level BPE; others are refused by name.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = ("llama", "qwen3")
# what the gguf package dequantises in NumPy and models are published in
QUANTISATIONS = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # token types that are never the result of merging
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def require_gguf() -> Any:
    """The `gguf` package. Raises ValueError with the command to run if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install 'opensala[gguf]'") from None
    return gguf


class GgufFile:
    """An opened GGUF file.

    Raises:
        ValueError: no GGUF file, a family or quantisation that is not supported (named), a field that cannot
            be expressed, a tensor that is missing or unknown.
    """

    def __init__(self, path: str | Path) -> None:
        gguf = require_gguf()
        self.path, self._dequantise = Path(path), gguf.quants.dequantize
        try:
            reader = gguf.GGUFReader(self.path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as a GGUF file ({error})") from error
        self.fields: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.family = self.fields.get("general.architecture")
        if self.family not in FAMILIES:
            raise ValueError(f"{path}: the family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        for tensor in reader.tensors:
            if tensor.tensor_type.name not in QUANTISATIONS:
                raise ValueError(
                    f"{path}: {tensor.name} is quantised as {tensor.tensor_type.name}; "
                    f"{', '.join(QUANTISATIONS)} can be read"
                )

    def _of(self, key: str, default: Any = None) -> Any:
        """A field of the family; ValueError for one that is missing and has no default."""
        found = self.fields.get(f"{self.family}.{key}", default)
        if found is None:
            raise ValueError(f"{self.path}: the field {self.family}.{key} is missing")
        return found

    def config(self) -> dict[str, Any]:
        """What `config.json` says of a model of this family."""
        scaling = self._of("rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.tensors:
            raise ValueError(
                f"{self.path}: rotary positions are scaled ({scaling}), which this reader does not carry "
                "over: give the checkpoint's own folder or hub name"
            )
        heads, hidden = int(self._of("attention.head_count")), int(self._of("embedding_length"))
        ids = {name: self.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
        return {
            "architectures": ["LlamaForCausalLM" if self.family == "llama" else "Qwen3ForCausalLM"],
            "model_type": self.family,
            "vocab_size": len(self.fields["tokenizer.ggml.tokens"]),
            "hidden_size": hidden,
            "intermediate_size": int(self._of("feed_forward_length")),
            "num_hidden_layers": int(self._of("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._of("attention.head_count_kv", heads)),
            "head_dim": int(self._of("attention.key_length", hidden // heads)),
            "hidden_act": "silu",
            "max_position_embeddings": int(self._of("context_length")),
            # a float32 in the file: its shortest decimal is what the model's authors wrote
            "rms_norm_eps": float(f"{self._of('attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(self._of("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["padding"],
        }

    def weights(self, advance: Callable[[], None] = lambda: None) -> Iterator[tuple[str, np.ndarray]]:
        """Names as transformers has them, and float32 arrays; `advance` is called after each."""
        config = self.config()
        wanted = set(_TOP) - ({"output.weight"} if config["tie_word_embeddings"] else set())
        missing = [name for name in wanted if name not in self.tensors]
        if missing:
            raise ValueError(f"{self.path}: the tensor {missing[0]} is missing")
        for name, tensor in self.tensors.items():
            array = np.array(self._dequantise(tensor.data, tensor.tensor_type), dtype=np.float32)
            if self.family == "llama" and (".attn_q." in name or ".attn_k." in name):
                heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
                array = unpermuted(array, heads)
            yield self._renamed(name), array
            advance()

    def _renamed(self, name: str) -> str:
        if name in _TOP:
            return _TOP[name]
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER:
            raise ValueError(f"{self.path}: the tensor {name} is not known in the family {self.family}")
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"

    def tokenizer(self) -> Any:
        """A transformers tokenizer with the file's vocabulary, merges, special tokens and chat template."""
        from tokenizers import AddedToken, Tokenizer, decoders
        from tokenizers.models import BPE
        from transformers import PreTrainedTokenizerFast

        kind = self.fields.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ValueError(
                f"{self.path}: its tokenizer is of the kind {kind!r}, only byte-level BPE ('gpt2') is "
                "rebuilt: put the model's tokenizer.json beside the file"
            )
        tokens, types = self.fields["tokenizer.ggml.tokens"], self.fields["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ", 1)) for merge in self.fields["tokenizer.ggml.merges"]]
        built = Tokenizer(BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
        built.normalizer, built.pre_tokenizer = _splitting(self.fields.get("tokenizer.ggml.pre"), self.path)
        built.decoder = decoders.ByteLevel()
        special = [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
        built.add_tokens(special)
        names = {}
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            number = self.fields.get(f"tokenizer.ggml.{theirs}_token_id")
            if number is not None:
                names[f"{ours}_token"] = tokens[number]
        if self.fields.get("tokenizer.ggml.add_bos_token") and "bos_token" in names:
            built.post_processor = _begun(names["bos_token"], self.fields["tokenizer.ggml.bos_token_id"])
        made = PreTrainedTokenizerFast(tokenizer_object=built, **names)
        made.chat_template = self.fields.get("tokenizer.chat_template")
        return made


def unpermuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads * head_dim, ...]` of a q or k projection in transformers' order.

    llama.cpp interleaves the two halves of each head, because its rotary positions turn neighbours.
    """
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))


def _splitting(pre: str | None, path: Path) -> tuple[Any, Any]:
    """Normalizer and pre-tokenizer of a `tokenizer.ggml.pre`, as the models' own tokenizer.json have them."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def split(numbers: str) -> Any:
        pattern = pre_tokenizers.Split(Regex(_WORDS % numbers), "isolated", invert=False)
        return pre_tokenizers.Sequence([pattern, plain])

    known = {
        "smollm": (
            None,
            lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
        ),
        "gpt-2": (None, lambda: words),
        "llama-bpe": (None, lambda: split(r"\p{N}{1,3}")),
        "qwen2": (normalizers.NFC(), lambda: split(r"\p{N}")),
    }
    if pre not in known:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre must be one of {', '.join(known)}, got {pre!r}: text would be split "
            "otherwise than in training; put the model's tokenizer.json beside the file"
        )
    normalizer, make = known[pre]
    return normalizer, make()


def _begun(token: str, number: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])


def unpack(path: str | Path, folder: str | Path, advance: Callable[[], None] = lambda: None) -> None:
    """Write a GGUF file as a checkpoint folder: config.json, model.safetensors (float32), tokenizer.

    A tokenizer.json beside the file is taken as it is. Raises ValueError as `GgufFile` does.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    file, target = GgufFile(path), Path(folder)
    config = file.config()
    beside = (Path(path).parent / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(Path(path).parent) if beside else file.tokenizer()
    if len(tokenizer) > config["vocab_size"]:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer):,} tokens and the model's vocabulary "
            f"{config['vocab_size']:,}: they are not of one model"
        )
    weights = {name: torch.from_numpy(array) for name, array in file.weights(advance)}
    rows = len(weights["model.embed_tokens.weight"])
    if rows != config["vocab_size"]:
        config["vocab_size"] = rows  # padded rows, which no token has
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
