"""A decoding step as one call of the compiled kernels: no Python between the layers.

`NativeSteps` describes a model's weights to `ops/native/step.cpp` once, and hands it the numbers of each
step.
It runs steps of few tokens on a CPU, of any number of sequences, in any mode; weights may be float32,
bfloat16, float16 or codes of 8 and 4 bits (`ops/linear/quantised.py`). The bits are those of the layers run
one by one. What it does not take (hooks, adapters, foreign modules, keys and values kept for a rollback, ...)
runs as before, and why is said once.
"""

import ctypes
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model import MiniCPMSALAForCausalLM
from ..model.attention import LightningMixer, SparseMixer, log_growth
from ..model.batch import BatchNumbers, BatchRow
from ..model.layers import Embedding, Linear, RMSNorm, SwiGLU, rotary_angles
from ..model.modeling import MiniCPMSALADecoderLayer
from ..model.quantised import QuantisedLinear
from ..model.storage import CacheStorage
from ..model.watch import ModuleWatch
from ..ops.backends import planned_backend
from ..ops.linear.quantised import KINDS as CODE_KINDS
from ..ops.native import library
from ..ops.native.tensors import KINDS, threads

logger = logging.getLogger("opensala")

MOST_TOKENS = 64  # of a step: beyond, arithmetic outweighs Python
LOOK_EVERY = 16  # steps: looking at all modules takes as long as the Python of a sequence or two
_LIKE = torch.empty(0)  # activations: float32 on a CPU
_said: set[str] = set()


class NotNative(Exception):
    """Why a model's steps cannot run in one call."""


_POINTER, _NUMBER, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Weights(ctypes.Structure):
    """`Weights` of ops/native/linear.h."""

    _fields_ = [
        ("data", _POINTER),
        ("kind", _NUMBER),
        ("scales", _POINTER),
        ("zeros", _POINTER),
        ("group", _NUMBER),
        ("bias", _POINTER),
        ("outer", _NUMBER),
        ("inner", _NUMBER),
    ]


_LINEARS = ("q", "k", "v", "gate", "o", "mlp_gate", "mlp_up", "down")


class _Layer(ctypes.Structure):
    """`Layer` of ops/native/step.cpp."""

    _fields_ = [
        ("sparse", _NUMBER),
        ("input_norm", _POINTER),
        ("post_norm", _POINTER),
        *((name, _Weights) for name in _LINEARS),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "o_norm")),
        *((name, _NUMBER) for name in ("heads", "kv_heads", "dim", "rotates")),
        *((name, _POINTER) for name in ("keys", "values", "k1", "k2", "states", "decay")),
    ]


_SCALES = ("eps", "residual_scale", "embedding_scale", "logit_divisor", "lightning_scale", "factor")
_BLOCKS = ("block", "stride", "kernel", "init", "window_blocks", "num_blocks", "coarse")


class _Model(ctypes.Structure):
    """`Model` of ops/native/step.cpp."""

    _fields_ = [
        ("layers", _POINTER),
        *((name, _NUMBER) for name in ("count", "hidden", "inner")),
        ("embedding", _Weights),
        ("head", _Weights),
        ("norm", _POINTER),
        *((name, _REAL) for name in _SCALES),
        ("kind", _NUMBER),
        ("level_kind", _NUMBER),
        ("kv", _NUMBER * 12),
        *((name, _NUMBER) for name in _BLOCKS),
    ]


_KEPT = {torch.float32, torch.bfloat16, torch.int8}  # dtypes of keys and values
_INTEGERS = ("ids", "bounds", "lengths", "pages", "sparse", "read", "write")


class _Batch(ctypes.Structure):
    """`Batch` of ops/native/step.cpp."""

    _fields_ = [
        *((name, _POINTER) for name in _INTEGERS),
        ("cos", _POINTER * 2),
        ("sin", _POINTER * 2),
        ("growth", _POINTER),
        *((name, _NUMBER) for name in ("sequences", "width", "any_sparse")),
        ("hidden", _POINTER),
        ("logits", _POINTER),
        ("kept", _POINTER),
        ("chosen", _POINTER),
    ]


@dataclass(frozen=True)
class NativeStep:
    """What a step gave.

    Attributes:
        hidden: normalised hidden states `[T, W]`.
        logits: `[T, V]`, if they were wanted.
        recorded: keys and values `[T, H, D]` of each Lightning layer, if they were wanted.
        chosen: blocks `[T, Hkv, K]` of each sparse layer, if they were wanted; rows of dense sequences mean
            nothing.
    """

    hidden: Tensor
    logits: Tensor | None
    recorded: dict[int, tuple[Tensor, Tensor]] | None
    chosen: dict[int, Tensor] | None


class _Described:
    """A model's weights as `opensala_step` takes them, and the tensors that must stay where they are."""

    def __init__(self, model: MiniCPMSALAForCausalLM, storage: CacheStorage) -> None:
        self.kept: list[Tensor] = []
        config, base = model.config, model.model
        layers = [self._layer(layer, storage) for layer in base.layers]  # type: ignore[arg-type]
        self.layers = (_Layer * len(layers))(*layers)
        spec, made = config.block_spec, _Model()
        made.layers, made.count = ctypes.addressof(self.layers), len(layers)
        made.hidden, made.inner = config.hidden_size, config.intermediate_size
        made.embedding = self._plain(base.embed_tokens.weight, None)
        made.head = self._linear(model.lm_head)
        made.norm = self._floats(base.norm.weight)
        made.eps, made.residual_scale = config.rms_norm_eps, config.residual_scale
        made.embedding_scale, made.logit_divisor = config.scale_emb, config.logit_divisor
        assert config.head_dim, "filled by the configuration"
        made.lightning_scale = config.lightning_scale_value
        made.factor = (1.0 / math.sqrt(config.head_dim)) * math.log2(math.e)
        made.block, made.stride, made.kernel = spec.block_size, spec.kernel_stride, spec.kernel_size
        made.init, made.window_blocks = spec.init_blocks, spec.window_blocks
        made.num_blocks, made.coarse = spec.num_blocks, config.lse == "coarse"
        made.kind, made.level_kind = KINDS[storage.kv_dtype], KINDS[storage.compressed_dtype]
        for pool in list(storage.kv.values())[:1]:
            made.kv = (_NUMBER * 12)(*(stride for x in pool for stride in x.stride()[:3]))
        self.model = made

    def _layer(self, layer: MiniCPMSALADecoderLayer, storage: CacheStorage) -> _Layer:
        mixer, mlp, made = layer.self_attn, layer.mlp, _Layer()
        config = mixer.config
        made.input_norm = self._floats(layer.input_layernorm.weight)
        made.post_norm = self._floats(layer.post_attention_layernorm.weight)
        sparse = isinstance(mixer, SparseMixer)
        gate = getattr(mixer, "o_gate" if sparse else "z_proj", None)
        parts = [mixer.q_proj, mixer.k_proj, mixer.v_proj, gate, mixer.o_proj]
        parts += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        for name, part in zip(_LINEARS, parts, strict=True):
            if part is not None:
                setattr(made, name, self._linear(part))
        for name in ("q_norm", "k_norm", "o_norm"):
            norm = getattr(mixer, name, None)
            setattr(made, name, None if norm is None else self._floats(norm.weight))
        made.sparse, made.dim = sparse, mixer.head_dim
        made.heads, made.kv_heads = made.q.outer // made.dim, made.k.outer // made.dim
        made.rotates = config.attn_use_rope if sparse else config.lightning_use_rope
        if isinstance(mixer, LightningMixer):
            made.states = self._address(storage.states[mixer.layer])
            made.decay = self._floats(mixer.decay(storage.states[mixer.layer].device))
        else:
            pool = storage.kv[mixer.layer]
            made.keys, made.values, made.k1, made.k2 = (self._address(x) for x in pool)
        return made

    def _address(self, x: Tensor) -> int:
        self.kept.append(x)
        return x.data_ptr()

    def _floats(self, x: Tensor) -> int:
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise NotNative(f"a norm's weight is {_short(x.dtype)}, and it takes float32")
        return self._address(x.detach())

    def _linear(self, module: nn.Module) -> _Weights:
        bias = getattr(module, "bias", None)
        if not isinstance(module, QuantisedLinear):
            return self._plain(module.weight, bias)  # type: ignore[arg-type]
        codes = module.pack()
        if codes is None:
            raise NotNative("a layer's codes are in an order that the compiled product does not take")
        made = _Weights(kind=CODE_KINDS[codes.bits], group=min(codes.group, max(1, codes.inner)))
        made.data, made.scales = self._address(codes.codes), self._address(codes.scales)
        made.zeros = None if codes.zeros is None else self._address(codes.zeros)
        made.bias = None if bias is None else self._floats(bias)
        made.outer, made.inner = codes.shape
        return made

    def _plain(self, weight: Tensor, bias: Tensor | None) -> _Weights:
        if not weight.is_floating_point() or weight.dtype not in KINDS or not weight.is_contiguous():
            raise NotNative(f"a weight is {_short(weight.dtype)}, of {list(weight.stride())} elements apart")
        outer, inner = weight.shape
        made = _Weights(kind=KINDS[weight.dtype], group=1, outer=outer, inner=inner)
        made.data = self._address(weight.detach())
        made.bias = None if bias is None else self._floats(bias)
        return made


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_OURS = (MiniCPMSALADecoderLayer, SparseMixer, LightningMixer, RMSNorm, SwiGLU, nn.ModuleList)


class _Angles:
    """cos and sin of rotary positions `[T, dim / 2]`, looked up in blocks that are computed once."""

    _BLOCK, _MOST = 256, 64  # positions of a block; blocks kept

    def __init__(self, dim: int, theta: float, scaling: dict[str, Any] | None) -> None:
        self._dim, self._theta, self._scaling = dim, theta, scaling
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cos = np.empty((len(positions), self._dim // 2), np.float32)
        sin = np.empty_like(cos)
        for t, position in enumerate(positions.tolist()):
            block, place = divmod(position, self._BLOCK)
            found = self._blocks.get(block) or self._made(block)
            cos[t], sin[t] = found[0][place], found[1][place]
        return cos, sin

    def _made(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        positions = torch.arange(block * self._BLOCK, (block + 1) * self._BLOCK)
        cos, sin = rotary_angles(positions[None], self._dim, self._theta, self._scaling)
        self._blocks[block] = cos[0].numpy(), sin[0].numpy()
        if len(self._blocks) > self._MOST:
            self._blocks.popitem(last=False)
        return self._blocks[block]


class NativeSteps:
    """The steps of a model over a storage, in one call each.

    Whether the model is still as it was (its modules, and where its weights lie) is looked at when a request
    has come and every `LOOK_EVERY` steps; a hook is seen at once. Weights that change in place are read anew
    by every step.

    Attributes:
        reason: why no step of this model runs so, or None.
        num_steps: how many did.
    """

    def __init__(self, model: MiniCPMSALAForCausalLM, storage: CacheStorage) -> None:
        self.model, self.storage, self.num_steps = model, storage, 0
        modules = [*model.model.layers.modules(), model.model.norm, model.lm_head, model.model.embed_tokens]
        self.reason = self._unsuited(modules)
        self._described: _Described | None = None
        self._addresses: list[int] = []
        self._steps_left, self._hooks_made = 0, 0  # until the next look; hooks that there ever were
        self._watch = ModuleWatch(modules)
        self._quantised = [m for m in modules if isinstance(m, QuantisedLinear)]
        config = model.config
        # As they are now and later: transformers asks for each attribute of a configuration in Python.
        self._settings = vars(config)
        self._page_size = config.block_spec.block_size
        used = (
            (config.lightning_use_rope, config.lightning_head_dim),
            (config.attn_use_rope, config.head_dim),
        )
        self._angles = [
            _Angles(dim, config.rope_theta, config.rope_scaling) if rotates and dim else None
            for rotates, dim in used
        ]
        self._repeats = (config.lightning_nh or 1) // (config.lightning_nkv or 1)
        self._lightning = [i for i in range(config.num_hidden_layers) if not config.is_sparse(i)]

    def _unsuited(self, modules: Sequence[nn.Module]) -> str | None:
        """Why this model cannot run so, as far as that never changes."""
        config, storage = self.model.config, self.storage
        if self.model.device.type != "cpu" or any(d.type != "cpu" for d in storage.devices):
            return "they are for a CPU"
        for m in modules:
            known = type(m) in _OURS or isinstance(m, (Linear, Embedding, QuantisedLinear))
            if not known and list(m.parameters()):
                return f"the model has a module of another kind, {type(m).__name__}"
        if config.hidden_act != "silu":
            return f"the feed-forward's activation is {config.hidden_act}, and they know silu"
        if self.model.compute_dtype != torch.float32:
            return f"the model computes in {_short(self.model.compute_dtype)}"
        if storage.kv_device is not None:
            return f"keys and values lie on {storage.kv_device}"
        if {storage.compressed_dtype, storage.kv_dtype} - _KEPT:
            return f"keys and values are {_short(storage.kv_dtype)}"
        return None

    def run(
        self, ids: np.ndarray, rows: Sequence[BatchRow], *, keep: bool, logits: bool, chosen: bool = False
    ) -> NativeStep | None:
        """Compute a step, or None if it has to run layer by layer.

        Args:
            ids: `[T]` int32 tokens.
            keep: whether keys and values of the Lightning layers are wanted for a rollback.
            logits: whether those of every token are wanted.
            chosen: whether the selected blocks are wanted.
        """
        why = self.reason or self._asked_otherwise() or self._look()
        if why is not None:
            self._say(why)
            return None
        if len(ids) > MOST_TOKENS:
            return None
        self._steps_left -= 1
        assert self._described is not None, "made by the look"
        self.num_steps += 1
        return self._call(self._described, ids, rows, keep, logits, chosen)

    def look_again(self) -> None:
        """See whatever has changed about the model before the next step."""
        self._steps_left = 0

    def _look(self) -> str | None:
        """Why the layers have to run one by one, or None: then the model is described as it is."""
        if self._steps_left > 0 and self._hooks_made == RemovableHandle.next_id:
            return None
        self._steps_left, self._hooks_made = 0, RemovableHandle.next_id
        why = self._watch.disturbed()
        if why is not None:
            return why
        base = self.model.model
        if base._merged is not None:  # drops merged weights that parameters are no longer part of
            base.merged_layers(base.embed_tokens.weight)
        addresses = self._places()
        if addresses != self._addresses or self._described is None:
            try:
                self._described = _Described(self.model, self.storage)
            except NotNative as error:
                self.reason = str(error)
                return self.reason
            self._addresses = addresses
        self._steps_left = LOOK_EVERY
        return None

    def _places(self) -> list[int]:
        """Where all weights lie."""
        codes = [p.codes.data_ptr() for m in self._quantised if (p := m.pack()) is not None]
        return self._watch.addresses() + codes

    def _call(
        self,
        described: _Described,
        ids: np.ndarray,
        rows: Sequence[BatchRow],
        keep: bool,
        logits: bool,
        chosen: bool,
    ) -> NativeStep:
        settings, tokens = self._settings, len(ids)
        now = BatchNumbers.of(rows, self._page_size)
        batch = _Batch(sequences=len(rows), width=now.pages.shape[1], any_sparse=bool(now.sparse.any()))
        arrays: dict[str, np.ndarray] = {"ids": ids, **now.__dict__}
        for name in _INTEGERS:
            setattr(batch, name, arrays[name].ctypes.data)
        held = []
        for i, angles in enumerate(self._angles):
            if angles is not None:
                held.append(angles.at(now.positions))
                batch.cos[i], batch.sin[i] = (x.ctypes.data for x in held[-1])
        if settings["attn_scale_base"] is not None:
            growth = log_growth(torch.from_numpy(now.positions), settings["attn_scale_base"]).float()
            batch.growth = growth.data_ptr()
        hidden = torch.empty(tokens, settings["hidden_size"])
        batch.hidden = hidden.data_ptr()
        scores = torch.empty(tokens, settings["vocab_size"]) if logits else None
        batch.logits = None if scores is None else scores.data_ptr()
        kept = None
        if keep:
            width = (settings["lightning_nkv"] or 1) * (settings["lightning_head_dim"] or 1)
            kept = torch.empty(len(self._lightning), 2, tokens, width)
            batch.kept = kept.data_ptr()
        blocks = self._blocks(tokens) if chosen and batch.any_sparse else None
        batch.chosen = None if blocks is None else blocks.data_ptr()
        places = (ctypes.c_void_p(ctypes.addressof(x)) for x in (described.model, batch))
        library().call("opensala_step", *places, threads())
        return NativeStep(
            hidden,
            scores,
            None if kept is None else self._recorded(kept),
            None if blocks is None else dict(zip(self.storage.kv, blocks, strict=True)),
        )

    def _blocks(self, tokens: int) -> Tensor:
        """Room for the blocks that each sparse layer selects."""
        config = self.model.config
        heads, most = config.num_key_value_heads, config.block_spec.num_blocks
        assert heads, "filled by the configuration"
        return torch.zeros(len(self.storage.kv), tokens, heads, most, dtype=torch.int32)

    def _recorded(self, kept: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """As `ForwardBatch.recorded`: keys and values `[T, H, D]` by layer."""
        heads = kept.unflatten(-1, (-1, self.model.config.lightning_head_dim or 1))
        heads = heads.repeat_interleave(self._repeats, 3) if self._repeats > 1 else heads
        return {layer: (k, v) for layer, (k, v) in zip(self._lightning, heads, strict=True)}

    def _asked_otherwise(self) -> str | None:
        """What else was asked for at the moment, or None."""
        search = self._settings["block_search"]
        if search != "exact":
            return f"block_search is {search}"
        backend = planned_backend(_LIKE)
        return None if backend == "cpp" else f"the backend is {backend}"

    def _say(self, why: str) -> None:
        if self.model.device.type == "cpu" and why not in _said:
            _said.add(why)
            logger.info("decoding steps run layer by layer, not in one call: %s", why)
