"""The recipes by name: every stage of a training as one frozen object, made by a function.

`minicpm_sala_9b` states the published training (arXiv 2602.11761, Table 1 and section 3), `tiny` the same
stages for a model that two CPU cores train in minutes, `smollm2_135m` for a small published Transformer. What
the paper leaves open is chosen here and named in docs/training.md.
"""

from dataclasses import replace
from typing import Any

from ..convert.config import ConvertConfig, Phase, Probes
from ..convert.config import halo as convert_halo
from ..convert.config import smollm2_135m as convert_smollm2
from ..model.config import LIGHTNING, SPARSE, check_choice
from .recipe import Halo, Recipe, Source, Stage
from .schedule import Schedule

K = 1024


def _pretraining() -> tuple[Source, ...]:
    return (Source("web", 0.6), Source("code", 0.2), Source("knowledge", 0.2))


def _decay() -> tuple[Source, ...]:
    return (
        Source("web", 0.3),
        Source("code", 0.15),
        Source("selected", 0.3),
        Source("pdf", 0.15),
        Source("synthetic", 0.1),
    )


def _long(length: int) -> tuple[Source, ...]:
    return tuple(replace(s, long_from=length // 2, long_factor=8.0) for s in _decay())


def _instructions(length: int) -> tuple[Source, ...]:
    made = tuple(Source(f"{kind}-long", 0.05, f"synthetic:{kind}") for kind in ("facts", "tracing", "cross"))
    return (
        *(
            Source(name, 0.17)
            for name in ("code-sft", "mathematics", "knowledge-sft", "function-calls", "dialogue")
        ),
        *made,
    )


def minicpm_sala_9b() -> Recipe:
    """MiniCPM-SALA as published: 1,956B tokens from an intermediate MiniCPM-4.0 checkpoint (the teacher to
    give)."""
    b, m = 1_000_000_000, 1_000_000

    def long(name: str, length: int, tokens: float, batch: float, peak: float, last: float, cp: int) -> Stage:
        return Stage(
            name,
            length,
            int(tokens * b),
            int(batch * m),
            Schedule("exponential", peak, last),
            _long(length),
            sparse=True,
            cp=cp,
        )

    def sft(name: str, length: int, tokens: float, batch: float, fresh: bool, cp: int) -> Stage:
        return Stage(
            name,
            length,
            int(tokens * b),
            int(batch * m),
            Schedule("cosine", 1e-3, 1e-4, warmup=1000),
            _instructions(length),
            sparse=True,
            chat=True,
            fresh_optimizer=fresh,
            cp=cp,
        )

    return Recipe(
        "minicpm_sala_9b",
        {},
        (
            Halo(
                ConvertConfig(
                    "",
                    keep=8,
                    dtype="bfloat16",
                    compute="bfloat16",
                    device="cuda",
                    distill=Phase(20_000, 96, 3e-5, 1e-5),  # HALO's rate for 9B
                )
            ),
            Stage(
                "stable",
                4 * K,
                int(314.6 * b),
                int(7.8 * m),
                Schedule("constant", 7.5e-3, warmup=2000),
                _pretraining(),
                fresh_optimizer=True,
            ),
            Stage(
                "short_decay",
                4 * K,
                int(1006.6 * b),
                int(7.8 * m),
                Schedule("exponential", 7.5e-3, 3.75e-4),
                _decay(),
            ),
            long("long_decay_32k", 32 * K, 102.2, 7.8, 3e-4, 2e-4, 1),
            long("long_decay_160k", 160 * K, 62.9, 9.8, 2e-4, 1e-4, 4),
            long("long_decay_520k", 520 * K, 50.6, 10.1, 1e-4, 3.75e-5, 16),
            sft("sft_64k", 64 * K, 204.5, 15.7, True, 2),
            sft("sft_140k", 140 * K, 213.3, 17.8, False, 4),
        ),
        micro_tokens=32 * K,
    )


def halo() -> Recipe:
    """HALO as published (arXiv 2601.22156): a teacher's conversion, all parameters distilled, then 500 steps
    of 128 x 16,384 tokens at 1e-5 (1.05B tokens). Kept layers attend densely, as there."""
    conversion = replace(
        convert_halo(""),
        dtype="bfloat16",
        compute="bfloat16",
        device="cuda",
        distill=Phase(20_000, 96, 3e-5, 1e-5),
    )
    long = Stage(
        "long",
        16 * K,
        500 * 128 * 16 * K,
        128 * 16 * K,
        Schedule("constant", 1e-5),
        (Source("long", 1.0),),
        fresh_optimizer=True,
    )
    return Recipe("halo", {}, (Halo(conversion), long), micro_tokens=16 * K, scratch_tokens=0)


TINY_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ "
    "eos_token }}"
    "{% else %}{{ m['content'] }}\nAnswer:{% endif %}{% endfor %}"
)


def _tiny_model() -> dict[str, Any]:
    kept = (0, 5, 11)
    return {
        "vocab_size": 2048,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "lightning_nh": 3,
        "lightning_nkv": 3,
        "lightning_head_dim": 32,
        "mixer_types": [SPARSE if i in kept else LIGHTNING for i in range(12)],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 48,
        "initializer_range": 0.08,
        "eos_token_id": 2,
        "max_position_embeddings": 65536,
        "sparse_config": {"block_size": 64, "window_size": 128, "topk": 6, "dense_len": 768},
    }


def tiny() -> Recipe:
    """All stages for a model of about two million parameters, from the texts of the Python installation."""
    text = (Source("code", 0.4, "python:code"), Source("prose", 0.6, "python:prose"))
    facts = Source("facts", 0.3, "synthetic:facts")

    def train(
        name: str, length: int, tokens: int, schedule: Schedule, mixture: tuple[Source, ...], **more: Any
    ) -> Stage:
        return Stage(name, length, tokens, 4 * K, schedule, mixture, **more)

    def long(name: str, length: int, tokens: int, peak: float, last: float) -> Stage:
        mixture = (*(replace(s, long_from=length // 2, long_factor=4.0) for s in text), facts)
        return train(name, length, tokens, Schedule("exponential", peak, last), mixture, sparse=True)

    def sft(name: str, length: int, tokens: int, fresh: bool) -> Stage:
        made = tuple(
            Source(kind, share, f"synthetic:{kind}")
            for kind, share in (("facts", 0.6), ("tracing", 0.2), ("cross", 0.2))
        )
        return train(
            name,
            length,
            tokens,
            Schedule("cosine", 2e-3, 2e-4, warmup=5),
            made,
            sparse=True,
            chat=True,
            fresh_optimizer=fresh,
        )

    halo = ConvertConfig(
        "",
        length=256,
        align=Phase(60, 4, 3e-3, 3e-4, warmup=10),
        distill=Phase(60, 4, 2e-3, 2e-4, warmup=10),
        probes=Probes(256, 8, 8),
        save_every=20,
    )
    return Recipe(
        "tiny",
        _tiny_model(),
        (
            train(
                "dense",
                256,
                320_000,
                Schedule("linear", 5e-3, 3e-3, warmup=10),
                (*text, facts),
                dense_start=True,
                fresh_optimizer=True,
            ),
            Halo(halo),
            train(
                "stable",
                256,
                240_000,
                Schedule("constant", 3e-3, warmup=10),
                (*text, facts),
                fresh_optimizer=True,
            ),
            train("short_decay", 256, 240_000, Schedule("exponential", 3e-3, 1e-3), (*text, facts)),
            long("long_decay_1k", 1 * K, 120_000, 1e-3, 8e-4),
            long("long_decay_2k", 2 * K, 120_000, 8e-4, 6e-4),
            long("long_decay_4k", 4 * K, 120_000, 6e-4, 4e-4),
            sft("sft_1k", 1 * K, 140_000, True),
            sft("sft_2k", 2 * K, 140_000, False),
        ),
        micro_tokens=4 * K,
        recompute=False,
        dtype="float32",
        probe_tokens=24 * K,
        save_every=20,
        keep=2,
        chat_template=TINY_TEMPLATE,
        scratch_tokens=0,
    )


def _smollm2(name: str, conversion: ConvertConfig, scale: int, batch_tokens: int) -> Recipe:
    """The stages behind SmolLM2's conversion: `scale` times 2M tokens, `batch_tokens` in a step."""
    text = (Source("text", 0.8, "python:prose"), Source("code", 0.2, "python:code"))
    asked = Source("questions", 0.25, "synthetic:questions")

    def stage(name: str, length: int, tokens: int, schedule: Schedule, **more: Any) -> Stage:
        mixture: tuple[Source, ...] = (*text, asked)
        if more.get("sparse"):
            mixture = (*(replace(s, long_from=length // 2, long_factor=8.0) for s in text), asked)
        batch = max(batch_tokens, length)
        return Stage(name, length, scale * tokens, batch, schedule, more.pop("mixture", mixture), **more)

    def long(name: str, length: int, tokens: int, peak: float, last: float) -> Stage:
        return stage(name, length, tokens, Schedule("exponential", peak, last), sparse=True)

    chat = (
        Source("questions", 0.7, "synthetic:questions"),
        *(Source(kind, 0.1, f"synthetic:{kind}") for kind in ("facts", "tracing", "cross")),
    )
    return Recipe(
        name,
        {},
        (
            Halo(conversion),
            stage("stable", 2 * K, 600_000, Schedule("constant", 1e-4, warmup=10), fresh_optimizer=True),
            long("long_decay_8k", 8 * K, 500_000, 1e-4, 7e-5),
            long("long_decay_16k", 16 * K, 300_000, 7e-5, 5e-5),
            long("long_decay_32k", 32 * K, 200_000, 5e-5, 3e-5),
            stage(
                "sft_8k",
                8 * K,
                400_000,
                Schedule("cosine", 5e-5, 5e-6, warmup=5),
                mixture=chat,
                sparse=True,
                chat=True,
                fresh_optimizer=True,
            ),
        ),
        micro_tokens=8 * K,
        probe_tokens=64 * K,
        save_every=20,
        keep=2,
        scratch_tokens=0,
        teacher="smollm2-135m",
    )


def smollm2_135m() -> Recipe:
    """SmolLM2-135M in hours of two CPU cores: 2.4M tokens of conversion, 2M behind it."""
    whole = convert_smollm2("")
    assert whole.long is not None, "it has three phases"
    conversion = replace(
        whole,
        align=replace(whole.align, steps=122, batch=8, seconds=None),
        distill=replace(whole.distill, steps=366, batch=4, seconds=None),
        long=replace(whole.long, steps=98, batch=1, seconds=None),
        save_every=20,
        validate_every=0,
    )
    return replace(_smollm2("smollm2_135m", conversion, 1, 8 * K), dtype="float32")


def smollm2_135m_gpu() -> Recipe:
    """The same with a hundred times the tokens, on a GPU."""
    whole = convert_smollm2("")
    assert whole.long is not None, "it has three phases"

    def more(phase: Phase, tokens: int) -> Phase:
        return replace(phase, seconds=None).for_tokens(tokens, whole.length, "phase")

    m = 1_000_000
    conversion = replace(
        whole,
        device="cuda",
        compute="bfloat16",
        align=more(whole.align, 50 * m),
        distill=more(whole.distill, 150 * m),
        long=more(whole.long, 40 * m),
    )
    return _smollm2("smollm2_135m_gpu", conversion, 100, 256 * K)


RECIPES = {
    "minicpm_sala_9b": minicpm_sala_9b,
    "halo": halo,
    "tiny": tiny,
    "smollm2_135m": smollm2_135m,
    "smollm2_135m_gpu": smollm2_135m_gpu,
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name (hyphens are as good as underscores); ValueError with the nearest name if there
    is none."""
    name = name.replace("-", "_")
    check_choice("recipe", name, tuple(RECIPES))
    return RECIPES[name]()
