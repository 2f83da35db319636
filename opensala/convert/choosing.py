"""The choice of layers in a run: as told, or by a rule from what was measured of them."""

import logging

from .report import plot_importance, print_sweep
from .resolution import Estimate, unresolved
from .retrieval import retrieval_scores
from .selection import NEEDS, Scores, importance, select_layers
from .sweep import Sweep, estimates
from .work import Work

logger = logging.getLogger("opensala")
MEASURED = ("halo", "recall", "kl", "retrieval")


def choose(work: Work) -> list[int]:
    """The kept layers, noted in `selection.json`."""
    config, layers = work.config, len(work.mixers)
    if config.layers is not None:
        kept = sorted(config.layers)
    elif config.rule not in MEASURED:
        kept = _select(work, None)
    elif config.rule == "retrieval":
        kept = _by_copying(work)
    else:
        kept = _by_sweep(work)
    record = {
        "rule": "given" if config.layers is not None else config.rule,
        "fix_ends": config.fix_ends,
        "kept": kept,
    }
    work.files.write("selection.json", record)
    logger.info("kept layers: %s of %d", kept, layers)
    return kept


def _select(work: Work, scores: Scores | None) -> list[int]:
    config = work.config
    return select_layers(
        scores,
        work.keep,
        layers=len(work.mixers),
        fix_ends=config.fix_ends,
        rule=config.rule,
        seed=config.seed,
    )


def _plot(work: Work, values: list[float], kept: list[int], label: str) -> None:
    file = work.path / "plots" / "importance.png"
    work.files.do(lambda: plot_importance(values, kept, label, file))


def _by_copying(work: Work) -> list[int]:
    """Score each layer by what its heads do while the teacher copies: one pass over the probes."""
    record = work.files.read("scores.json") or {"layers": []}
    if "retrieval" not in record:
        with work.measuring():
            record["retrieval"] = retrieval_scores(work.teacher, *work.prober.facts)
        work.files.write("scores.json", record)
    scores = Scores(retrieval=tuple(record["retrieval"]))
    kept = _select(work, scores)
    _plot(work, list(scores.retrieval), kept, "attention to what is copied")
    return kept


def _by_sweep(work: Work) -> list[int]:
    """Measure the teacher with each layer changed, show it, and choose; say if others might as well have been
    chosen."""
    rule = work.config.rule
    with work.measuring():
        record = Sweep(work.teacher, work.mixers, work.prober, work.files).run(work.quiet)
    scores = Scores.from_dict({name: record[name] for name in NEEDS[rule]})
    kept = _select(work, scores)
    if rule == "halo":
        _plot(work, importance(scores.recall, scores.general), kept, "lost recall / lost general ability")
    if not work.quiet:
        print_sweep(record, kept)
    close = None if _by_benchmarks(work) else _undecided(work, estimates(record)[rule], kept)
    if close is not None and work.ranks.rank == 0:
        logger.warning(
            "layers %d (kept) and %d (not kept) lie within two standard errors by the rule %s: more "
            "--probe-sequences would tell them apart",
            *close,
            rule,
        )
    return kept


def _by_benchmarks(work: Work) -> bool:
    """Whether tasks decide whose standard errors are not known here."""
    return bool(work.config.probes.recall_tasks or work.config.probes.general_tasks)


def _undecided(work: Work, found: Estimate, kept: list[int]) -> tuple[int, int] | None:
    sign = 1.0 if work.config.rule == "halo" else -1.0  # of recall and kl the lowest are kept
    turned = Estimate([sign * x for x in found.values], [[sign * x for x in left] for left in found.without])
    ends = [0, len(work.mixers) - 1] if work.config.fix_ends else []
    return unresolved(turned, kept, ends)
