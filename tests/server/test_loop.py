"""The engine's thread: jobs in, events out; what is cancelled gives its memory back; owners take turns."""

import asyncio
import random

import pytest

from opensala.contexts.prefixes import PrefixFolder
from opensala.engine import Engine, EngineOptions, FinishReason, SamplingParams
from opensala.server.fairness import FairQueue
from opensala.server.loop import Closed, EngineLoop, Job
from opensala.server.pace import Pace

from ..conftest import tiny_model

ENDLESS = SamplingParams(max_tokens=100_000, ignore_eos=True)


def ids(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(length)]


def make(**changes):
    options = {"max_batch_tokens": 50, "max_running": 4, "max_cached_tokens": 120_000, "max_snapshots": 8}
    return EngineLoop(Engine(tiny_model(), None, EngineOptions(**{**options, **changes})))


def run(scenario, **changes):
    """Run a scenario with a loop, and see that nothing is held when it is over."""

    async def whole():
        loop = make(**changes)
        loop.start()
        try:
            await asyncio.wait_for(scenario(loop), 120)
        finally:
            await loop.close()
        loop.engine.check_integrity()
        assert not loop.engine.num_requests and not loop.engine.scheduler.running
        loop.engine.scheduler.tree.clear()
        assert loop.engine.scheduler.pages.num_free == loop.engine.scheduler.pages.size
        assert loop.engine.scheduler.slots.num_free == loop.engine.scheduler.slots.size

    asyncio.run(whole())


def job(length=20, seed=0, tokens=5, **params):
    return Job(ids(length, seed), SamplingParams(max_tokens=tokens, ignore_eos=True, **params))


async def until(condition):
    while not condition():  # noqa: ASYNC110 -- the engine's thread has no event to wait for
        await asyncio.sleep(0.005)


def test_a_job_gets_what_the_engine_gives():
    wanted = make().engine.generate([job().prompt], job().params)[0]

    async def scenario(loop):
        tickets = [loop.submit("a", [job()]), loop.submit("b", [job(), job(seed=1)])]
        first, both = await asyncio.gather(*(t.completions() for t in tickets))
        assert first[0].tokens == both[0].tokens == wanted.tokens
        assert both[1].tokens != wanted.tokens

    run(scenario)


def test_events_come_while_it_runs():
    async def scenario(loop):
        ticket, seen = loop.submit("a", [Job(ids(9), ENDLESS)]), 0
        async for index, event in ticket:
            assert index == 0
            seen += event.token is not None
            if seen == 5:
                ticket.cancel()
            if event.completion is not None:
                assert event.finish_reason is FinishReason.ABORT
        assert 5 <= seen < 100_000

    run(scenario)


def test_cancelling_frees_pages_and_places_at_once():
    async def scenario(loop):
        tickets = [loop.submit("a", [Job(ids(100, n), ENDLESS)]) for n in range(9)]
        await until(lambda: loop.stats.running == 4)
        assert loop.stats.waiting == 5
        for ticket in tickets:
            ticket.cancel()
            ticket.cancel()
        done = [await ticket.completions() for ticket in tickets]
        assert {c.finish_reason for (c,) in done} == {FinishReason.ABORT}
        await until(lambda: not loop.stats.running and not loop.stats.waiting)
        tickets[0].cancel()  # after its end
        assert (await loop.submit("a", [job()]).completions())[0].tokens

    run(scenario)


def test_what_cannot_be_is_refused_before_it_is_taken():
    async def scenario(loop):
        for bad, says in (
            (job(0), "the prompt is empty"),
            (Job([97], SamplingParams()), "between 0 and 96"),
            (Job([5], SamplingParams(max_tokens=10**6)), "shorten the document"),
            (Job([5], SamplingParams(logprobs=98)), "logprobs must be at most 97"),
        ):
            with pytest.raises(ValueError, match=says):
                loop.submit("a", [bad])
        late = loop.submit("a", [Job([5], SamplingParams(stop=("x",)))])  # only the engine sees this one
        (done,) = await late.completions()
        assert done.finish_reason is FinishReason.ERROR and "stop texts need a tokenizer" in done.error

    run(scenario)


def test_owners_take_turns():
    """One owner sends twenty jobs before another sends one: that one is not the last."""

    async def scenario(loop):
        order = []

        async def finish(name, ticket):
            await ticket.completions()
            order.append(name)

        many = [finish("many", loop.submit("many", [job(30, n, 3)])) for n in range(20)]
        one = finish("one", loop.submit("one", [job(30, 99, 3)]))
        await asyncio.gather(*many, one)
        assert order.index("one") <= 6, order

    run(scenario, max_running=2)


def test_a_long_prompt_of_one_owner_does_not_keep_another_waiting():
    async def scenario(loop):
        long = loop.submit("a", [job(20_000, tokens=1)])
        await until(lambda: long.read > 1000)
        done = await loop.submit("b", [job(100, seed=1, tokens=3)]).completions()
        assert len(done[0].tokens) == 3 and long.read < 15_000
        await long.completions()

    run(scenario)


def test_owners_do_not_share_prefixes():
    async def scenario(loop):
        for owner, reused in (("a", 0), ("a", 299), ("b", 0)):
            (done,) = await loop.submit(owner, [Job(ids(300), SamplingParams(), (299,))]).completions()
            assert done.reuse.reused == reused

    run(scenario)


def test_closing_lets_short_jobs_end_and_says_why_long_ones_do():
    async def scenario(loop):
        short, long = loop.submit("a", [job(tokens=30)]), loop.submit("a", [Job(ids(9), ENDLESS)])
        waiting = [loop.submit("a", [Job(ids(9), ENDLESS)]) for _ in range(5)]
        await until(lambda: loop.stats.running == 4)
        await loop.close(grace=2)
        (done,) = await short.completions()
        assert done.finish_reason is FinishReason.LENGTH and len(done.tokens) == 30
        for ticket in (long, *waiting):
            (done,) = await ticket.completions()
            assert done.finish_reason is FinishReason.ERROR and done.error == "the server is shutting down"
        with pytest.raises(Closed, match="shutting down"):
            loop.submit("a", [job()])
        await loop.close()

    run(scenario)


def test_a_step_that_fails_ends_its_requests_and_nothing_else(monkeypatch):
    async def scenario(loop):
        ticket, step = loop.submit("a", [Job(ids(9), ENDLESS)]), loop.engine.step
        await ticket.next()

        def fail():
            monkeypatch.setattr(loop.engine, "step", step)
            raise RuntimeError("out of memory, at a secret place")

        monkeypatch.setattr(loop.engine, "step", fail)
        (done,) = await ticket.completions()
        assert done.error == "the engine failed: RuntimeError"
        assert loop.is_alive and (await loop.submit("a", [job()]).completions())[0].tokens

    run(scenario)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_died(monkeypatch):
    async def scenario(loop):
        ticket = loop.submit("a", [Job(ids(9), ENDLESS)])
        await ticket.next()

        def die():
            raise AssertionError("a defect")

        monkeypatch.setattr(loop.engine, "step", die)
        (done,) = await ticket.completions()
        assert "the engine failed" in done.error and not loop.is_alive
        with pytest.raises(Closed, match="the engine failed"):
            loop.submit("a", [job()])

    run(scenario)


def test_reading_shows():
    async def scenario(loop):
        ticket = loop.submit("a", [job(2000)])
        await until(lambda: ticket.read)
        assert 0 < ticket.read <= 2000
        await ticket.completions()

    run(scenario)


def test_random_comings_and_goings():
    async def scenario(loop):
        rng = random.Random(0)

        async def one(n):
            await asyncio.sleep(rng.random() / 2)
            ticket = loop.submit(f"key-{n % 3}", [job(rng.randint(1, 150), n, rng.randint(1, 30))])
            if n % 3 == 0:
                await asyncio.sleep(rng.random() / 5)
                ticket.cancel()
            (done,) = await ticket.completions()
            assert done.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT)

        await asyncio.gather(*(one(n) for n in range(60)))

    run(scenario)


def test_a_fair_queue():
    line = FairQueue()
    for thing in ("a1", "a2", "a3", "b1", "c1", "b2"):
        line.push(thing[0], thing)
    assert len(line) == 6 and sorted(line) == ["a1", "a2", "a3", "b1", "b2", "c1"]
    assert [line.pop() for _ in range(3)] == ["a1", "b1", "c1"]
    line.push("c", "c2")
    assert line.remove(lambda t: t == "a2") == ["a2"]
    assert [line.pop() for _ in range(3)] == ["a3", "b2", "c2"] and not len(line)
    with pytest.raises(IndexError):
        line.pop()


class Machine:
    """Seconds of steps on a machine that needs so much for decoding and for each token read.

    Args:
        pace: what decides.
        between: how many times as long a step that only decodes takes between two that read.
        noise: a factor for each step.
    """

    def __init__(self, pace, alone, per_token, between=1.0, noise=lambda: 1.0):
        self.pace, self.alone, self.per_token, self.between, self.noise = (
            pace,
            alone,
            per_token,
            between,
            noise,
        )

    def decode(self, steps=70, sequences=4):
        times = [self.alone * self.noise() for _ in range(steps)]
        for seconds in times:
            assert self.pace.limit(sequences, False) is None
            self.pace.note(sequences, False, 0, seconds)
        return times

    def read(self, steps=300, sequences=4):
        """Seconds of steps that read, and tokens in each; all others only decode."""
        times, tokens = [], []
        for _ in range(steps):
            read = self.pace.limit(sequences, True)
            alone = self.alone * (1.0 if read else self.between)
            seconds = (alone + self.per_token * read) * self.noise()
            self.pace.note(sequences, True, read, seconds)
            if read:
                times.append(seconds)
                tokens.append(read)
        return times, tokens


@pytest.mark.parametrize(("alone", "per_token"), [(4e-3, 2e-4), (4e-3, 2e-6), (1.0, 1e-5)])
def test_reading_slows_streams_down_by_so_much(alone, per_token):
    machine = Machine(Pace(2.5, 4096), alone, per_token)
    machine.decode()
    times, _ = machine.read()
    assert all(t <= 2.6 * alone for t in times[20:])
    assert min(times[60:]) >= 2.4 * alone or machine.pace.share == 4096  # no slower than it has to be


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6])
def test_reading_slows_streams_down_by_so_much_on_a_busy_machine(spread):
    """Steps take by chance longer or shorter; compared is the 95th percentile, as for a stream."""
    rng = random.Random(1)
    machine = Machine(Pace(2.5, 4096), 1e-3, 2e-5, noise=lambda: rng.lognormvariate(0, spread))
    idle, (mixed, _) = machine.decode(400), machine.read(700)
    assert 1.5 < sorted(mixed)[-len(mixed) // 20] / sorted(idle)[380] < 2.7


def test_what_slows_steps_down_before_and_between_reading_is_no_measure():
    """Finding a prompt's tokens, and caches that hold its data: what counts is the stream in calm."""
    for between in (1.0, 1.8):
        machine = Machine(Pace(2.5, 4096), 1e-3, 2e-5, between)
        machine.decode()
        for _ in range(20):
            machine.pace.note(4, False, 0, 12e-3)
        assert max(machine.read()[0][20:]) <= 2.6e-3
    machine = Machine(Pace(2.5, 4096), 1e-3, 2e-5, 1.2)  # a prompt so long that no other steps are known
    for _ in range(100):
        machine.pace.note(4, False, 0, 12e-3)
    assert 2.4e-3 < max(machine.read()[0][100:]) <= 1.2 * 2.6e-3


def test_what_was_long_ago_or_of_other_streams_is_no_measure():
    """Streams that always have a prompt beside them: steps that only decode show what they are used to."""
    machine = Machine(Pace(2.5, 4096), 1e-3, 2e-5)
    machine.decode()
    machine.alone = 10e-3  # sixteen streams now, then longer ones
    assert min(machine.read(sequences=16)[0][150:]) > 24e-3
    machine.decode(sequences=16)
    machine.alone = 20e-3
    machine.read(4000, 16)
    assert min(machine.read(sequences=16)[0]) > 48e-3


def test_few_steps_only_decode_and_a_short_share_teaches_nothing():
    machine = Machine(Pace(2.5, 4096), 1e-3, 2e-5)
    machine.decode()
    times, tokens = machine.read(800)
    assert len(times) == 700
    pace, share = machine.pace, machine.pace.share
    for _ in range(7):
        pace.note(4, True, 3, 1.1e-3)  # the ends of short prompts
    assert pace.share == share == tokens[-1]
    for _ in range(50):
        assert pace.limit(4, True) is not None
        pace.note(4, True, 0, 1e-3)  # a prompt that waits for memory
    assert pace.share == share


def test_reading_goes_on_however_slow_it_is():
    machine = Machine(Pace(2.5, 4096), 1e-3, 1.0)
    assert machine.read()[1][-1] == 8
    assert Pace(0.0, 4096).limit(4, True) is None and Pace(2.5, 4096).limit(0, True) is None


def test_a_stream_goes_on_while_a_long_prompt_is_read():
    async def scenario(loop):
        stream = loop.submit("a", [Job(ids(9), ENDLESS)])
        for _ in range(30):
            await stream.next()
        before = loop.stats.steps
        (done,) = await loop.submit("b", [job(5000, tokens=1)]).completions()
        assert done.tokens and loop.stats.steps - before >= 5  # without a limit it is one step
        stream.cancel()

    run(scenario, max_batch_tokens=5000)


def test_what_is_forgotten_is_read_again_and_runs_on_meanwhile():
    further = Job(ids(900) + ids(9, 1), job().params)

    async def scenario(loop):
        for _ in range(3):  # the second time it is seen where the next one could continue
            wanted = await loop.submit("a", [further]).completions()
        assert wanted[0].reuse.reused == 896
        running = loop.submit("b", [Job(ids(9), ENDLESS)])
        await until(lambda: loop.stats.running)
        await loop.forget()
        again = await loop.submit("a", [further]).completions()
        assert again[0].tokens == wanted[0].tokens and not again[0].reuse.reused
        assert running.is_open
        running.cancel()

    run(scenario)


def test_what_is_forgotten_is_on_disk_where_there_is_a_folder(tmp_path):
    further = Job(ids(900) + ids(9, 1), job().params)

    async def scenario():
        loop = make()
        loop.prefixes = loop.engine.prefixes = PrefixFolder(tmp_path, loop.engine, 1 << 30)
        loop.start()
        await loop.submit("a", [job(900)]).completions()
        wanted = await loop.submit("a", [further]).completions()
        await loop.forget()
        again = await loop.submit("a", [further]).completions()
        assert again[0].tokens == wanted[0].tokens and again[0].reuse.restored == 896
        await loop.close()

    asyncio.run(scenario())
