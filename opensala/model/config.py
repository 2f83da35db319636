"""The configuration of MiniCPM-SALA, with the keys of the released `config.json`.

Defaults are those of the released 9B model. Some keys are extensions that a released file does not have and
that
are written only when they are in use: `attn_qk_norm`, `attn_scale_base`, `attention_mode`, `block_search` and
`sparse_config.lse`; so is any `rope_scaling` but null.
Everything is checked when the object is made, so that a bad file is refused before any weight is read.
"""

import math
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..ops import BlockSpec
from ..ops.sparse import LSE_KINDS, REGIONS, SEARCHES
from ..ops.sparse.spec import REGION
from .fields import RULES, SPARSE_RULES, Rule, check_choice, number, numbers
from .gptq_config import ask_for_our_loader

SPARSE = "minicpm4"
LIGHTNING = "lightning-attn"
_SPELLINGS = {SPARSE: SPARSE, LIGHTNING: LIGHTNING, "lightning": LIGHTNING, "lightning_attn": LIGHTNING}
ATTENTION_MODES = ("auto", "dense", "sparse")
RELEASED_SPARSE_LAYERS = (0, 9, 16, 17, 22, 29, 30, 31)
RELEASED_SPARSE_CONFIG = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}
_EXTENSION_DEFAULTS = {
    "attn_qk_norm": False,
    "attn_scale_base": None,
    "attention_mode": "auto",
    "block_search": "exact",
}
ROPE_SCALINGS: dict[str, dict[str, Rule]] = {  # the kinds that change frequencies once and for all
    "linear": {"factor": number(1e-3, 1e6)},
    "llama3": {
        "factor": number(1e-3, 1e6),
        "low_freq_factor": number(1e-3, 1e6),
        "high_freq_factor": number(1e-3, 1e6),
        "original_max_position_embeddings": number(1, 2**40),
    },
    # static only: equal factors, which divide the frequencies one by one (MiniCPM4)
    "longrope": {
        "short_factor": numbers,
        "long_factor": numbers,
        "original_max_position_embeddings": number(1, 2**40),
    },
}


class AttentionRule(NamedTuple):
    """Who attends sparsely: everybody, nobody, or whoever has `dense_len` tokens to look at."""

    mode: str
    dense_len: int

    def attends_sparsely(self, length: int) -> bool:
        """See `MiniCPMSALAConfig.attends_sparsely`."""
        return self.mode == "sparse" or (self.mode == "auto" and length >= self.dense_len)


class MiniCPMSALAConfig(PreTrainedConfig):
    """Configuration of a MiniCPM-SALA model (arXiv 2602.11761), keys as in the released `config.json`.

    `mixer_types` names the token mixer of each layer: `"minicpm4"` (InfLLM-V2 sparse attention) or
    `"lightning-attn"` (`"lightning"` and `"lightning_attn"` are accepted and normalised).
    `attention_mode`: `auto` attends densely below `sparse_config["dense_len"]` tokens and sparsely from
    there on; `dense` and `sparse` force one of them. `attn_qk_norm` adds a per-head RMSNorm on q and k of
    the sparse layers. `block_search`: `exact` scores every compressed key, `hierarchical` only those of
    promising regions, for contexts near a million tokens. `attn_scale_base` a (HypeNet; near 500) multiplies
    the logits of the sparse layers' attention at position t by log(t + a) / log(a). `rope_scaling` is null,
    or the `linear` or `llama3` scaling of a converted teacher. `sparse_config["lse"]` is `"coarse"`
    (released) or `"exact"`.

    Raises:
        ValueError: a field out of its range, naming the field, the value and what is allowed.
    """

    model_type = "minicpm_sala"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 73448
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    hidden_act: str = "silu"
    mixer_types: list[str] | None = None
    lightning_nh: int | None = None
    lightning_nkv: int | None = None
    lightning_head_dim: int | None = None
    lightning_scale: str | float | int = "1/sqrt(d)"
    lightning_use_rope: bool = True
    attn_use_rope: bool = False
    attn_use_output_gate: bool = True
    attn_qk_norm: bool = False
    attn_scale_base: float | int | None = None
    use_output_gate: bool = True
    use_output_norm: bool = True
    qk_norm: bool = True
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 524288
    initializer_range: float = 0.1
    scale_emb: float | int = 12
    scale_depth: float | int = 1.4
    dim_model_base: int | float = 256
    mup_denominator: int | float = 32
    sparse_config: dict[str, Any] | None = None
    attention_mode: str = "auto"
    block_search: str = "exact"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 2
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("layer_types", None)
        RULES["dtype"]("dtype", kwargs.get("torch_dtype"))  # its older name
        self._check_fields()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self._divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.lightning_nh is None:
            self.lightning_nh = self.num_attention_heads
        if self.lightning_nkv is None:
            self.lightning_nkv = self.num_key_value_heads
        if self.lightning_head_dim is None:
            self.lightning_head_dim = self.head_dim
        if self.eos_token_id is None:
            self.eos_token_id = [2, 73440] if self.vocab_size == 73448 else 2
        if self.mixer_types is None and self.num_hidden_layers == 32:
            self.mixer_types = [SPARSE if i in RELEASED_SPARSE_LAYERS else LIGHTNING for i in range(32)]
        self._check_mixers()
        self._check_sparse_config()
        ask_for_our_loader(kwargs)
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Validate every field that a model is built from; ValueError for the first that does not fit."""
        self._check_fields()
        self._divides(
            "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        assert self.lightning_nh and self.lightning_head_dim and self.head_dim, "filled in __post_init__"
        self._divides("lightning_nh", self.lightning_nh, "lightning_nkv", self.lightning_nkv)
        for field, used, dim in (
            ("head_dim", self.attn_use_rope, self.head_dim),
            ("lightning_head_dim", self.lightning_use_rope, self.lightning_head_dim),
        ):
            if used and dim % 2:
                raise ValueError(f"{field} must be even for rotary positions, got {dim}")
        check_choice("attention_mode", self.attention_mode, ATTENTION_MODES)
        check_choice("block_search", self.block_search, SEARCHES)
        if self.block_search == "hierarchical" and self.block_spec.num_blocks > REGIONS * REGION:
            raise ValueError(
                f"block_search 'hierarchical' finds at most {REGIONS * REGION} blocks, and "
                f"sparse_config.topk and window_size ask for {self.block_spec.num_blocks}: use 'exact'"
            )
        self._check_rope_scaling()
        self._check_token_ids()

    def _check_fields(self) -> None:
        """Kind and range of each field by itself."""
        for field, rule in RULES.items():
            rule(field, getattr(self, field))

    def _check_token_ids(self) -> None:
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            if (
                value is not None
                and max(value if isinstance(value, (list, tuple)) else [value]) >= self.vocab_size
            ):
                raise ValueError(f"{field} must be below vocab_size = {self.vocab_size}, got {value!r}")

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("rope_type", self.rope_scaling.get("type"))
        if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
            raise ValueError(
                f"rope_scaling must be null or of type {' or '.join(ROPE_SCALINGS)}, got "
                f"{self.rope_scaling!r}: "
                "other kinds depend on the length, which rotary positions here do not"
            )
        for key, rule in ROPE_SCALINGS[kind].items():
            rule(f"rope_scaling.{key}", self.rope_scaling.get(key))
        if kind == "longrope":
            self._check_longrope(self.rope_scaling)
        if kind == "llama3":
            low, high = self.rope_scaling["low_freq_factor"], self.rope_scaling["high_freq_factor"]
            if not low < high:
                raise ValueError(
                    f"rope_scaling.high_freq_factor must be above low_freq_factor = {low}, got {high}"
                )

    def _check_longrope(self, scaling: dict[str, Any]) -> None:
        short, original = scaling["short_factor"], scaling["original_max_position_embeddings"]
        if short != scaling["long_factor"] or original < self.max_position_embeddings:
            raise ValueError(
                "rope_scaling of type longrope must have equal short_factor and long_factor, and "
                "original_max_position_embeddings not below max_position_embeddings = "
                f"{self.max_position_embeddings}, got {original}: else it depends on the length"
            )
        assert self.head_dim, "filled in __post_init__"
        if len(short) != self.head_dim // 2:
            raise ValueError(
                f"rope_scaling.short_factor must have {self.head_dim // 2} numbers, half of head_dim, got "
                f"{len(short)}"
            )

    @staticmethod
    def _divides(name: str, value: int, by_name: str, by: int | None) -> None:
        if not by or by < 1 or value % by:
            raise ValueError(f"{name} = {value} must be a multiple of {by_name} = {by}")

    def _check_mixers(self) -> None:
        if self.mixer_types is None:
            raise ValueError(
                f"mixer_types is missing: give {self.num_hidden_layers} entries, each {SPARSE!r} or "
                f"{LIGHTNING!r}"
            )
        if len(self.mixer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mixer_types must have num_hidden_layers = {self.num_hidden_layers} entries, "
                f"got {len(self.mixer_types)}"
            )
        for i, name in enumerate(self.mixer_types):
            check_choice(f"mixer_types[{i}]", name, tuple(_SPELLINGS))
        self.mixer_types = [_SPELLINGS[name] for name in self.mixer_types]

    def _check_sparse_config(self) -> None:
        given = dict(self.sparse_config or {})
        for key in given:
            check_choice("a key of sparse_config", key, (*RELEASED_SPARSE_CONFIG, "lse"))
        merged = {**RELEASED_SPARSE_CONFIG, **given}
        if merged.get("lse", "coarse") == "coarse":
            merged.pop("lse", None)
        else:
            check_choice("sparse_config.lse", merged["lse"], LSE_KINDS)
        for key, rule in SPARSE_RULES.items():
            rule(f"sparse_config.{key}", merged[key])
        self._divides(
            "sparse_config.block_size",
            merged["block_size"],
            "sparse_config.kernel_stride",
            merged["kernel_stride"],
        )
        self._divides(
            "sparse_config.window_size",
            merged["window_size"],
            "sparse_config.block_size",
            merged["block_size"],
        )
        if merged["topk"] <= merged["init_blocks"]:
            raise ValueError(
                f"sparse_config.topk must exceed init_blocks = {merged['init_blocks']} "
                f"(the blocks that are always taken must fit), got {merged['topk']}"
            )
        self.sparse_config = merged

    @property
    def block_spec(self) -> BlockSpec:
        """The sizes of block selection, as the ops take them."""
        assert self.sparse_config is not None, "filled in __post_init__"
        return BlockSpec(**{name: self.sparse_config[name] for name in BlockSpec._fields})

    @property
    def dense_len(self) -> int:
        """Sequence length (tokens) from which `auto` attends sparsely."""
        assert self.sparse_config is not None, "filled in __post_init__"
        return self.sparse_config["dense_len"]

    def attends_sparsely(self, length: int) -> bool:
        """Whether a token of a text of `length` tokens attends to selected blocks (else to everything).

        The length is that of the whole prompt, or of the whole text at the end of a later turn, for all
        tokens of that prompt or turn; for a generated token it is its own: the tokens up to it, itself
        included.
        """
        return self.attention_rule.attends_sparsely(length)

    @property
    def attention_rule(self) -> "AttentionRule":
        """The rule of `attends_sparsely` by itself, for those who ask it often."""
        return AttentionRule(self.attention_mode, self.dense_len)

    @property
    def lse(self) -> str:
        assert self.sparse_config is not None, "filled in __post_init__"
        return self.sparse_config.get("lse", "coarse")

    @property
    def lightning_scale_value(self) -> float:
        """`lightning_scale` as a number."""
        assert self.lightning_head_dim is not None, "filled in __post_init__"
        named = {"1/sqrt(d)": 1 / math.sqrt(self.lightning_head_dim), "1/d": 1 / self.lightning_head_dim}
        return (
            named[self.lightning_scale]
            if isinstance(self.lightning_scale, str)
            else float(self.lightning_scale)
        )

    @property
    def residual_scale(self) -> float:
        """Factor on every mixer and feed-forward output: scale_depth / sqrt(layers)."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logit_divisor(self) -> float:
        return self.hidden_size / self.dim_model_base

    def is_sparse(self, layer: int) -> bool:
        assert self.mixer_types is not None, "filled in __post_init__"
        return self.mixer_types[layer] == SPARSE

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: every released key, extensions only when in use, so that any server
        of the format reads the file the same way."""
        written = super().to_diff_dict()
        everything = self.to_dict()
        for key in self.__class__.__annotations__:
            if key in everything:
                written[key] = everything[key]
        for key, default in _EXTENSION_DEFAULTS.items():
            if written.get(key) == default:
                del written[key]
        return written
