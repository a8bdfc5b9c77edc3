"""Consensus keeps its promises over thousands of random schedules."""

import pytest
from batch_unit.consensus_simulator import Simulation


@pytest.mark.parametrize("block", range(4))
def test_three_acceptors(block: int) -> None:
    for seed in range(block * 500, (block + 1) * 500):
        Simulation(seed).run(300)


def test_five_acceptors() -> None:
    for seed in range(200):
        Simulation(seed, acceptors=5).run(500)


def test_single_acceptor() -> None:
    for seed in range(200):
        Simulation(seed, acceptors=1).run(200)
