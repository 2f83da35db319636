"""Which linear layers are quantised, by kind, and in which order: layers of one input together.

By default gates, the head and the state path stay as they are. A gate multiplies everything behind it; the
head decides between close tokens; what goes into a Lightning layer's state is summed over the whole text, so
an error there is not averaged out by anything. Norms and the embedding are never quantised.
"""

from collections.abc import Collection

from torch import nn

from ..model import MiniCPMSALAForCausalLM
from ..model.attention import SparseMixer

KINDS = {
    "feed-forward": "gate, up and down projection",
    "attention": "q, k, v and o projection of the sparse layers",
    "lightning": "q and o projection of the Lightning layers",
    "state": "k and v projection of the Lightning layers: what goes into the state",
    "gates": "output gates of both kinds of mixer",
    "head": "the language-model head, unless it is tied to the embedding",
}
DEFAULT_KINDS = ("feed-forward", "attention", "lightning")
# names below a decoder layer; those of one line have the same input
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_gate", "self_attn.z_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def checked_kinds(kinds: Collection[str], model: MiniCPMSALAForCausalLM) -> tuple[str, ...]:
    """`kinds` in the order of `KINDS`.

    Raises:
        ValueError: none, an unknown one, or the head of a model whose head is its embedding.
    """
    unknown = sorted({*kinds} - {*KINDS})
    if unknown or not kinds:
        found = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"--kinds must name some of {', '.join(KINDS)}, got {found}")
    if "head" in kinds and model.config.tie_word_embeddings:
        raise ValueError("--kinds head: the head of this model is its embedding, which stays as it is")
    return tuple(kind for kind in KINDS if kind in kinds)


def kind_of(mixer: nn.Module, name: str) -> str:
    """The kind of a linear layer by its name below a decoder layer with this mixer."""
    if name.startswith("mlp."):
        return "feed-forward"
    own = name.removeprefix("self_attn.")
    if own in ("o_gate", "z_proj"):
        return "gates"
    if isinstance(mixer, SparseMixer):
        return "attention"
    return "state" if own in ("k_proj", "v_proj") else "lightning"


def stages_of(layer: nn.Module, kinds: Collection[str]) -> list[tuple[str, ...]]:
    """The names of a decoder layer's linear layers of these kinds, in stages of one input."""
    mixer = layer.get_submodule("self_attn")
    there = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    stages = (tuple(n for n in stage if n in there and kind_of(mixer, n) in kinds) for stage in STAGES)
    return [stage for stage in stages if stage]


def left_out(model: MiniCPMSALAForCausalLM, quantised: Collection[str]) -> list[str]:
    """Names of the linear layers that are not quantised."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in quantised]
