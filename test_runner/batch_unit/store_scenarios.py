"""What a store goes through: for each scenario what comes before, and what is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from batch_unit.store_support import BRANCH, MAIN
from batch_unit.store_world import World

from zenith_utils.ids import TimelineId

OTHER = TimelineId(b"o" * 16)


def prepare_nothing(world: World) -> None:
    pass


def prepare_main(world: World) -> None:
    world.import_main()


def prepare_branches(world: World) -> None:
    world.import_main()
    world.layers(1, 1, 5)
    world.put(1, 2)
    world.branch(BRANCH, lsn=24)
    world.put(3, on=BRANCH)


def prepare_deltas(world: World) -> None:
    world.import_main()
    world.layers(2, 1, 7)
    world.branch(BRANCH)
    world.end(3, 5)
    world.layers(2, 1, 2, 7, 8)


def prepare_history(world: World) -> None:
    prepare_deltas(world)
    world.compact()
    world.end(5, 7)
    world.layers(2, 0, 7, 9)
    world.put(4)
    world.compact()
    world.put(4)


def create(world: World) -> None:
    world.import_main()
    world.put(1)
    world.checkpoint()


def branch(world: World) -> None:
    world.branch(OTHER)
    world.put(1, 9, on=OTHER)
    world.end(2, 4, on=OTHER)
    world.checkpoint(OTHER)
    world.checkpoint(BRANCH)


def flush(world: World) -> None:
    world.put(1, 2)
    world.checkpoint()
    world.end(3, 6)
    world.put(3, 7)
    world.end(8, 10)
    world.checkpoint()
    world.end(0, 2)
    world.checkpoint()


def merge(world: World) -> None:
    world.configure(image_creation_threshold=1000)
    assert world.compact()[0] == 4
    world.layers(2, 3, 4)
    world.compact()


def images(world: World) -> None:
    world.compact()
    world.layers(2, 1, 7, 9)
    assert world.compact()[2] > 1
    images = 0
    for _ in range(2):
        world.layers(2, 1, 2, on=BRANCH)
        images += world.compact(BRANCH)[2]
    assert images > 0


def garbage(world: World) -> None:
    world.configure(image_creation_threshold=1000)
    world.layers(3, 1, 2, size=2000)
    world.compact()
    cutoff = world.histories[MAIN].last_lsn
    world.layers(1, 1, 2)
    world.collect(cutoff)
    assert world.compact()[2] > 0
    assert world.collect(cutoff) > 0


def split(world: World) -> None:
    world.configure(image_creation_threshold=1000)
    world.layers(9, 1, 2, 9, size=100)
    world.compact()
    world.branch(OTHER, lsn=24)
    world.collect(world.histories[MAIN].last_lsn - 32)
    assert world.compact()[3] > 0
    # Not durable yet when compaction sees it.
    world.timeline().publish_gc_cutoff(world.histories[MAIN].last_lsn - 8)
    assert world.compact()[3] > 0
    world.detach(OTHER)
    assert world.collect(world.histories[MAIN].last_lsn - 8) > 0


def collect(world: World) -> None:
    assert world.collect(world.histories[MAIN].last_lsn - 16) > 1
    world.end(0, 12)
    world.checkpoint()
    assert world.collect(world.histories[MAIN].last_lsn) > 0
    world.put(3)
    assert world.collect(world.histories[MAIN].last_lsn) == 0


def collect_tombstones(world: World) -> None:
    world.layers(1, 10, 11)
    world.compact()
    world.end(10, 12)
    world.checkpoint()
    world.layers(1, 1)
    assert world.collect(world.histories[MAIN].last_lsn) == 1
    assert world.collect(world.histories[MAIN].last_lsn) == 1


def delete(world: World) -> None:
    world.checkpoint(BRANCH)
    world.detach(BRANCH)
    assert world.collect(80) > 2
    world.branch(OTHER)
    world.detach(OTHER)


SCENARIOS: Final[dict[str, tuple[Callable[[World], None], Callable[[World], None]]]] = {
    "create": (prepare_nothing, create),
    "branch": (prepare_branches, branch),
    "flush": (prepare_main, flush),
    "merge": (prepare_deltas, merge),
    "images": (prepare_deltas, images),
    "garbage": (prepare_main, garbage),
    "split": (prepare_main, split),
    "collect": (prepare_history, collect),
    "tombstones": (prepare_main, collect_tombstones),
    "delete": (prepare_history, delete),
}
