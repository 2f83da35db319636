"""The decoder layers for inference on a GPU: the same weights, fewer launches.

In decoding a launch costs more than the arithmetic behind it. So projections of the same input are one
product (q, k, v and the gate; the feed-forward's gate and up), and a residual connection is one step with the
norm behind it, across the borders of layers too. The merged weights are the storage, the parameters views of
it: nothing is kept twice, and checkpoints, names and training see what they always saw.

On a CPU nothing is gained: products there are bound by reading the weights, and a recorded step
(`engine/graphs.py`) has no launches to save. It is right there as well, and tests run it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import add_rms_norm, norm_gate, rms_norm, split_heads
from .attention import LightningMixer, SparseMixer
from .batch import ForwardBatch
from .layers import Linear, RMSNorm, SwiGLU, product
from .watch import ModuleWatch

if TYPE_CHECKING:
    from .modeling import MiniCPMSALADecoderLayer, MiniCPMSALAModel

_OURS = (SparseMixer, LightningMixer, Linear, RMSNorm, SwiGLU)


class Merged:
    """Several projections of one input as one: weight `[sum of N, K]`, and the bias if they have one."""

    def __init__(self, projections: Sequence[nn.Linear], device: torch.device) -> None:
        self.sizes = [p.out_features for p in projections]
        self.weight = _merge([p.weight for p in projections], device)
        self.bias = None
        if projections[0].bias is not None:
            self.bias = _merge([p.bias for p in projections], device)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The projections of x `[..., K]`, each a part of the same rows."""
        return product(x, self.weight, self.bias).split(self.sizes, -1)


def _merge(parameters: Sequence[Tensor], device: torch.device) -> Tensor:
    """One tensor of all, of which the parameters become views."""
    first = parameters[0]
    rows = sum(p.shape[0] for p in parameters)
    whole = torch.empty(rows, *first.shape[1:], dtype=first.dtype, device=device)
    row = 0
    for parameter in parameters:
        part = whole.narrow(0, row, parameter.shape[0])
        part.copy_(parameter)
        row += parameter.shape[0]
        parameter.data = part
    return whole


class MergedLayer:
    """One decoder layer over merged weights."""

    def __init__(self, layer: "MiniCPMSALADecoderLayer", device: torch.device) -> None:
        self.layer, self.mixer, mlp = layer, layer.self_attn, layer.mlp
        gate = getattr(self.mixer, "o_gate", None) or getattr(self.mixer, "z_proj", None)
        self.gated = gate is not None
        projections = [self.mixer.q_proj, self.mixer.k_proj, self.mixer.v_proj]
        self.projections = Merged([*projections, *([gate] if gate is not None else [])], device)
        self.gate_up = Merged([mlp.gate_proj, mlp.up_proj], device)
        self.heads, self.kv_heads = (
            p.out_features // self.mixer.head_dim for p in (self.mixer.q_proj, self.mixer.k_proj)
        )

    def mix(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """The mixer over normalised x `[1, T, W]`: `[1, T, W]`."""
        mixer, config = self.mixer, self.mixer.config
        rows = product(x, self.projections.weight, self.projections.bias)
        inner = sum(self.projections.sizes[:3])
        gate = rows[..., inner:] if self.gated else None
        rows = rows[..., :inner]
        if isinstance(mixer, SparseMixer):
            q, k, v = self._heads(rows, batch, config.attn_qk_norm, config.attn_use_rope)
            q = mixer.scaled(q, batch.positions)
            o, weight = mixer.attend_pages(q[0], k[0], v[0], batch), None
        else:
            q, k, v = self._heads(rows, batch, config.qk_norm, config.lightning_use_rope)
            k, v = mixer.repeated(k, v)
            o = mixer.attend_slots(q[0], k[0], v[0], batch)
            weight = mixer.o_norm.weight if config.use_output_norm else None
        o = o.flatten(-2)[None]
        if gate is not None or weight is not None:
            o = norm_gate(o, weight, gate, config.rms_norm_eps)
        return mixer.o_proj(o)

    def _heads(
        self, rows: Tensor, batch: ForwardBatch, norm: bool, rope: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.mixer
        cos, sin = batch.angles(mixer.head_dim, mixer.config) if rope else (None, None)
        wq, wk = (mixer.q_norm.weight, mixer.k_norm.weight) if norm else (None, None)
        return split_heads(rows, self.heads, self.kv_heads, wq, wk, cos, sin, mixer.config.rms_norm_eps)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward over normalised x `[1, T, W]`."""
        mlp = self.layer.mlp
        return mlp.down_proj(mlp.activate(*self.gate_up(x)))


class MergedLayers:
    """All layers of a model and its last norm, over merged weights. See the module.

    Args:
        model: its parameters become views of merged ones, and are moved to `device`, if they lie elsewhere.
        device: where the merged weights lie.

    Raises:
        ValueError: a layer has a module with weights of another kind (an adapter, a quantized projection).
    """

    def __init__(self, model: "MiniCPMSALAModel", device: torch.device) -> None:
        self.model = model
        modules = [*model.layers.modules(), model.norm]
        known = (*_OURS, nn.ModuleList, *{type(layer) for layer in model.layers})
        for m in modules:
            if type(m) not in known and any(True for _ in m.parameters()):
                raise ValueError(f"the model has a module of another kind, {type(m).__name__}")
        with torch.inference_mode(False), torch.no_grad():
            self.layers = []
            for layer in model.layers:
                self.layers.append(MergedLayer(layer, device))  # type: ignore[arg-type]  # see `modeling`
                if device.type == "cuda":  # what the parts took is no room for the next whole
                    torch.cuda.empty_cache()
        self.device = self.layers[0].gate_up.weight.device  # `cuda` has become `cuda:0`
        self._watch = ModuleWatch(modules)
        self.addresses = self._watch.addresses()  # of all parameters

    @property
    def is_current(self) -> bool:
        """Whether the parameters lie where they lay (else merge them again)."""
        return self.addresses == self._watch.addresses()

    def disturbed(self) -> str | None:
        """Why the layers have to run one by one, or None."""
        return self._watch.disturbed()

    def run(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """Scaled embeddings `[1, T, W]` of a batch's tokens to normalised hidden states `[1, T, W]`."""
        y: Tensor | None = None
        scale = self.model.config.residual_scale
        for merged in self.layers:
            x, h = _norm_behind(x, y, scale, merged.layer.input_layernorm)
            y = merged.mix(h, batch)
            x, h = _norm_behind(x, y, scale, merged.layer.post_attention_layernorm)
            y = merged.feed_forward(h)
        return _norm_behind(x, y, scale, self.model.norm)[1]


def _norm_behind(x: Tensor, y: Tensor | None, scale: float, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """x + scale * y (x itself without y) and its norm."""
    if y is None:
        return x, rms_norm(x, norm.weight, norm.eps)
    return add_rms_norm(x, y, scale, norm.weight, norm.eps)
