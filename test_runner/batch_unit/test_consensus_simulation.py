"""Consensus keeps its promises over thousands of random schedules.

The long form runs as many as ZENITH_SCHEDULES says (a million), from seed ZENITH_FIRST_SEED on, and
prints its progress::

    ZENITH_SCHEDULES=1000000 pytest -s --runslow -k schedules test_consensus_simulation.py
"""

from __future__ import annotations

import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
from batch_unit.consensus_simulator import Simulation

BLOCK = 500
STEPS = 300


def run_block(first: int, count: int, acceptors: int = 3, steps: int = STEPS) -> Counter[str]:
    """Run the schedules of some seeds; what happened in them. AssertionError names the seed."""
    counts: Counter[str] = Counter()
    for seed in range(first, first + count):
        schedule = Simulation(seed, acceptors)
        try:
            schedule.run(steps)
        except Exception as e:
            raise AssertionError(
                f"Simulation({seed}, acceptors={acceptors}).run({steps}): {e!r}"
            ) from e
        counts += schedule.counts
    return counts


@pytest.mark.parametrize("block", range(8))
def test_three_acceptors(block: int) -> None:
    counts = run_block(1000 * block, 1000)
    # The schedules reach what they are for.
    events = ("elected", "committed", "established", "Outdated", "Defeated", "damaged")
    for event in (*events, "away", "empty"):
        assert counts[event] > 20, event


def test_five_acceptors() -> None:
    run_block(0, 1500, acceptors=5)


def test_single_acceptor() -> None:
    run_block(0, 500, acceptors=1, steps=200)


def test_a_seed_is_a_schedule() -> None:
    first, second = Simulation(77), Simulation(77)
    first.run(STEPS)
    second.run(STEPS)
    assert first.committed == second.committed
    assert first.counts == second.counts


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_schedules() -> None:
    total = int(os.environ.get("ZENITH_SCHEDULES", "1000000"))
    first = int(os.environ.get("ZENITH_FIRST_SEED", "1000000"))
    started = time.monotonic()
    done, counts = 0, Counter[str]()
    with ProcessPoolExecutor() as pool:
        blocks = [
            # Every fifth block with five acceptors.
            pool.submit(run_block, seed, min(BLOCK, first + total - seed), 3 + 2 * (n % 5 == 4))
            for n, seed in enumerate(range(first, first + total, BLOCK))
        ]
        for number, block in enumerate(blocks):
            counts += block.result()
            done = min(total, done + BLOCK)
            if number % 20 == 19 or done == total:
                rate = done / (time.monotonic() - started)
                print(f"{done} schedules of {total}, {rate:.0f} per second: {dict(counts)}")
    assert done == total
