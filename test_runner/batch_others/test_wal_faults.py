"""One fault at a time under a writer: what a minority does costs no commit, and all heals."""

from __future__ import annotations

import contextlib
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fixtures.fault_shim import Faults, FaultyPrograms
from fixtures.postgres import Postgres
from fixtures.safekeeper_wal import Timeline, assert_same_wal
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.tcp_proxy import Direction, TcpProxy
from fixtures.utils import frozen, lsn_from_hex, wait_until
from fixtures.writer import Writer
from fixtures.zenith_env import ZenithEnvBuilder

DAY = 24 * 3600
# Some 40 MB of WAL: more than two segments.
BULK = "CREATE TABLE bulk AS SELECT repeat('x', 500) FROM generate_series(1, 70000)"


def timelines(pg: Postgres) -> list[Timeline]:
    """The compute's timeline on each safekeeper."""
    branch = Branch.of(pg)
    return [Timeline(s, branch.tenant, branch.timeline) for s in pg.env.safekeepers]


def flush_lsn(pg: Postgres) -> int:
    """Where the compute's WAL ends now."""
    return lsn_from_hex(pg.safe_psql(FLUSH_LSN)[0][0])


def wait_all_agree(pg: Postgres) -> None:
    """Every safekeeper catches up, and has the very same WAL."""
    lsn = flush_lsn(pg)
    for timeline in timelines(pg):
        timeline.wait_committed(lsn)
    assert assert_same_wal(timelines(pg)) > 0


def check_survives(pg: Postgres, writer: Writer) -> None:
    """All that was acknowledged is there, also on a compute that knows it from storage alone."""
    writer.finish()
    wait_all_agree(pg)
    pg.kill()
    pg.start()
    writer.finish()


def resident_bytes(pid: int) -> int:
    """Memory that a process has now."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def start(builder: ZenithEnvBuilder, *, proxied: bool = False) -> Postgres:
    """A compute over three safekeepers that sync."""
    builder.num_safekeepers = 3
    builder.safekeepers_sync = True
    builder.proxied = proxied
    return builder.init_start().postgres.create_start("main")


def start_faulty(
    builder: ZenithEnvBuilder, directory: str
) -> tuple[Postgres, list[Faults], Faults]:
    """The same with disks and clocks that can fail: those of safekeepers and pageserver."""
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler to make the library with the faults")
    programs = FaultyPrograms(Path(directory) / "programs", builder.paths.zenith_bin)
    builder.distrib_dir = programs.directory
    builder.num_safekeepers = 3
    builder.safekeepers_sync = True
    env = builder.init()
    faults = [programs.faults(safekeeper.data_dir) for safekeeper in env.safekeepers]
    of_pageserver = programs.faults(env.repo_dir)
    env.start()
    return env.postgres.create_start("main"), faults, of_pageserver


# ---- hung processes


def test_hung_safekeeper(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Commits go on without it, nothing piles up for it, and it catches up afterwards.

    A machine that hangs is worse than one that is gone, as its connections look alive: it must
    cost neither commits nor memory.
    """
    pg = start(zenith_env_builder)
    proposer = pg.walproposer_pid()
    with Writer(pg) as writer:
        writer.go_on()
        before = resident_bytes(proposer)
        with frozen(pg.env.safekeepers[1].pid()):
            pg.safe_psql(BULK)
            writer.go_on()
            assert resident_bytes(proposer) < before + (16 << 20)
        check_survives(pg, writer)


def test_hung_majority(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Commits wait as long as two of three hang, and none of them fails.

    Waiting is the only right thing without a majority: an error, or success, would both be
    lies.
    """
    pg = start(zenith_env_builder)
    with Writer(pg) as writer:
        writer.go_on()
        with frozen(*(s.pid() for s in pg.env.safekeepers[1:])):
            wait_until(lambda: commits_wait(pg), what="a commit to wait for the quorum")
            acknowledged = writer.acknowledged
        writer.go_on()
        assert writer.acknowledged > acknowledged
        check_survives(pg, writer)


def commits_wait(pg: Postgres) -> bool:
    """Whether a commit has waited for the quorum for a second."""
    query = (
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep' "
        "AND now() - query_start > '1 s'"
    )
    return pg.safe_psql(query) == [(True,)]


# ---- bad disks and clocks


def test_disk_full(zenith_env_builder: ZenithEnvBuilder, test_output_dir: str) -> None:
    """A safekeeper without room says so and falls out; it is back by itself when there is room.

    A full disk is the most common failure of all, and is to be fixed by making room, not by an
    expert.
    """
    pg, faults, _ = start_faulty(zenith_env_builder, test_output_dir)
    full = pg.env.safekeepers[0]
    with Writer(pg) as writer:
        writer.go_on()
        faults[0].set(disk_full=True)
        # The segment in use and the next one are there already.
        pg.safe_psql(BULK)
        writer.go_on()
        lsn = flush_lsn(pg)
        wait_until(
            lambda: "failed: [Errno 28] No space left on device" in full.log_text(),
            what="the safekeeper to say what is wrong",
        )
        assert timelines(pg)[0].flush_lsn < lsn
        faults[0].set()
        timelines(pg)[0].wait_flushed(lsn)
        check_survives(pg, writer)


def test_disk_that_does_not_sync(
    zenith_env_builder: ZenithEnvBuilder, test_output_dir: str
) -> None:
    """Commits have the speed of the other two; what is not synced is not taken for durable.

    A disk may take writes and never sync them: counted as durable they would be lost with the
    power.
    """
    pg, faults, _ = start_faulty(zenith_env_builder, test_output_dir)
    with Writer(pg) as writer:
        writer.go_on()
        faults[2].set(hold_sync=True)
        writer.go_on()
        held = timelines(pg)[2].flush_lsn
        writer.go_on()
        assert timelines(pg)[2].flush_lsn == held
        # With two such disks there is no majority that has it durably.
        faults[1].set(hold_sync=True)
        wait_until(lambda: commits_wait(pg), what="a commit to wait for the quorum")
        faults[1].set()
        writer.go_on()
        faults[2].set()
        check_survives(pg, writer)


def test_clock_jumps(zenith_env_builder: ZenithEnvBuilder, test_output_dir: str) -> None:
    """Nothing rests on the time of day: not sessions, leases, elections or the WAL itself.

    Clocks are set, drift and leap. Who rests safety on them loses it on such a day.
    """
    pg, faults, of_pageserver = start_faulty(zenith_env_builder, test_output_dir)
    with Writer(pg) as writer:
        for offset in (DAY, -DAY, 20 * 365 * DAY, -20 * 365 * DAY):
            faults[0].set(clock_offset=offset)
            faults[1].set(clock_offset=-offset)
            of_pageserver.set(clock_offset=offset)
            writer.go_on()
        # Elections, recovery and the base backup in this state.
        check_survives(pg, writer)
    past = datetime.now(UTC) - timedelta(days=20 * 365)
    assert f"\n{past.year}-" in pg.env.safekeepers[0].log_text(), "its clock has not jumped"


# ---- cut and stalled connections


@pytest.mark.parametrize("cut", [1, 2])
def test_cut_off_safekeepers(zenith_env_builder: ZenithEnvBuilder, cut: int) -> None:
    """Without one commits go on, without two they wait; whoever comes back gets what it lacks.

    A partition must look like what it is on each side, and heal without anybody's help.
    """
    pg = start(zenith_env_builder, proxied=True)
    away = pg.env.network.to_safekeepers[:cut]
    with Writer(pg) as writer:
        writer.go_on()
        for proxy in away:
            proxy.refuse()
        if cut == 1:
            writer.go_on()
            assert timelines(pg)[0].flush_lsn < flush_lsn(pg)
        else:
            wait_until(lambda: commits_wait(pg), what="a commit to wait for the quorum")
        for proxy in away:
            proxy.resume()
        writer.go_on()
        check_survives(pg, writer)


@pytest.mark.parametrize("direction", list(Direction), ids=lambda d: d.name.lower())
def test_one_way_stall(zenith_env_builder: ZenithEnvBuilder, direction: Direction) -> None:
    """A safekeeper that hears nothing, or is not heard, holds nobody up; two of them do.

    Half-broken links pass for good ones to whoever looks at one direction only.
    """
    pg = start(zenith_env_builder, proxied=True)
    first, second, _ = pg.env.network.to_safekeepers
    with Writer(pg) as writer:
        writer.go_on()
        first.stall(direction)
        writer.go_on()
        second.stall(direction)
        wait_until(lambda: commits_wait(pg), what="a commit to wait for the quorum")
        first.resume()
        writer.go_on()
        second.resume()
        check_survives(pg, writer)


def test_stalled_pageserver(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Commits go on while no WAL gets to the pageserver, as far as the limits let them.

    Reads' side of the network must not take the writes' side down.
    """
    pg = start(zenith_env_builder, proxied=True)
    network, branch = pg.env.network, Branch.of(pg)
    with Writer(pg) as writer:
        writer.go_on()
        for proxy in network.to_senders:
            proxy.stall()
        writer.go_on()
        lsn = flush_lsn(pg)
        assert branch.last_record_lsn() < lsn
        network.resume()
        wait_until(lambda: branch.last_record_lsn() >= lsn, what="the pageserver to catch up")
        check_survives(pg, writer)


def test_reconnect_storm(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Connections that break all the time slow commits down and lose none.

    A flapping network makes every message one that may have arrived or not: each must be done
    once.
    """
    pg = start(zenith_env_builder, proxied=True)
    network = pg.env.network
    with Writer(pg) as writer:
        for number in range(60):
            network.proxies[number % len(network.proxies)].cut(reset=number % 2 == 0)
            if number % 5 == 0:
                writer.go_on(5)
        check_survives(pg, writer)


# ---- damage on the way


class BitFlipper:
    """Changes a bit of a record's data wherever it goes by on its way to a safekeeper."""

    def __init__(self, marker: bytes) -> None:
        self.marker = marker
        self.damaged = marker[:-1] + bytes([marker[-1] ^ 1])
        self.flipped = 0

    def __call__(self, direction: Direction, data: bytes) -> bytes:
        """The chunk with the flaw."""
        if direction is Direction.TO_SERVER and self.marker in data:
            self.flipped += 1
            return data.replace(self.marker, self.damaged)
        return data

    def insert(self) -> str:
        """A row with it, several times: a page of WAL or a chunk may end inside one."""
        return f"INSERT INTO damaged VALUES (repeat('{self.marker.decode()}', 3))"

    def watch(self, proxies: list[TcpProxy]) -> None:
        """Damage what goes through these."""
        for proxy in proxies:
            proxy.tamper(self)


def test_flipped_bits_on_the_way(zenith_env_builder: ZenithEnvBuilder) -> None:
    """WAL that arrives damaged is refused by its CRC: never durable, never acknowledged.

    TCP's checksum lets one in many errors through, and memory adds its own: what is stored for
    good needs a better witness.
    """
    pg = start(zenith_env_builder, proxied=True)
    proxies = pg.env.network.to_safekeepers
    flipper = BitFlipper(b"the-record-that-is-damaged-on-its-way")
    with Writer(pg) as writer:
        pg.safe_psql("CREATE TABLE damaged (t text)")
        # The way to one of them: the quorum has it, the third gets it when the way is good again.
        flipper.watch(proxies[:1])
        pg.safe_psql(flipper.insert())
        wait_until(lambda: flipper.flipped >= 2, what="a second attempt to send the record")
        lsn = flush_lsn(pg)
        assert timelines(pg)[0].flush_lsn < lsn
        writer.go_on()
        assert "invalid WAL from the proposer" in pg.env.safekeepers[0].log_text()
        proxies[0].tamper(None)
        timelines(pg)[0].wait_flushed(lsn)
        # The way to two: nobody is told that it is safe.
        flipper.watch(proxies[:2])
        with contextlib.closing(pg.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = off")
            cursor.execute(flipper.insert())
            # It is flushed later.
            cursor.execute("SELECT pg_current_wal_insert_lsn()::text")
            lsn = lsn_from_hex(cursor.fetchone()[0])
        timelines(pg)[2].wait_flushed(lsn)
        wait_until(lambda: commits_wait(pg), what="a commit to wait for the quorum")
        assert all(timeline.commit_lsn < lsn for timeline in timelines(pg))
        assert all(timeline.flush_lsn < lsn for timeline in timelines(pg)[:2])
        for proxy in proxies:
            proxy.tamper(None)
        writer.go_on()
        for timeline in timelines(pg):
            assert all(
                flipper.damaged not in path.read_bytes() for path in timeline.segments().values()
            )
        check_survives(pg, writer)
        assert pg.safe_psql("SELECT count(*) FROM damaged") == [(2,)]
