"""Ingestion of a stock server's WAL: compared with its files and with plain Python."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from batch_unit.ingest_oracle import Oracle, records
from batch_unit.ingest_reference import Reference, Values
from batch_unit.ingest_support import VARIANTS, Recording, record
from batch_unit.workspace import temporary_workspace

from pageserver import keys
from pageserver.import_datadir import import_datadir
from pageserver.layered_repository.repository import Repository
from pageserver.layered_repository.settings import StoreSettings
from pageserver.layered_repository.timeline import Timeline
from pageserver.pgdatadir_mapping import DatadirTimeline
from pageserver.reconstruct import PageRedo, make_reconstruct
from pageserver.time_travel import TimestampKind, lsn_by_timestamp
from pageserver.walingest import IngestError, WalIngest
from pageserver.walredo import RedoRequest, WalRedoPool
from pgxn.build import build_module
from postgres_ffi import xact_records as xact
from postgres_ffi.checkpoint import parse_checkpoint
from postgres_ffi.slru import SlruKind
from postgres_ffi.versions import Rmgr
from postgres_ffi.wal_decoder import WalDecodeError
from zenith_utils.ids import TenantId, TimelineId

DATABASE = 5  # "postgres"
ALL_KEYS = (bytes(18), b"\xff" * 18)
XACT_ENDS = {
    xact.XLOG_XACT_COMMIT,
    xact.XLOG_XACT_ABORT,
    xact.XLOG_XACT_COMMIT_PREPARED,
    xact.XLOG_XACT_ABORT_PREPARED,
}


class NoRedo:
    """For tests that read no pages back; a copied database may hold anything."""

    def redo(self, requests: Sequence[RedoRequest]) -> list[bytes]:
        """One page for all."""
        return [b"\1" * 8192 for _ in requests]


@pytest.fixture(scope="module")
def recordings() -> Iterator[Callable[[str], Recording]]:
    """Recordings by their variant, each made when it is first asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def make(name: str) -> Recording:
            return record(stack.enter_context(temporary_workspace()), VARIANTS[name])

        yield make


@pytest.fixture(params=VARIANTS)
def any_recording(
    request: pytest.FixtureRequest, recordings: Callable[[str], Recording]
) -> Recording:
    return recordings(request.param)


@pytest.fixture
def recording(recordings: Callable[[str], Recording]) -> Recording:
    return recordings("plain")


@contextlib.contextmanager
def redo_pool(recording: Recording, workdir: Path) -> Iterator[WalRedoPool]:
    pool = WalRedoPool(
        recording.distrib,
        build_module(recording.distrib, "walredo"),
        workdir,
        control_file=(recording.before / "global/pg_control").read_bytes(),
        wal_log_hints="wal_log_hints" in recording.variant.settings,
    )
    try:
        yield pool
    finally:
        pool.close()


def imported(
    recording: Recording, path: Path, redo: PageRedo, **settings: Any
) -> tuple[Repository, Timeline]:
    """A repository whose timeline is the cluster before its first start."""
    path.mkdir(exist_ok=True)
    repository = Repository(
        path, TenantId.generate(), StoreSettings(**settings), make_reconstruct(redo)
    )
    system_identifier = recording.control(recording.before).system_identifier
    timeline = import_datadir(
        repository, TimelineId.generate(), recording.before, system_identifier
    )
    return repository, timeline


def open_ingest(recording: Recording, timeline: Timeline) -> tuple[DatadirTimeline, WalIngest]:
    datadir = DatadirTimeline(timeline, recording.version)
    return datadir, WalIngest(datadir)


def wal_behind(recording: Recording, lsn: int) -> memoryview:
    return memoryview(recording.wal)[lsn - recording.start_lsn :]


def test_everything_equals_the_servers_files(any_recording: Recording, tmp_path: Path) -> None:
    """Through frozen layers, layer files, a restart in the middle, and back through redo."""
    recording = any_recording
    with temporary_workspace() as workdir, redo_pool(recording, workdir / "redo") as redo:
        repository, timeline = imported(
            recording, tmp_path / "repository", redo, checkpoint_distance=8 << 20
        )
        datadir, ingest = open_ingest(recording, timeline)
        datadir.current_logical_size()
        wal = wal_behind(recording, ingest.start_lsn)
        ingest.ingest(wal[: len(wal) // 2])
        repository.shutdown(flush=True)

        repository = Repository(
            tmp_path / "repository", repository.tenant_id, StoreSettings(), make_reconstruct(redo)
        )
        timeline = repository.timeline(timeline.timeline_id)
        datadir, ingest = open_ingest(recording, timeline)
        datadir.current_logical_size()
        wal = wal_behind(recording, ingest.start_lsn)
        assert len(wal) < len(recording.wal) * 0.6
        end = ingest.ingest(wal)
        assert end == recording.start_lsn + len(recording.wal)

        oracle = Oracle(recording, datadir, redo)
        oracle.compare()
        assert oracle.differences == []
        assert oracle.counts["main pages"] > 5000
        assert oracle.counts["pages equal when masked"] < 1000
        assert oracle.counts["prepared transactions"] == 1
        assert datadir.current_logical_size() == datadir.logical_size(end)
        assert datadir.replication_origins(end) == {1: 0xAA0000BB00, 2: 0xCC000000DD}
        assert set(datadir.tablespaces(end).values()) == {""}
        check_counters_before_shutdown(recording, datadir)
        repository.shutdown(flush=False)


def check_counters_before_shutdown(recording: Recording, datadir: DatadirTimeline) -> None:
    """What was tracked record by record is what the server itself says at its end."""
    control = recording.control(recording.after)
    tracked = parse_checkpoint(datadir.checkpoint(control.checkpoint_lsn), recording.version)
    said = control.checkpoint
    assert tracked.next_xid == said.next_xid
    assert (tracked.next_multi, tracked.next_multi_offset) == (
        said.next_multi,
        said.next_multi_offset,
    )
    assert (tracked.oldest_xid, tracked.oldest_multi) == (said.oldest_xid, said.oldest_multi)


def test_truncation_was_covered(any_recording: Recording) -> None:
    """The recordings are worth something only if segments were dropped in them."""
    recording = any_recording
    for kind in SlruKind:
        before = {path.name for path in (recording.before / kind.directory).iterdir()}
        after = {path.name for path in (recording.after / kind.directory).iterdir()}
        assert bool(before - after) == bool(recording.variant.jumps), kind


# ---- native and plain Python


def stored_values(timeline: Timeline) -> Values:
    """All values in layer files above the imported image."""
    timeline.checkpoint()
    return {
        (key, lsn): (flags, data)
        for layer in timeline.view.layers
        if not layer.is_image
        for key, lsn, flags, data in layer.entries()
    }


def is_compared(key: bytes) -> bool:
    """Whether the reference produces the values of this key."""
    kind, _, b, c, d, _ = keys.split_key(key)
    if kind == keys.KeyKind.RELATION:
        return b == DATABASE and (c != 0 or d != 0)
    if kind == keys.KeyKind.SLRU:
        return key[-4:] != b"\xff" * 4 and b == 1
    return key in (keys.COUNTERS_KEY, keys.COMMIT_TIME_KEY)


def test_native_values_are_those_of_plain_python(recording: Recording, tmp_path: Path) -> None:
    repository, timeline = imported(recording, tmp_path / "repository", NoRedo())
    datadir, ingest = open_ingest(recording, timeline)
    start = ingest.start_lsn
    reference = Reference(DATABASE, dict(datadir.relation_sizes(start)), datadir.counters(start))
    ingest.ingest(wal_behind(recording, start))
    for one in records(recording):
        if one.end_lsn > start:
            reference.apply(one)
    assert reference.next_xid == datadir.counters(timeline.last_record_lsn)[0]
    native = {at: value for at, value in stored_values(timeline).items() if is_compared(at[0])}
    expected = {at: value for at, value in reference.values.items() if is_compared(at[0])}
    zeros = {at for at, value in native.items() if at[0][0] == 1 and value == (1, b"")}
    assert {at: value for at, value in native.items() if at not in zeros} == expected
    assert len(expected) > 100_000
    repository.shutdown(flush=False)


def test_times_lead_where_recovery_would_stop(recording: Recording, tmp_path: Path) -> None:
    """As with recovery_target_time: before the first transaction that ended later."""
    repository, timeline = imported(recording, tmp_path / "repository", NoRedo())
    datadir, ingest = open_ingest(recording, timeline)
    end = ingest.ingest(wal_behind(recording, ingest.start_lsn))
    ends = [
        (one.end_lsn, xact.parse_xact_end(one.main_data, one.info, recording.version).xact_time)
        for one in records(recording)
        if one.rmid == Rmgr.XACT and one.info & xact.XLOG_XACT_OPMASK in XACT_ENDS
    ]
    times = sorted({time for _, time in ends})
    assert len(times) > 200
    for time in random.Random(7).sample(times, 60):
        found = lsn_by_timestamp(datadir, time)
        later = min((lsn for lsn, other in ends if other > time), default=end + 8)
        assert found.lsn == later - 8
    assert lsn_by_timestamp(datadir, times[0] - 1).kind is TimestampKind.PAST
    assert lsn_by_timestamp(datadir, times[-1]).kind is TimestampKind.FUTURE
    repository.shutdown(flush=False)


def test_any_chunking_gives_the_same_values(recording: Recording, tmp_path: Path) -> None:
    part = 3 << 20
    results = []
    generator = random.Random(5)
    for number, sizes in enumerate(((1 << 30,), (1, 7, 24, 8191, 100_000), (8192,))):
        repository, timeline = imported(recording, tmp_path / str(number), NoRedo())
        _, ingest = open_ingest(recording, timeline)
        wal = wal_behind(recording, ingest.start_lsn)[:part]
        start = 0
        while start < len(wal):
            end = start + generator.choice(sizes)
            last = ingest.ingest(wal[start:end])
            assert last == timeline.last_record_lsn == ingest.position
            start = end
        results.append((last, timeline.prev_record_lsn, stored_values(timeline)))
        repository.shutdown(flush=False)
    assert results[0] == results[1] == results[2]
    assert len(results[0][2]) > 5000


def test_damage_never_becomes_visible(recording: Recording, tmp_path: Path) -> None:
    """A flipped bit anywhere: an error, and exactly the records before it are there."""
    early = [one for one in records(recording) if one.end_lsn < recording.start_lsn + 300_000]
    generator = random.Random(11)
    for number in range(5):
        repository, timeline = imported(recording, tmp_path / str(number), NoRedo())
        _, ingest = open_ingest(recording, timeline)
        begin = ingest.start_lsn
        wal = bytearray(wal_behind(recording, begin)[:300_000])
        # behind its length, which may look like that of a record yet to arrive
        victim = generator.choice([one for one in early[2:] if one.start_lsn % 8192 < 4096])
        at = victim.start_lsn - begin + generator.randrange(4, min(len(victim.raw), 4096))
        wal[at] ^= 1 << generator.randrange(8)
        with pytest.raises((WalDecodeError, IngestError)):
            ingest.ingest(wal)
        last = timeline.last_record_lsn
        assert last == max(one.end_lsn for one in early if one.end_lsn <= victim.start_lsn)
        clean_repository, clean = imported(recording, tmp_path / f"clean{number}", NoRedo())
        _, clean_ingest = open_ingest(recording, clean)
        clean_ingest.ingest(wal_behind(recording, begin)[: last - begin])
        assert stored_values(clean) == stored_values(timeline)
        for each in (repository, clean_repository):
            each.shutdown(flush=False)


def test_every_record_is_atomic_and_the_past_stays_readable(
    recording: Recording, tmp_path: Path
) -> None:
    """Sizes and counters at old LSNs do not change with what comes later."""
    repository, timeline = imported(recording, tmp_path / "repository", NoRedo())
    datadir, ingest = open_ingest(recording, timeline)
    wal = wal_behind(recording, ingest.start_lsn)
    cuts = [0, *sorted(random.Random(3).sample(range(len(wal)), 12)), len(wal)]
    seen = []
    for start, end in pairwise(cuts):
        lsn = ingest.ingest(wal[start:end])
        seen.append((lsn, datadir.relation_sizes(lsn), datadir.checkpoint(lsn)))
    fresh = DatadirTimeline(timeline, recording.version)
    for lsn, sizes, checkpoint in seen:
        assert fresh.relation_sizes(lsn) == sizes
        assert fresh.checkpoint(lsn) == checkpoint
    assert len({len(sizes) for _, sizes, _ in seen}) > 5
    repository.shutdown(flush=False)
