"""LSN leases: expiry, renewal, and their effect on the garbage collection cutoff."""

import pytest

from pageserver.leases import LeaseGoneError, LeaseRegistry
from zenith_utils.lsn import Lsn


class Gone(Exception):
    """Not readable any more."""


class World:
    """A clock and a cutoff under the test's control."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cutoff = Lsn(1000)
        self.registry = LeaseRegistry(self.check, clock=lambda: self.now)

    def check(self, lsn: Lsn) -> None:
        """What the registry asks before it promises."""
        if lsn < self.cutoff:
            raise Gone

    def collect(self, wanted: int) -> Lsn:
        """One garbage collection."""

        def publish(cutoff: Lsn) -> None:
            self.cutoff = max(self.cutoff, cutoff)

        return self.registry.publish_cutoff(Lsn(wanted), publish)


@pytest.fixture
def world() -> World:
    return World()


def test_lowest_lease_limits_the_cutoff(world: World) -> None:
    world.registry.acquire(Lsn(5000), 10)
    low = world.registry.acquire(Lsn(3000), 10)
    assert world.registry.lowest_lsn() == 3000
    assert world.collect(9000) == 3000
    assert world.collect(2000) == 2000
    assert world.registry.release(low.lease_id)
    assert not world.registry.release(low.lease_id)
    assert world.collect(9000) == 5000


def test_leases_expire(world: World) -> None:
    lease = world.registry.acquire(Lsn(3000), 10)
    assert world.registry.remaining(lease) == 10
    world.now += 9.9
    assert world.registry.lowest_lsn() == 3000
    world.now += 0.1
    assert world.registry.lowest_lsn() is None
    with pytest.raises(LeaseGoneError):
        world.registry.renew(lease.lease_id, 10)


def test_renewal_extends_and_moves(world: World) -> None:
    lease = world.registry.acquire(Lsn(3000), 10)
    world.now += 9
    world.registry.renew(lease.lease_id, 10)
    world.now += 9
    assert world.registry.lowest_lsn() == 3000
    world.registry.renew(lease.lease_id, 10, Lsn(4000))
    assert world.registry.lowest_lsn() == 4000


def test_lease_protects_its_own_renewal(world: World) -> None:
    lease = world.registry.acquire(Lsn(3000), 10)
    world.cutoff = Lsn(8000)  # a cutoff that ignored the lease must not end it
    assert world.registry.renew(lease.lease_id, 10, Lsn(3000)).lsn == 3000
    with pytest.raises(Gone):
        world.registry.renew(lease.lease_id, 10, Lsn(4000))


def test_unknown_lease_is_made_anew_while_readable(world: World) -> None:
    renewed = world.registry.renew("from an earlier life", 10, Lsn(3000))
    assert renewed.lease_id == "from an earlier life"
    assert world.collect(9000) == 3000
    world.now += 20
    assert world.collect(9000) == 9000
    with pytest.raises(Gone):
        world.registry.renew("from an earlier life", 10, Lsn(3000))


def test_nothing_below_the_cutoff_is_leased(world: World) -> None:
    with pytest.raises(Gone):
        world.registry.acquire(Lsn(999), 10)
    assert world.registry.lowest_lsn() is None
