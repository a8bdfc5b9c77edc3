"""Removal and offload of WAL: what may go, crashes in between, what is stored and read back."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from batch_unit.safekeeper_support import WalWriter
from hypothesis import given
from hypothesis import strategies as st

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, normalize_lsn
from safekeeper import control_file, delivery, wal_removal
from safekeeper.consensus import ControlState, ServerInfo
from safekeeper.delivery import Delivery
from safekeeper.identity import INSTANCE_SIZE
from safekeeper.metrics import SafekeeperMetrics
from safekeeper.remote_wal import (
    CHECKSUM_SUFFIX,
    RemoteWal,
    RemoteWalDamagedError,
    RemoteWalError,
    RemoteWalUrlError,
)
from safekeeper.timeline import Timeline
from safekeeper.timeline_registry import TimelineRegistry
from safekeeper.timelines import Timelines
from safekeeper.wal_files import WalMissingError, WalStorageError, list_segments, segment_path
from safekeeper.wal_offload import WalOffload, check_records, store_segment
from safekeeper.wal_removal import (
    WalNeeds,
    missing_segment,
    removable_below,
    removable_segments,
    remove_segments,
)
from safekeeper.wal_retention import RetentionSettings, WalRemoval, WalRetention, retention_metrics
from zenith_utils.ids import TenantId, TenantTimelineId, TimelineId
from zenith_utils.safekeeper_messages import TermLsn
from zenith_utils.size import SizeError, format_size, parse_size

ID = TenantTimelineId(TenantId(b"t" * 16), TimelineId(b"l" * 16))
PAGESERVER = "postgresql://no_user:@127.0.0.1:1"
FIRST = 3
START = FIRST * WAL_SEGMENT_SIZE + 8192 + 24
LAST = FIRST + 3


@pytest.fixture(scope="module")
def wal() -> WalWriter:
    """WAL of four segments, with records across their boundaries."""
    writer = WalWriter(START)
    writer.until(LAST * WAL_SEGMENT_SIZE + 100_000, 400_000)
    return writer


@pytest.fixture
def helper() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """The directory of an object storage."""
    path = tmp_path / "storage"
    path.mkdir()
    return path


def lay_out(root: Path, wal: WalWriter, begin: int = START, origin: int = START) -> Path:
    """A data directory with the timeline, WAL from `begin` on, committed, and had by everybody."""
    directory = root / str(ID.tenant_id) / str(ID.timeline_id)
    directory.mkdir(parents=True)
    for segno in range(begin // WAL_SEGMENT_SIZE, LAST + 1):
        start = segno * WAL_SEGMENT_SIZE
        low, high = max(start, begin), min(start + WAL_SEGMENT_SIZE, wal.lsn)
        data = bytes(wal.data[low - wal.start_lsn : high - wal.start_lsn])
        data = bytes(low - start) + data + bytes(start + WAL_SEGMENT_SIZE - high)
        segment_path(directory, segno, partial=segno == LAST).write_bytes(data)
    state = ControlState(
        *ID,
        term=1,
        term_history=(TermLsn(1, origin),),
        server=ServerInfo(150000, 1, WAL_SEGMENT_SIZE),
        commit_lsn=wal.lsn,
        peer_horizon_lsn=wal.lsn,
    )
    control_file.store(directory, state, sync=False)
    delivery.store(directory, Delivery(PAGESERVER, wal.lsn), sync=False)
    return directory


def load(directory: Path, helper: ThreadPoolExecutor, remote: RemoteWal | None = None) -> Timeline:
    root = directory.parent.parent
    return Timeline(
        ID,
        directory,
        SafekeeperMetrics(),
        registry=TimelineRegistry(root, [ID], sync=False),
        instance=bytes(INSTANCE_SIZE),
        sync=False,
        helper=helper,
        remote=remote,
    )


def numbers(directory: Path) -> list[int]:
    return [segno for segno, _ in list_segments(directory)]


def read(timeline: Timeline, begin: int, end: int) -> bytes:
    reader = timeline.open_reader(begin)
    data = b""
    try:
        while begin + len(data) < end:
            data += reader.read(begin + len(data), end - begin - len(data))
    finally:
        reader.close()
    return data


def offload(timeline: Timeline) -> WalOffload:
    assert timeline.kept.remote is not None
    return WalOffload(timeline.kept.remote, lambda: [timeline], interval=0.01)


# ---- what may go

LSN = st.integers(0, 12 * WAL_SEGMENT_SIZE)


@given(
    LSN, LSN, LSN, st.none() | LSN, st.none() | LSN, LSN,
    st.integers(0, 5), st.integers(1, 8), st.integers(0, 2),
)  # fmt: skip
def test_nobody_misses_what_goes(
    commit: int,
    horizon: int,
    pageserver: int,
    offloaded: int | None,
    reader: int | None,
    keep_size: int,
    first: int,
    count: int,
    partials: int,
) -> None:
    needs = WalNeeds(commit, horizon, pageserver, offloaded, reader, keep_size)
    segments = [(first + i, i >= count - partials) for i in range(count)]
    below, holder = removable_below(needs)
    removable = removable_segments(segments, below)
    assert removable == [segno for segno, _ in segments[: len(removable)]]
    for end in ((segno + 1) * WAL_SEGMENT_SIZE for segno in removable):
        assert end <= min(commit, horizon, pageserver)
        assert end <= commit - keep_size
        assert offloaded is None or end <= offloaded
        assert reader is None or end <= reader
    assert len(removable) < count
    assert all(not partial for segno, partial in segments if segno in removable)
    # And what nobody needs does go, or somebody who keeps it is named.
    left = segments[len(removable) :]
    if len(left) > 1 and not left[0][1]:
        limits = {
            wal_removal.HOLDER_COMMIT: commit,
            wal_removal.HOLDER_SAFEKEEPERS: horizon,
            wal_removal.HOLDER_PAGESERVER: pageserver,
            wal_removal.HOLDER_OFFLOAD: offloaded,
            wal_removal.HOLDER_READER: reader,
            wal_removal.HOLDER_KEEP_SIZE: max(commit - keep_size, 0),
        }
        limit = limits[holder]
        assert limit is not None
        assert limit < (left[0][0] + 1) * WAL_SEGMENT_SIZE


def test_sizes() -> None:
    assert [parse_size(t) for t in ("0", "16MB", "1 GiB", "3k")] == [0, 16 << 20, 1 << 30, 3072]
    for text in ("", "MB", "1.5GB", "-1", "1 X"):
        with pytest.raises(SizeError, match=r"expected e\.g\."):
            parse_size(text)
    assert [format_size(n) for n in (700, 16 << 20, 3 << 29)] == ["700 B", "16 MiB", "1.5 GiB"]


# ---- a timeline's directory


def test_timeline_keeps_what_is_needed(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    """The pageserver, a reader, and the size that is kept; each alone keeps WAL."""
    directory = lay_out(tmp_path / "sk", wal)
    timeline = load(directory, helper)
    timelines = Timelines(tmp_path / "sk", SafekeeperMetrics(), sync=False)
    retention = WalRetention(timelines, RetentionSettings(keep_size=0))
    all_segments = list(range(FIRST, LAST + 1))

    second = (FIRST + 1) * WAL_SEGMENT_SIZE
    timeline.delivered(PAGESERVER, second - 1)
    assert retention.work_on(timeline) == 0
    assert timeline.kept.holder == "pageserver"
    # It is known after a restart, too, that the pageserver lost what it had.
    assert load(directory, helper).wal_needs(
        remote_consistent=False, keep_size=0
    ).pageserver_lsn == (second - 1)
    timeline.deliver_to("another one")
    assert retention.work_on(timeline) == 0
    timeline.deliver_to(PAGESERVER)
    timeline.delivered(PAGESERVER, wal.lsn)

    reader = timeline.open_reader(START)
    assert retention.work_on(timeline) == 0
    assert timeline.kept.holder == "reader"
    assert numbers(directory) == all_segments
    reader.read(second + 100, 10)
    assert retention.work_on(timeline) == 1
    reader.close()

    off = WalRetention(timelines, RetentionSettings(WalRemoval.OFF, keep_size=0))
    remote = WalRetention(timelines, RetentionSettings(WalRemoval.REMOTE_CONSISTENT, keep_size=0))
    much = WalRetention(timelines, RetentionSettings(keep_size=10 * WAL_SEGMENT_SIZE))
    assert off.work_on(timeline) == remote.work_on(timeline) == much.work_on(timeline) == 0
    timeline.delivered(PAGESERVER, wal.lsn, second + WAL_SEGMENT_SIZE)
    assert remote.work_on(timeline) == 1
    assert retention.work_on(timeline) == 1
    assert numbers(directory) == [LAST]
    assert retention.work_on(timeline) == 0
    assert load(directory, helper).flush_lsn == wal.lsn
    assert timeline.oldest_lsn() == LAST * WAL_SEGMENT_SIZE
    with pytest.raises(WalMissingError, match="has already been removed from this safekeeper"):
        read(timeline, START, wal.lsn)


def test_crash_between_removals(
    tmp_path: Path,
    wal: WalWriter,
    helper: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A removal is durable before the next one begins, so what is left never has a hole."""
    directory = lay_out(tmp_path, wal)
    events: list[str] = []
    unlink = Path.unlink

    def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
        events.append("unlink")
        unlink(path, missing_ok)

    def recorded_sync(path: Path) -> None:
        events.append("sync")
        assert missing_segment(list_segments(path)) is None
        timeline = load(path, helper)
        assert timeline.flush_lsn == wal.lsn
        first = max(timeline.oldest_lsn(), START)
        assert first // WAL_SEGMENT_SIZE == numbers(path)[0]
        assert read(timeline, first, wal.lsn) == wal.data[first - START :]

    monkeypatch.setattr(Path, "unlink", recorded_unlink)
    monkeypatch.setattr(wal_removal, "fsync_dir", recorded_sync)
    remove_segments(directory, [FIRST, FIRST + 1, FIRST + 2], sync=True)
    assert events == ["unlink", "sync"] * 3
    assert numbers(directory) == [LAST]


def test_timelines_at_rest_are_looked_at_once(tmp_path: Path, wal: WalWriter) -> None:
    directory = lay_out(tmp_path, wal)
    timelines = Timelines(tmp_path, SafekeeperMetrics(), sync=False)
    retention = WalRetention(timelines, RetentionSettings(keep_size=0))
    retention.work()
    assert numbers(directory)[0] == FIRST
    retention.load_forgotten()
    retention.work()
    assert numbers(directory) == [LAST]
    families = {f.name: f.samples[0][1] for f in retention_metrics(timelines, None)}
    assert families["safekeeper_wal_segments"] == 1
    assert families["safekeeper_oldest_lsn"] == LAST * WAL_SEGMENT_SIZE


# ---- offload


def test_stored_then_removed_then_read_back(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, storage: Path
) -> None:
    remote = RemoteWal.open(storage.as_uri())
    directory = lay_out(tmp_path / "sk", wal)
    timeline = load(directory, helper, remote)
    timelines = Timelines(tmp_path / "sk", SafekeeperMetrics(), sync=False)
    retention = WalRetention(timelines, RetentionSettings(keep_size=0))
    assert retention.work_on(timeline) == 0
    assert timeline.kept.holder == "offload"
    work = offload(timeline)
    assert not work.work()
    assert work.stored_bytes == 3 * WAL_SEGMENT_SIZE
    assert timeline.acceptor.state.s3_wal_lsn == LAST * WAL_SEGMENT_SIZE
    assert load(directory, helper).acceptor.state.s3_wal_lsn == LAST * WAL_SEGMENT_SIZE
    assert retention.work_on(timeline) == 3
    assert numbers(directory) == [LAST]
    assert read(timeline, START, wal.lsn) == wal.data
    assert not list(directory.glob("fetch-*"))

    # Another safekeeper finds it stored; one that was started anew looks again.
    other = load(lay_out(tmp_path / "other", wal), helper, remote)
    again = offload(other)
    again.work()
    assert again.stored_bytes == 0
    assert other.kept.offload_lsn == LAST * WAL_SEGMENT_SIZE


def test_interrupted_and_emptied_storage_is_filled_again(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, storage: Path
) -> None:
    remote = RemoteWal.open(storage.as_uri())
    directory = lay_out(tmp_path / "sk", wal)
    objects = storage / str(ID.tenant_id) / str(ID.timeline_id)
    objects.mkdir(parents=True)
    # What an upload leaves that was cut off.
    (objects / segment_path(directory, FIRST, partial=False).name).write_bytes(b"half")
    offload(load(directory, helper, remote)).work()
    assert len(list(objects.iterdir())) == 6
    (objects / segment_path(directory, FIRST + 1, partial=False).name).unlink()
    timeline = load(directory, helper, remote)
    assert timeline.acceptor.state.s3_wal_lsn == LAST * WAL_SEGMENT_SIZE
    work = offload(timeline)
    work.work()
    assert work.stored_bytes == WAL_SEGMENT_SIZE


def test_storage_away(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, storage: Path
) -> None:
    remote = RemoteWal.open(storage.as_uri())
    timeline = load(lay_out(tmp_path / "sk", wal), helper, remote)
    storage.rename(tmp_path / "away")
    work = offload(timeline)
    assert not work.work()
    assert (work.failures, timeline.kept.offload_lsn) == (1, 0)
    (tmp_path / "away").rename(storage)
    offload(timeline).work()
    remove_segments(timeline.directory, [FIRST], sync=False)
    storage.rename(tmp_path / "away")
    with pytest.raises(RemoteWalError, match="cannot read"):
        read(timeline, START, wal.lsn)
    later = (FIRST + 1) * WAL_SEGMENT_SIZE
    assert read(timeline, later, wal.lsn) == wal.data[later - START :]


def test_damage_here_is_never_stored(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, storage: Path
) -> None:
    remote = RemoteWal.open(storage.as_uri())
    directory = lay_out(tmp_path / "sk", wal)
    path = segment_path(directory, FIRST + 1, partial=False)
    data = bytearray(path.read_bytes())
    data[1_000_000] ^= 1
    path.write_bytes(data)
    timeline = load(directory, helper, remote)
    offload(timeline).work()
    assert timeline.kept.offload_lsn == (FIRST + 1) * WAL_SEGMENT_SIZE
    with pytest.raises(WalStorageError, match=f"damaged WAL in {path}"):
        store_segment(remote, timeline, FIRST + 1, wal.lsn)
    assert remote.checksum(ID, FIRST + 1) is None
    # Stored by a safekeeper whose copy is whole, it is not replaced either.
    offload(load(lay_out(tmp_path / "other", wal), helper, remote)).work()
    with pytest.raises(RemoteWalDamagedError, match="one of them is damaged"):
        store_segment(remote, timeline, FIRST + 1, wal.lsn)


def test_damage_of_a_record_across_segments_is_found(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    directory = lay_out(tmp_path, wal)
    timeline = load(directory, helper)
    boundary = (FIRST + 2) * WAL_SEGMENT_SIZE
    for segno in range(FIRST, LAST):
        check_records(timeline, segno, wal.lsn)
    assert boundary not in map(normalize_lsn, wal.ends)
    path = segment_path(directory, FIRST + 2, partial=False)
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # the first byte that continues a record of the segment before
    path.write_bytes(data)
    with pytest.raises(WalStorageError, match="damaged WAL"):
        check_records(timeline, FIRST + 1, wal.lsn)


@pytest.mark.parametrize("what", ["object", "checksum", "short"])
def test_damaged_object_is_not_served(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, storage: Path, what: str
) -> None:
    remote = RemoteWal.open(storage.as_uri())
    timeline = load(lay_out(tmp_path / "sk", wal), helper, remote)
    offload(timeline).work()
    remove_segments(timeline.directory, [FIRST], sync=False)
    path = storage / remote.key(ID, FIRST)
    data = bytearray(path.read_bytes())
    if what == "object":
        data[5_000_000] ^= 1
        path.write_bytes(data)
    elif what == "short":
        path.write_bytes(data[:-1])
    else:
        Path(f"{path}{CHECKSUM_SUFFIX}").write_bytes(b"nonsense")
    with pytest.raises(RemoteWalDamagedError):
        read(timeline, START, wal.lsn)


def test_safekeeper_that_joined_inside_a_segment(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, storage: Path
) -> None:
    """What it lacks of its first segment is neither stored nor served as zeros."""
    remote = RemoteWal.open(storage.as_uri())
    joined = next(end for end in wal.ends if end > START + WAL_SEGMENT_SIZE // 2)
    directory = lay_out(tmp_path / "joined", wal, joined)
    with pytest.raises(WalMissingError, match="WAL begins at"):
        read(load(directory, helper), START, wal.lsn)
    timeline = load(directory, helper, remote)
    assert normalize_lsn(timeline.oldest_lsn()) == normalize_lsn(joined)
    offload(timeline).work()
    assert timeline.kept.offload_lsn == 0
    assert not list(storage.rglob("*.crc32c"))
    offload(load(lay_out(tmp_path / "whole", wal), helper, remote)).work()
    work = offload(timeline)
    work.work()
    assert timeline.kept.offload_lsn == LAST * WAL_SEGMENT_SIZE
    assert work.stored_bytes == 0
    assert read(timeline, START, wal.lsn) == wal.data
    assert read(timeline, joined, wal.lsn) == wal.data[joined - START :]


def test_hole_is_damage(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor, storage: Path
) -> None:
    directory = lay_out(tmp_path / "sk", wal)
    timelines = Timelines(tmp_path / "sk", SafekeeperMetrics(), sync=False)
    timeline = load(directory, helper, RemoteWal.open(storage.as_uri()))
    segment_path(directory, FIRST + 1, partial=False).unlink()
    # The record that continues in the missing one cannot be checked.
    offload(timeline).work()
    assert timeline.kept.offload_lsn == 0
    assert timeline.failure is not None
    assert not list(storage.rglob("0*"))
    # What is left is of no use before a leader has said how it goes on: nothing of it is removed.
    timeline = load(directory, helper, RemoteWal.open(storage.as_uri()))
    assert timeline.acceptor.state.recovering
    before = numbers(directory)
    timeline.kept.offload_lsn = wal.lsn
    offload(timeline).work()
    assert WalRetention(timelines, RetentionSettings(keep_size=0)).work_on(timeline) == 0
    assert numbers(directory) == before
    assert not list(storage.rglob("0*"))


def test_removal_is_no_damage_to_who_checks(
    tmp_path: Path, wal: WalWriter, helper: ThreadPoolExecutor
) -> None:
    """A record's first part is in a segment that goes while the next one is checked."""
    directory = lay_out(tmp_path / "sk", wal)
    timeline = load(directory, helper)
    seen = timeline.commit_lsn
    segment_path(directory, FIRST, partial=False).unlink()
    timeline.check_all_wal()
    assert timeline.failure is None
    assert not timeline.acceptor.state.recovering
    again = load(directory, helper)
    again.check_all_wal()
    assert again.failure is None
    assert again.commit_lsn == seen
    assert not again.acceptor.state.recovering


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("/tmp", "expected a URL"),
        ("ftp://host/x", "expected a URL"),
        ("file:///does/not/exist", "no directory /does/not/exist"),
        ("s3://", "cannot keep WAL in s3://"),
    ],
)
def test_bad_places(url: str, complaint: str) -> None:
    with pytest.raises(RemoteWalUrlError, match=complaint):
        RemoteWal.open(url)


def test_ttl_needs_credentials() -> None:
    with pytest.raises(RemoteWalUrlError, match="S3_REGION is not set"):
        RemoteWal.open_for_ttl({})


# ---- S3


class S3Handler(http.server.BaseHTTPRequestHandler):
    """As much of S3's protocol as single objects need; path-style, signatures are not checked."""

    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        """Store an object."""
        assert "AWS4-HMAC-SHA256 Credential=user/" in self.headers["Authorization"]
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_GET(self) -> None:
        """Send an object."""
        data = self.objects.get(self.path)
        self._answer(404 if data is None else 200, data or b"")

    def do_HEAD(self) -> None:
        """Tell about an object."""
        self.do_GET()

    def _answer(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 05 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
        del format, args


@pytest.fixture
def s3() -> Iterator[tuple[str, dict[str, bytes]]]:
    """URL of an S3 server, and its objects by path."""
    objects: dict[str, bytes] = {}
    handler = type("Handler", (S3Handler,), {"objects": objects})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", objects
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("by_ttl", [False, True])
def test_s3(
    tmp_path: Path,
    wal: WalWriter,
    helper: ThreadPoolExecutor,
    s3: tuple[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    by_ttl: bool,
) -> None:
    url, objects = s3
    names = ("S3_REGION", "S3_ENDPOINT", "S3_ACCESSKEY", "S3_SECRET")
    if by_ttl:
        values = ("eu-1", url, "user", "secret")
        remote = RemoteWal.open_for_ttl(dict(zip(names, values, strict=True)))
        root = "/zenith-testbucket/walarchive"
    else:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "user"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_ENDPOINT", url),
            ("AWS_REGION", "eu-1"),
        ):
            monkeypatch.setenv(name, value)
        remote = RemoteWal.open("s3://bucket/some/prefix")
        root = "/bucket/some/prefix"
    timeline = load(lay_out(tmp_path, wal), helper, remote)
    offload(timeline).work()
    directory = f"{root}/{ID.tenant_id}/{ID.timeline_id}"
    expected = [segment_path(Path(directory), n, partial=False) for n in range(FIRST, LAST)]
    assert sorted(objects) == sorted([*map(str, expected), *(f"{p}.crc32c" for p in expected)])
    remove_segments(timeline.directory, range(FIRST, LAST), sync=False)
    assert read(timeline, START, wal.lsn) == wal.data
