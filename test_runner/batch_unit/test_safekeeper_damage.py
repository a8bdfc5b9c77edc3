"""What a safekeeper makes of files that are lost or damaged: it notices, and does not vote."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from batch_unit.safekeeper_support import WalWriter

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper import control_file, identity
from safekeeper.consensus import ControlState, ServerInfo
from safekeeper.control_file import CONTROL_FILE_NAME
from safekeeper.identity import ID_FILE_NAME, INSTANCE_FILE_NAME, IdentityError
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.timeline_registry import REGISTRY_FILE_NAME, RegistryError, TimelineRegistry
from safekeeper.timelines import TimelineExistsError, TimelineNotFoundError, Timelines
from safekeeper.verify_wal import WalVerifier, last_record_end
from safekeeper.wal_files import WalDamagedError, list_segments, segment_path
from safekeeper.wal_storage import WalStorage, wal_magic
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.safekeeper_messages import TermLsn

ONE = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"1" * 16))
TWO = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"2" * 16))
MAGIC = wal_magic(0)
SEGMENT = 3
# A little before the end of a segment: three segments are few bytes then.
START = (SEGMENT + 1) * WAL_SEGMENT_SIZE - 65536 + 24


@pytest.fixture
def helper() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def wal() -> WalWriter:
    """WAL with bytes in three segments, the last of them filled by one long record."""
    writer = WalWriter(START)
    writer.until(START + 100_000)
    writer.record(2 * WAL_SEGMENT_SIZE)
    writer.until(writer.lsn + 50_000)
    return writer


def write_timeline(root: Path, wal: WalWriter, commit_lsn: int, helper: ThreadPoolExecutor) -> Path:
    """A timeline on disk, as a safekeeper in term 5 leaves it."""
    directory = root / str(ONE.tenant_id) / str(ONE.timeline_id)
    directory.mkdir(parents=True)
    storage = WalStorage(directory, sync=False, helper=helper)
    storage.open(0, MAGIC)
    storage.truncate(START, MAGIC)
    for offset in range(0, len(wal.data), 1 << 17):
        storage.write(START + offset, memoryview(wal.data)[offset : offset + (1 << 17)])
    storage.flush()
    storage.close()
    state = ControlState(
        *ONE,
        term=5,
        term_history=(TermLsn(5, START),),
        server=ServerInfo(150000, 1, WAL_SEGMENT_SIZE),
        commit_lsn=commit_lsn,
    )
    control_file.store(directory, state, sync=False)
    return directory


def flip(directory: Path, lsn: int) -> Path:
    """Flip a bit of the WAL at a position; the file."""
    segno, offset = divmod(lsn, WAL_SEGMENT_SIZE)
    path = segment_path(directory, segno, partial=False)
    if not path.exists():
        path = segment_path(directory, segno, partial=True)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
    return path


def wal_bytes(directory: Path, begin: int, end: int) -> bytes:
    data = b""
    for segno, partial in list_segments(directory):
        data += segment_path(directory, segno, partial=partial).read_bytes()
    first = list_segments(directory)[0][0] * WAL_SEGMENT_SIZE
    return data[begin - first : end - first]


def record_end(wal: WalWriter, lsn: int) -> int:
    return max((end for end in wal.ends if end <= lsn), default=0)


# ---- who the safekeeper is


def test_instance_stays_and_is_new_with_an_empty_disk(tmp_path: Path) -> None:
    first = identity.load_or_create(tmp_path, 7)
    assert identity.load_or_create(tmp_path, None) == first
    with pytest.raises(IdentityError, match="already initialized with id 7, can't set 8"):
        identity.load_or_create(tmp_path, 8)
    (tmp_path / ID_FILE_NAME).unlink()
    # Where a start broke off between the two files the instance is the same.
    assert identity.load_or_create(tmp_path, 7) == first
    (tmp_path / ID_FILE_NAME).unlink()
    (tmp_path / INSTANCE_FILE_NAME).unlink()
    assert identity.load_or_create(tmp_path, 7).instance != first.instance


def test_directory_without_instance_gets_one(tmp_path: Path) -> None:
    (tmp_path / ID_FILE_NAME).write_text("3")
    me = identity.load_or_create(tmp_path, None)
    assert (me.id, len(me.instance)) == (3, 16)
    assert identity.load_or_create(tmp_path, 3) == me
    (tmp_path / INSTANCE_FILE_NAME).write_text("no instance")
    with pytest.raises(IdentityError, match=INSTANCE_FILE_NAME):
        identity.load_or_create(tmp_path, 3)


# ---- the registry


def test_registry_remembers_timelines_and_terms(tmp_path: Path) -> None:
    registry = TimelineRegistry(tmp_path, [TWO], sync=True)
    registry.note(ONE, 0)
    registry.note(ONE, 4)
    registry.note(ONE, 3)
    registry.close()
    registry = TimelineRegistry(tmp_path, [], sync=True)
    assert {one: registry.term(one) for one in (ONE, TWO)} == {ONE: 4, TWO: 0}
    assert registry.timelines() == [TWO, ONE]
    registry.close()


def test_registry_with_a_torn_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = TimelineRegistry(tmp_path, [], sync=False)
    registry.note(ONE, 1)
    registry.note(ONE, 2)
    registry.close()
    path = tmp_path / REGISTRY_FILE_NAME
    data = path.read_bytes()
    for torn in (data[:-1], data[:-44] + bytes(44), data[:-44]):
        path.write_bytes(torn)
        registry = TimelineRegistry(tmp_path, [], sync=False)
        assert registry.term(ONE) == 1
        registry.note(ONE, 3)
        registry.close()
        registry = TimelineRegistry(tmp_path, [], sync=False)
        assert registry.term(ONE) == 3
        registry.close()
    assert not caplog.messages


def test_damaged_registry_keeps_what_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = TimelineRegistry(tmp_path, [ONE], sync=False)
    registry.note(TWO, 9)
    registry.note(TWO, 10)
    registry.close()
    path = tmp_path / REGISTRY_FILE_NAME
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    registry = TimelineRegistry(tmp_path, [], sync=False)
    assert (registry.term(ONE), registry.term(TWO)) == (None, 10)
    registry.close()
    assert [m for m in caplog.messages if str(path) in m]
    path.write_bytes(data[:4] + b"\7" + data[5:])
    with pytest.raises(RegistryError, match="unsupported version 7"):
        TimelineRegistry(tmp_path, [], sync=False)


# ---- finding damage


def test_verifier_finds_every_damage(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    directory = write_timeline(tmp_path, wal, wal.lsn, helper)
    WalVerifier(directory, wal.lsn, MAGIC).ensure(START, wal.lsn)
    for lsn in (
        START,
        START + 70_003,
        (SEGMENT + 1) * WAL_SEGMENT_SIZE + 8,
        (SEGMENT + 2) * WAL_SEGMENT_SIZE + 5_000_000,
        wal.ends[-1] - 30,
    ):
        path = flip(directory, lsn)
        with pytest.raises(WalDamagedError, match=r"damaged WAL in \S+ at offset \d+") as error:
            WalVerifier(directory, wal.lsn, MAGIC).ensure(lsn, lsn + 1)
        assert error.value.good_end == record_end(wal, lsn)
        segments = [segment_path(directory, n, partial=p) for n, p in list_segments(directory)]
        assert any(str(segment) in str(error.value) for segment in segments)
        flip(directory, lsn)
        assert path.exists()
    WalVerifier(directory, wal.lsn, MAGIC).ensure(START, wal.lsn)


def test_verifier_leaves_alone_what_is_behind_its_limit(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    directory = write_timeline(tmp_path, wal, wal.lsn, helper)
    limit = record_end(wal, START + 50_000)
    flip(directory, limit + 100)
    verifier = WalVerifier(directory, limit, MAGIC)
    assert verifier.missing() == [SEGMENT]
    verifier.ensure(START, wal.lsn)
    assert verifier.missing() == []


def test_zeroed_and_missing_segments_are_damage(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    directory = write_timeline(tmp_path, wal, wal.lsn, helper)
    middle = segment_path(directory, SEGMENT + 2, partial=False)
    content = middle.read_bytes()
    for broken in (bytes(len(content)), content[:100_000], None):
        middle.unlink()
        if broken is not None:
            middle.write_bytes(broken)
        with pytest.raises(WalDamagedError) as error:
            WalVerifier(directory, wal.lsn, MAGIC).ensure(START, wal.lsn)
        assert error.value.good_end == record_end(wal, (SEGMENT + 2) * WAL_SEGMENT_SIZE)
        middle.write_bytes(content)
    assert last_record_end(directory, wal.lsn, MAGIC) == wal.lsn
    assert last_record_end(directory, START + 10, MAGIC) == 0


# ---- loading


def load(root: Path) -> Timelines:
    return Timelines(root, SafekeeperMetrics(), sync=False)


def test_whole_timeline_is_a_full_member(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    write_timeline(tmp_path, wal, wal.lsn, helper)
    timeline = load(tmp_path).get(ONE)
    assert (timeline.acceptor.state.recovering, timeline.flush_lsn) == (False, wal.lsn)
    timeline.check_all_wal()
    assert timeline.failure is None
    timeline.close()


def test_damage_behind_the_commit_lsn_is_cut_when_loaded(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    commit = record_end(wal, START + 30_000)
    directory = write_timeline(tmp_path, wal, commit, helper)
    position = (SEGMENT + 1) * WAL_SEGMENT_SIZE + 1_000
    path = flip(directory, position)
    damaged = path.read_bytes()
    good = record_end(wal, position)
    for _ in range(2):  # loaded again it is the same
        timeline = load(tmp_path).get(ONE)
        state = timeline.acceptor.state
        assert (state.recovering, state.term, state.commit_lsn) == (True, 5, commit)
        assert timeline.flush_lsn == good
        timeline.close()
    assert wal_bytes(directory, START, good) == wal.data[: good - START]
    assert not any(wal_bytes(directory, good, good + WAL_SEGMENT_SIZE))
    assert (directory / "damaged-1" / path.name).read_bytes() == damaged
    assert control_file.load(directory / CONTROL_FILE_NAME).recovering


def test_damage_below_the_commit_lsn_is_never_served(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    directory = write_timeline(tmp_path, wal, wal.lsn, helper)
    position = START + 40_001
    path = flip(directory, position)
    good = record_end(wal, position)
    timelines = load(tmp_path)
    timeline = timelines.get(ONE)
    with pytest.raises(WalDamagedError, match=rf"{path} at offset \d+"):
        timeline.check_wal(START, START + 1000)
    again = timelines.get(ONE)
    assert again is not timeline
    state = again.acceptor.state
    assert (state.recovering, state.commit_lsn, again.flush_lsn) == (True, good, good)
    assert [segno for segno, _ in list_segments(directory)] == [SEGMENT]
    assert len(list((directory / "damaged-1").iterdir())) == 4
    again.close()


@pytest.mark.parametrize("step", range(4))
def test_crash_while_damaged_wal_is_put_aside(
    tmp_path: Path,
    wal: WalWriter,
    helper: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    directory = write_timeline(tmp_path, wal, wal.lsn, helper)
    position = START + 40_001
    flip(directory, position)
    good = record_end(wal, position)
    timelines = load(tmp_path)
    with pytest.raises(WalDamagedError):
        timelines.get(ONE).check_wal(START, START + 1000)
    renames = 0
    rename = Path.rename

    def broken(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames > step:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(KeyboardInterrupt):
        timelines.get(ONE)
    monkeypatch.undo()
    timeline = load(tmp_path).get(ONE)
    assert timeline.acceptor.state.recovering
    assert timeline.flush_lsn == timeline.commit_lsn == good
    timeline.close()


def test_damaged_control_file_keeps_the_promise(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_timeline(tmp_path, wal, wal.lsn, helper)
    load(tmp_path).get(ONE).close()
    path = directory / CONTROL_FILE_NAME
    data = path.read_bytes()
    path.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    timeline = load(tmp_path).get(ONE)
    state = timeline.acceptor.state
    assert (state.recovering, state.term, state.commit_lsn) == (True, 5, 0)
    assert (state.term_history, timeline.flush_lsn) == ((), 0)
    assert list_segments(directory) == []
    aside = directory / "damaged-1"
    assert (aside / CONTROL_FILE_NAME).read_bytes() != data
    assert wal_bytes(aside, START, wal.lsn) == wal.data
    assert [m for m in caplog.messages if str(path) in m and str(aside) in m]
    timeline.close()


@pytest.mark.parametrize("whole", [True, False])
def test_vanished_timeline_is_missed(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, whole: bool
) -> None:
    directory = write_timeline(tmp_path, wal, wal.lsn, helper)
    timelines = load(tmp_path)
    with pytest.raises(TimelineNotFoundError):
        timelines.get(TWO)
    timeline = timelines.get(ONE)
    # Who still checks WAL whose files go takes that for damage, and writes that down beside them.
    timeline.check_all_wal()
    timeline.close()
    if whole:
        shutil.rmtree(directory.parent)
    else:
        (directory / CONTROL_FILE_NAME).unlink()
    timelines = load(tmp_path)
    with pytest.raises(TimelineExistsError):
        timelines.create(ONE)
    timeline = timelines.get_or_create(ONE)
    state = timeline.acceptor.state
    assert (state.recovering, state.term, timeline.flush_lsn) == (True, 5, 0)
    assert list((directory / "damaged-1").glob("0*")) == [] if whole else True
    assert not timelines.create(TWO).acceptor.state.recovering
    timeline.close()


def test_older_control_file_does_not_undo_a_promise(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    directory = write_timeline(tmp_path, wal, wal.lsn, helper)
    load(tmp_path).get(ONE).close()
    older = ControlState(*ONE, term=3, server=ServerInfo(150000, 1, WAL_SEGMENT_SIZE))
    control_file.store(directory, older, sync=False)
    timeline = load(tmp_path).get(ONE)
    assert timeline.acceptor.state.term == 5
    timeline.close()
