"""The loop that every training phase of a conversion runs: draw, passes, clip, step, log, save, stop.

It knows no model: a `Trainee` computes. Nothing in a step waits for a GPU except where a line of the
metrics, a measurement or a saved state is due.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..runs import progress_bar
from .config import Execution, Phase
from .files import RunFiles
from .ranks import Ranks
from .tokens import Sample


class Stopped(Exception):  # noqa: N818 - no error: the time that was asked for is over
    """The run's seconds are over; its state is saved."""


class Trainee(Protocol):
    """What is trained in a phase."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, step: int, sample: Sample, rows: int) -> dict[str, Tensor]:
        """Leave the gradient of a step's batch, `rows` sequences a pass; returns losses on the device."""
        ...

    def clip(self) -> Tensor:
        """Clip the gradient; returns the norms it had, on the device."""
        ...

    def update(self, rate: float) -> None:
        """Take the optimizer step."""
        ...


class Settings(NamedTuple):
    """What a phase is run with. `flops`: of a token, for the log; `peak`: the machine's in a second."""

    name: str
    phase: Phase
    length: int
    device: torch.device
    save_every: int
    validate_every: int = 0
    flops: float = 0.0
    peak: float = 0.0


class Clock:
    """Seconds since the run began, and whether those it may take are over: on the first rank's watch."""

    def __init__(self, seconds: float | None, ranks: Ranks | None = None) -> None:
        self.seconds, self.begun, self.ranks = seconds, time.monotonic(), ranks or Ranks()

    @property
    def over(self) -> bool:
        """All ranks ask together."""
        if self.seconds is None:
            return False
        most = self.seconds
        return self.ranks.first(lambda: time.monotonic() - self.begun >= most)


class Prefetch:
    """Draws the batch of the next step in a thread while the current one is computed."""

    def __init__(self, draw: Callable[[int], Sample], step: int, steps: int, pinned: bool) -> None:
        self._draw, self._steps, self._pinned = draw, steps, pinned
        self._pool = ThreadPoolExecutor(1)
        self._step, self._next = step, self._submit(step)

    def _submit(self, step: int) -> Future[Sample] | None:
        return self._pool.submit(self._make, step) if step < self._steps else None

    def _make(self, step: int) -> Sample:
        sample = self._draw(step)
        return sample.pinned() if self._pinned else sample

    def next(self) -> Sample:
        assert self._next is not None, "asked for once a step"
        sample = self._next.result()
        self._step += 1
        self._next = self._submit(self._step)
        return sample

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class PhaseLoop:
    """A phase of a run, from its last saved state on.

    Args:
        files: of the run.
        settings: of the phase.
        execution: of this process.
        clock: of this process.
        draw: from the number of a step to its batch.
        weights: of what a saved state holds the trained parameters.
        validate: measures on held-out data, for the log.
        before: called with the number of each step before it (a rotation that fades, say).
    """

    def __init__(
        self,
        files: RunFiles,
        settings: Settings,
        execution: Execution,
        clock: Clock,
        draw: Callable[[int], Sample],
        weights: nn.Module,
        *,
        validate: Callable[[], dict[str, float]] | None = None,
        before: Callable[[int], None] | None = None,
        quiet: bool = False,
    ) -> None:
        self.files, self.settings, self.execution, self.clock = files, settings, execution, clock
        self.draw, self.weights, self.validate, self.before = draw, weights, validate, before
        self.quiet = quiet
        self.seconds = 0.0  # of training in this phase, over all processes that worked on it

    def run(self, trainee: Trainee) -> None:
        """Train to the phase's end. Raises Stopped when the run's time is over before it."""
        settings, phase = self.settings, self.settings.phase
        step, done = self._restore(trainee)
        if done or step >= phase.steps:
            return
        batches = Prefetch(self.draw, step, phase.steps, settings.device.type == "cuda")
        try:
            with progress_bar(settings.name, phase.steps, step, self.quiet) as bar:
                self._train(trainee, step, batches, bar.advance)
        finally:
            batches.close()

    def _train(self, trainee: Trainee, step: int, batches: Prefetch, advance: Callable[[str], None]) -> None:
        settings, phase = self.settings, self.settings.phase
        since, logged, before = time.perf_counter(), step, self.seconds
        while True:
            over = self._share_of_time()
            last = step + 1 >= phase.steps
            if self.before is not None:
                self.before(step)
            sample = batches.next().to(settings.device)
            losses = trainee.step(step, sample, self.execution.rows(phase.batch, settings.length))
            norms = trainee.clip()
            rate = phase.rate(step, over)
            stopping = self.clock.over
            saving = last or over >= 1.0 or stopping or (step + 1) % settings.save_every == 0
            measuring = (
                self.validate is not None
                and settings.validate_every
                and (saving if last or over >= 1.0 else (step + 1) % settings.validate_every == 0)
            )
            logging = saving or measuring or (step + 1) % self.execution.log_every == 0
            record: dict[str, Any] = {}
            if logging:
                record = self._record(step, rate, losses, norms)
            trainee.update(rate)
            step += 1
            now = time.perf_counter()
            self.seconds, since = self.seconds + now - since, now
            note = ""
            if logging:
                tokens = phase.batch * settings.length * (step - logged)
                record |= self._speed(tokens, self.seconds - before)
                logged, before = step, self.seconds
                if measuring:
                    record["valid"] = self._measured()
                    since = time.perf_counter()
                self.files.log(record)
                note = f"loss {_mean(record['loss']):.4f}, {record['tokens_per_second']:,.0f} tokens/s"
            advance(note)
            if saving:
                ended = last or over >= 1.0
                self._save(trainee, step, ended)
                since = time.perf_counter()
                if ended:
                    return
                if stopping:
                    raise Stopped(f"{settings.name}: step {step} of {phase.steps}")

    def _share_of_time(self) -> float:
        """How much of the phase's time is over, on the first rank's watch: its rate follows from it."""
        most = self.settings.phase.seconds
        return 0.0 if most is None else self.files.ranks.first(lambda: min(1.0, self.seconds / most))

    def _measured(self) -> dict[str, float]:
        assert self.validate is not None
        with torch.no_grad():
            return self.validate()

    def _record(self, step: int, rate: float, losses: dict[str, Tensor], norms: Tensor) -> dict[str, Any]:
        """A line of the metrics. Raises ValueError for a loss or a gradient that is not finite."""
        found = {name: value.tolist() for name, value in losses.items()}
        found["grad_norm"] = norms.tolist()
        for name, label in (("loss", "the loss"), ("grad_norm", "the gradient")):
            values = found[name] if isinstance(found[name], list) else [found[name]]
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    where = f"{label} of layer {i}" if isinstance(found[name], list) else label
                    raise ValueError(self._not_finite(step, f"{where} is {value}"))
        return {"phase": self.settings.name, "step": step, "lr": rate, **found}

    def _not_finite(self, step: int, what: str) -> str:
        name = self.settings.name
        last = self.files.states.last(name)
        kept = "nothing was saved yet" if last is None else f"the last good state, {last}, is kept"
        return (
            f"{name} step {step}: {what}; {kept}. Try another run with a lower {name}.lr, or look for the "
            "cause in the data"
        )

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """Tokens a second since the last line, and the share of the machine's arithmetic that is the
        model's."""
        speed = tokens / max(seconds, 1e-9)
        record = {"tokens_per_second": speed}
        if self.settings.flops and self.settings.peak:
            record["mfu"] = speed * self.settings.flops / self.settings.peak
        return record

    # --- states ---

    def _restore(self, trainee: Trainee) -> tuple[int, bool]:
        """Load the last saved state; returns the next step, and whether the phase is over."""
        name, step, done = self.settings.name, 0, False
        note = self.files.states.load(name, self.weights, trainee.optimizer)
        if note is not None:
            step, done, self.seconds = note["step"], note["done"], note["seconds"]
        self.files.forget_after(name, step)
        return step, done

    def _save(self, trainee: Trainee, step: int, done: bool) -> None:
        self.files.states.save(
            self.settings.name, step, self.weights, trainee.optimizer, {"seconds": self.seconds, "done": done}
        )


def _mean(value: float | list[float]) -> float:
    return sum(value) / len(value) if isinstance(value, list) else value
