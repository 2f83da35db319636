"""Where a run begins, and what identifies it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..model import MiniCPMSALAConfig
from .recipe import Halo, Recipe, Stage

_FREE = (
    "probe_tokens",
    "micro_tokens",
    "recompute",
    "save_every",
    "keep",
    "guard",
    "scratch_tokens",
)  # may change between runs
_MINICPM = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "scale_emb",
    "scale_depth",
    "dim_model_base",
    "initializer_range",
    "eos_token_id",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Start:
    """Where a run begins. At most one of `teacher` (a Transformer to convert) and `init` (a hybrid: no HALO);
    neither trains the recipe's own Transformer first."""

    teacher: str = ""
    init: str = ""


@dataclass(frozen=True)
class RunConfig:
    """What identifies a run: the recipe without what may change between machines, and its start."""

    recipe: Recipe
    start: Start

    def as_dict(self) -> dict[str, Any]:
        record = self.recipe.as_dict()
        for name in _FREE:
            record.pop(name)
        for stage in record["stages"]:
            stage.pop("cp", None)
        record["stages"] = {stage["name"]: stage for stage in record["stages"]}
        return {
            "order": " ".join(record["stages"]),
            **record,
            "teacher": self.start.teacher,
            "init": self.start.init,
        }


def begun_with(recipe: Recipe, start: Start) -> Start:
    """The start, with the recipe's own teacher if neither a teacher nor a hybrid was given."""
    return replace(start, teacher=recipe.teacher) if not start.teacher and not start.init else start


def reduced(recipe: Recipe, start: Start) -> Recipe:
    """The recipe without the stages that its start makes needless.

    Raises ValueError for both a teacher and an init, or for a recipe that needs one of them.
    """
    if start.teacher and start.init:
        raise ValueError(
            "give --teacher (a Transformer to convert) or --init (a hybrid to go on with), not both"
        )
    own = any(isinstance(s, Stage) and s.dense_start for s in recipe.stages)
    if not own and not start.teacher and not start.init:
        raise ValueError(
            f"{recipe.name} starts from a trained Transformer: give its checkpoint with --teacher, or a "
            "converted hybrid with --init"
        )
    stages: Sequence[Stage | Halo] = recipe.stages
    if start.teacher or start.init:
        stages = [s for s in stages if isinstance(s, Halo) or not s.dense_start]
    if start.init:
        stages = [s for s in stages if isinstance(s, Stage)]
    return replace(recipe, stages=tuple(stages))


def own_transformer(recipe: Recipe) -> dict[str, Any]:
    """The recipe's own Transformer as the `config.json` of a MiniCPM model."""
    shape = MiniCPMSALAConfig(**recipe.model)
    return {
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        "bos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        **{name: getattr(shape, name) for name in _MINICPM},
    }
