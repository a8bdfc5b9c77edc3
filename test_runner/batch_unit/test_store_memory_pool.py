"""The pool through which open layers hand on their memory: reuse, limits, no trace of the past."""

import random
from array import array
from pathlib import Path

import pytest

from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.memory_budget import MemoryBudget
from pageserver.layered_repository.memory_pool import MemoryPool
from pageserver.layered_repository.read_batch import ReadBatch

MIB = 1 << 20
IMAGE = 1
COUNT = 200_000  # entries, tables and values are all beyond their first chunks then


def key(number: int) -> bytes:
    return number.to_bytes(18, "big")


def filled(pool: MemoryPool, first: int, spill_dir: Path | None) -> InMemoryLayer:
    """A layer with COUNT values of 40 bytes for keys from `first` on, in random order."""
    layer = InMemoryLayer(1, spill_dir=spill_dir, spill_after=3 * MIB, pool=pool)
    numbers = list(range(first, first + COUNT))
    random.Random(first).shuffle(numbers)
    keys = b"".join(map(key, numbers))
    layer.put_many(keys, array("Q", [8]) * COUNT, IMAGE, keys + bytes(22 * COUNT))
    layer.publish(8)
    return layer


def found(layer: InMemoryLayer, numbers: range) -> int:
    """How many of the keys the layer holds."""
    batch = ReadBatch([key(number) for number in numbers])
    layer.read(batch, 0, len(numbers), 8, 0)
    return sum(bool(batch.values(i)) for i in range(len(numbers)))


@pytest.mark.parametrize("spills", [False, True])
def test_a_layer_takes_over_the_memory_of_one_before(tmp_path: Path, spills: bool) -> None:
    pool = MemoryPool(256 * MIB)
    spill_dir = tmp_path if spills else None
    layer = filled(pool, 0, spill_dir)
    assert pool.kept == 0
    del layer
    kept = pool.kept
    assert kept > 10 * MIB
    layer = filled(pool, COUNT, spill_dir)
    assert pool.kept == 0
    # Nothing of the layer before is in it.
    assert found(layer, range(COUNT)) == 0
    assert found(layer, range(COUNT, 2 * COUNT)) == COUNT
    del layer
    assert pool.kept == kept


def test_layers_side_by_side_share_nothing() -> None:
    pool = MemoryPool(256 * MIB)
    layer = filled(pool, 0, None)
    del layer
    one, two = filled(pool, 0, None), filled(pool, COUNT, None)
    assert found(one, range(2 * COUNT)) == found(two, range(2 * COUNT)) == COUNT
    assert found(one, range(COUNT)) == COUNT


def test_no_more_is_kept_than_the_limit_says() -> None:
    pool = MemoryPool(5 * MIB)
    layer = filled(pool, 0, None)
    del layer
    assert 0 < pool.kept <= 5 * MIB
    pool.resize(2 * MIB)
    assert pool.kept <= 2 * MIB
    pool.resize(0)
    assert pool.kept == 0
    layer = filled(pool, 0, None)
    del layer
    assert pool.kept == 0


def test_the_budget_leaves_the_pool_what_layers_do_not_take() -> None:
    budget: MemoryBudget[str] = MemoryBudget(100 * MIB)
    layers = [filled(budget.pool, number * COUNT, None) for number in range(4)]
    layers.clear()
    kept = budget.pool.kept
    assert 40 * MIB < kept <= 50 * MIB
    budget.grown("a", 95 * MIB)
    assert budget.pool.kept == kept
    budget.frozen("a", 95 * MIB)
    budget.grown("a", 25 * MIB)
    assert 0 < budget.pool.kept <= 30 * MIB
    budget.grown("b", 60 * MIB)
    assert budget.pool.kept == 0
    budget.flushed("a", 95 * MIB)
    layer = filled(budget.pool, 0, None)
    del layer
    assert budget.pool.kept > 0
    budget.resize(0)
    assert budget.pool.kept == 0
