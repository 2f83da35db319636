"""The scheduler without a model: random operations leave every page and slot with exactly those that say
so."""

import random
from array import array
from dataclasses import replace

import pytest

from opensala.cache import Pool
from opensala.engine.request import FinishReason, SamplingParams, Sequence, Status
from opensala.engine.scheduler import Limits, Scheduler

from ..conftest import tiny_config

PAGE = 16
RULE = tiny_config().attention_rule  # blocks of 16 tokens, sparse from 64 on


def scheduler(pages=40, running=4, budget=50, snapshots=6, interval=0):
    limits = Limits(max_batch_tokens=budget, max_running=running, snapshot_interval=interval, min_shared=8)
    return Scheduler(Pool(pages, "pages"), Pool(2 * running + 2 + snapshots, "state slots"), PAGE, limits)


def sequence(tokens, arrival, max_tokens=10, owner=""):
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(str(arrival), array("i", tokens), len(tokens), params, RULE, arrival, owner)


def finish_works(planned, step, rng=None, token=5):
    """What the engine does behind a step: keep some of the drafts, append a token where one was wanted."""
    for work in list(step.works):
        accepted = rng.randint(0, work.drafted) if rng else work.drafted
        drafts, completes = work.sequence.draft[:accepted], work.completes
        planned.commit(work, work.count - work.drafted + accepted)
        work.sequence.tokens.extend(drafts)
        if completes:
            work.sequence.tokens.append(token)
        work.sequence.draft = []


def test_the_states_of_a_sequence_alternate_between_two_slots():
    """Whatever the others do: the core that has computed a sequence has both in its cache."""
    planned, used = scheduler(running=3), {}
    running = [sequence([3 + n] * 5, n, 100) for n in range(3)]
    for one in running:
        planned.add(one)
    for step in range(30):
        if step == 20:
            planned.finish(running.pop(1), FinishReason.ABORT)
        finish_works(planned, planned.schedule())
        for one in running:
            used.setdefault(one.request_id, []).append(one.slot)
    for slots in used.values():
        assert len(set(slots[3:])) == 2 and all(a != b for a, b in zip(slots, slots[1:], strict=False))


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_random_operations(seed):
    rng = random.Random(seed)
    sizes = {"pages": rng.choice([20, 40, 200]), "interval": rng.choice([0, 32])}
    planned, alive, arrival = scheduler(**sizes, budget=rng.choice([2, 50])), [], 0
    texts = [[rng.randint(3, 90) for _ in range(200)] for _ in range(3)]
    for _ in range(2500):
        action = rng.random()
        if action < 0.2 and len(alive) < 12:
            text = rng.choice(texts)[: rng.randint(1, 120)] + [
                rng.randint(3, 90) for _ in range(rng.randint(0, 40))
            ]
            alive.append(sequence(text, arrival, rng.randint(1, 60), rng.choice(["", "", "a", "b"])))
            arrival += 1
            planned.add(alive[-1])
        elif action < 0.3 and alive:
            planned.finish(
                alive.pop(rng.randrange(len(alive))), rng.choice([FinishReason.ABORT, FinishReason.ERROR])
            )
        else:
            for one in alive:
                if one.status is Status.RUNNING and one.num_pending == 1 and rng.random() < 0.5:
                    room = one.room - one.num_tokens - 1
                    one.draft = [7] * rng.randint(0, max(0, min(5, room)))
            most = rng.choice([None, None, 0, 1, 20])
            planned.limits = replace(planned.limits, max_read_tokens=most)
            step = planned.schedule()
            planned.check_integrity()
            assert sum(work.count for work in step.works) <= planned.limits.max_batch_tokens
            read = sum(work.count for work in step.works if work.reads)
            assert most is None or read <= most or all(work.reads for work in step.works)
            assert bool(step.works) == bool(alive)
            if rng.random() < 0.1:
                planned.discard(step)  # interrupted
            else:
                finish_works(planned, step, rng, token=rng.randint(3, 90))
            for one in [s for s in alive if s.num_tokens >= s.room]:
                planned.finish(one, FinishReason.LENGTH)
                alive.remove(one)
        planned.check_integrity()
    for one in alive:
        planned.finish(one, FinishReason.ABORT)
    planned.check_integrity()
    planned.tree.clear()
    assert planned.pages.num_free == planned.pages.size and planned.slots.num_free == planned.slots.size


def test_decoding_goes_beside_a_long_prompt():
    planned = scheduler(pages=200)
    planned.add(sequence(range(3, 13), 0))
    finish_works(planned, planned.schedule())
    planned.add(sequence(range(3, 90), 1, 5))
    step = planned.schedule()
    assert [(w.sequence.request_id, w.count) for w in step.works] == [("0", 1), ("1", 49)]


def test_owners_read_equal_parts_of_a_step():
    """A long prompt of one owner does not keep those of others waiting until it is read."""
    planned = scheduler(pages=200, running=6)
    long = sequence([5] * 900, 0, owner="many")
    planned.add(long)
    planned.add(sequence([6] * 300, 1, owner="many"))
    finish_works(planned, planned.schedule())
    assert long.num_cached == 50  # within an owner, first come first
    for arrival, length, owner in ((2, 10, "few"), (3, 200, "other"), (4, 60, "other")):
        planned.add(sequence([7 + arrival] * length, arrival, owner=owner))
    step = planned.schedule()
    assert {w.sequence.request_id: w.count for w in step.works} == {"0": 20, "2": 10, "3": 20}
    finish_works(planned, step)
    assert {w.sequence.request_id: w.count for w in planned.schedule().works} == {"0": 24, "2": 1, "3": 25}


def test_nobody_overtakes_a_prompt_that_waits_for_memory():
    planned = scheduler(pages=12, running=4, snapshots=0)
    held = sequence([5] * 50, 0, 20, owner="a")
    planned.add(held)
    finish_works(planned, planned.schedule())
    planned.add(sequence([6] * 150, 1, 5, owner="b"))
    planned.limits = replace(planned.limits, max_batch_tokens=170)
    planned.add(sequence([7] * 10, 2, 5, owner="c"))
    assert [w.sequence.request_id for w in planned.schedule().works] == ["0"]
    planned.finish(held, FinishReason.ABORT)
    assert [w.sequence.request_id for w in planned.schedule().works] == ["1", "2"]


def test_a_budget_of_one_token_goes_to_who_can_use_it():
    """Not to an owner whose only prompt waits for memory."""
    planned = scheduler(pages=12, running=4, snapshots=0, budget=130)
    planned.add(sequence([5] * 170, 0, 5, owner="a"))
    finish_works(planned, planned.schedule())
    planned.add(sequence([6] * 30, 1, 5, owner="b"))  # less to read than the other has left
    planned.limits = replace(planned.limits, max_batch_tokens=1)
    planned.pages.take(planned.pages.num_free)
    assert [(w.sequence.request_id, w.count) for w in planned.schedule().works] == [("0", 1)]


@pytest.mark.parametrize("most", [0, 1, 20, None])
def test_reading_beside_decoding_takes_no_more_than_it_may(most):
    planned = scheduler(pages=200)
    planned.limits = replace(planned.limits, max_read_tokens=most)
    stream = sequence(range(3, 13), 0)
    planned.add(stream)
    assert [w.count for w in planned.schedule().works] == [10]  # nobody decodes: the limit is for no one
    finish_works(planned, planned._step)
    stream.draft = [7] * 5
    for arrival in (1, 2):
        planned.add(sequence([arrival] * 40, arrival, 5))
    works = planned.schedule().works
    assert works[0].count == 6 and not works[0].reads  # drafts are not counted
    assert sum(w.count for w in works[1:]) == (44 if most is None else most)
    planned.finish(stream, FinishReason.ABORT)
    assert sum(w.count for w in planned.schedule().works) == 50


def test_works_end_where_the_mode_changes():
    """Drafts across dense_len are cut: a token is computed in one mode."""
    planned, one = scheduler(), sequence([5] * 60, 0, 20)
    planned.add(one)
    modes = []
    for _ in range(14):
        if one.num_pending == 1:
            one.draft = [5] * 6
        step = planned.schedule()
        for work in step.works:
            modes += [(one.num_cached + i, work.sparse) for i in range(work.count)]
        finish_works(planned, step)
    assert modes == [(n, n >= 63) for n in range(len(modes))] and len(modes) > 70


def test_the_youngest_gives_way():
    planned = scheduler(pages=10, running=3, snapshots=0)
    old, young = sequence([5] * 60, 0, 90), sequence([6] * 60, 1, 90)
    planned.add(old)
    planned.add(young)
    for _ in range(60):
        finish_works(planned, planned.schedule())
        planned.check_integrity()
    assert old.preemptions == 0 and young.preemptions >= 1 and old.num_tokens > 100


def test_a_prompt_waits_for_the_reading_of_what_it_shares():
    planned, text = scheduler(pages=200, budget=40), [n % 80 + 3 for n in range(100)]
    planned.add(sequence([*text, 4], 0))
    planned.add(sequence([*text, 5], 1))
    shares = []
    for _ in range(6):
        step = planned.schedule()
        shares.append([(w.sequence.request_id, w.count) for w in step.works])
        finish_works(planned, step)
    assert shares[:3] == [[("0", 40)], [("0", 40)], [("0", 20)]]
    assert sum(count for step in shares for name, count in step if name == "1") <= 4  # the rest was at hand
