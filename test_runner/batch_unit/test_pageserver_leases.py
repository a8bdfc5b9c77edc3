"""LSN leases: expiry, renewal, restarts, and what they keep from garbage collection."""

from pathlib import Path
from typing import Any

import pytest

from pageserver.lease_file import LeaseFile
from pageserver.leases import MAX_TTL, LeaseGoneError, LeaseRegistry
from zenith_utils.lsn import Lsn


class Gone(Exception):
    """Not readable any more."""


class World:
    """A clock, a cutoff and the points that garbage collection keeps, under the test's control."""

    def __init__(self, path: Path | None = None) -> None:
        self.now = 100.0
        self.cutoff = Lsn(1000)
        self.points: dict[Any, int] = {}
        self.registry = LeaseRegistry(
            self.check,
            self.points,
            file=None if path is None else LeaseFile(path),
            clock=lambda: self.now,
        )

    def check(self, lsn: Lsn) -> None:
        """What the registry asks before it promises."""
        if lsn < self.cutoff:
            raise Gone

    def collect(self, wanted: int) -> list[int]:
        """One garbage collection: the points below the cutoff that it keeps."""

        def publish(cutoff: Lsn) -> None:
            self.cutoff = max(self.cutoff, cutoff)

        self.registry.publish_cutoff(Lsn(wanted), publish)
        return sorted(point for point in self.points.values() if point < self.cutoff)


@pytest.fixture
def world() -> World:
    return World()


def test_leased_lsns_are_kept_below_the_cutoff(world: World) -> None:
    world.registry.acquire(Lsn(5000), 10)
    low = world.registry.acquire(Lsn(3000), 10)
    assert world.collect(9000) == [3000, 5000]
    assert world.cutoff == 9000
    assert world.registry.is_leased(3000) and not world.registry.is_leased(4000)
    assert world.registry.release(low.lease_id)
    assert not world.registry.release(low.lease_id)
    assert world.collect(9000) == [5000]
    assert world.registry.lsns() == {5000}


def test_holder_reads_behind_the_page_header(world: World) -> None:
    """A compute that starts at a page boundary reads where its first record begins."""
    world.registry.acquire(Lsn(0x1000000), 10)
    world.registry.acquire(Lsn(0x1004000), 10)
    assert world.collect(0x2000000) == [0x1000000 + 40, 0x1004000 + 24]
    assert world.registry.is_leased(0x1000000) and world.registry.is_leased(0x1000000 + 40)
    assert not world.registry.is_leased(0x1000000 + 48)


def test_leases_expire(world: World) -> None:
    lease = world.registry.acquire(Lsn(3000), 10)
    assert lease.ttl == 10
    world.now += 9.9
    assert world.collect(9000) == [3000]
    world.now += 0.1
    assert not world.registry.is_leased(3000)
    assert world.collect(9000) == []
    with pytest.raises(LeaseGoneError):
        world.registry.renew(lease.lease_id, 10)


def test_renewal_extends_and_moves(world: World) -> None:
    lease = world.registry.acquire(Lsn(3000), 10)
    world.now += 9
    world.registry.renew(lease.lease_id, 10)
    world.now += 9
    assert world.collect(3500) == [3000]
    world.registry.renew(lease.lease_id, 10, Lsn(4000))
    assert world.collect(9000) == [4000]


def test_lease_protects_its_own_renewal(world: World) -> None:
    lease = world.registry.acquire(Lsn(3000), 10)
    world.collect(8000)
    assert world.registry.renew(lease.lease_id, 10, Lsn(3000)).lsn == 3000
    with pytest.raises(Gone):
        world.registry.renew(lease.lease_id, 10, Lsn(4000))
    assert world.collect(9000) == [3000]


def test_unknown_lease_is_made_anew_while_readable(world: World) -> None:
    renewed = world.registry.renew("from an earlier life", 10, Lsn(3000))
    assert renewed.lease_id == "from an earlier life"
    assert world.collect(9000) == [3000]
    world.now += 20
    assert world.collect(9000) == []
    with pytest.raises(Gone):
        world.registry.renew("from an earlier life", 10, Lsn(3000))


def test_nothing_below_the_cutoff_is_leased(world: World) -> None:
    with pytest.raises(Gone):
        world.registry.acquire(Lsn(999), 10)
    assert world.registry.lsns() == frozenset()


def test_leases_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "timeline"
    before = World(path)
    kept = before.registry.acquire(Lsn(3000), 10)
    moved = before.registry.renew(before.registry.acquire(Lsn(3100), 10).lease_id, 20, Lsn(3200))
    before.registry.release(before.registry.acquire(Lsn(3300), 10).lease_id)
    before.collect(9000)
    after = World(path)
    after.cutoff = before.cutoff
    assert after.collect(9500) == [3000, 3200]
    after.now += 9
    assert after.registry.renew(kept.lease_id, 10).lsn == 3000
    after.now += 9
    assert after.collect(9500) == [3000, 3200]
    after.now += 2
    assert after.registry.holds(kept.lease_id) is False
    assert after.registry.holds(moved.lease_id) is False


def test_lease_is_durable_before_it_is_promised(tmp_path: Path) -> None:
    """What could not be written is not kept either; what was promised before still is."""
    path = tmp_path / "leases" / "timeline"
    world = World(path)
    lease = world.registry.acquire(Lsn(3000), 10)
    path.parent.rename(tmp_path / "away")
    (tmp_path / "leases").write_text("in the way")
    with pytest.raises(OSError):
        world.registry.acquire(Lsn(4000), 10)
    with pytest.raises(OSError):
        world.registry.renew(lease.lease_id, 10, Lsn(4000))
    assert world.registry.renew(lease.lease_id, 10).lsn == 3000
    assert world.collect(9000) == [3000]


def test_damaged_file_stops_collections(tmp_path: Path) -> None:
    """Whose leases they were is not known, so nothing is collected until all were renewed."""
    path = tmp_path / "leases" / "timeline"
    World(path).registry.acquire(Lsn(3000), 10)
    path.write_bytes(path.read_bytes().replace(b"0/BB8", b"0/FB8"))
    world = World(path)
    world.collect(9000)
    assert world.cutoff == 1000
    world.registry.renew("a lease", MAX_TTL, Lsn(3000))
    world.now += MAX_TTL - 1
    world.registry.renew("a lease", 10, Lsn(3000))
    world.now += 1
    assert world.collect(9000) == [3000]
    assert world.cutoff == 9000
