"""A stock server starts, without recovery, at any LSN where a record can start."""

import re
from collections.abc import Callable, Iterator

import pytest
from batch_unit.ffi_support import Server, decode, execute, make_server
from batch_unit.workspace import temporary_workspace

from postgres_ffi.startup_wal import (
    StartupWal,
    build_startup_wal,
    shutdown_checkpoint,
    startup_control_file,
)
from postgres_ffi.wal_decoder import WalDecoder
from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, normalize_lsn, page_header_size, segment_start
from zenith_utils.lsn import Lsn
from zenith_utils.os_user import give

PAGE = 8192
GB_4 = 1 << 32

# from a segment boundary above all WAL of the cluster to the position to start at
PLACEMENTS: dict[str, Callable[[int], int]] = {
    "middle of a page": lambda segment: segment + 5 * PAGE + 1000,
    "first byte of a page": lambda segment: segment + 5 * PAGE,
    "first byte of a segment": lambda segment: segment,
    "8 bytes left on the page": lambda segment: segment + 6 * PAGE - 8,
    "112 bytes left on the page": lambda segment: segment + 6 * PAGE - 112,
    "exactly the record left on the page": lambda segment: segment + 6 * PAGE - 120,
    "8 bytes left in the segment": lambda segment: segment + WAL_SEGMENT_SIZE - 8,
    "104 bytes left before 4 GB": lambda segment: segment - segment % GB_4 + GB_4 - 104,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with temporary_workspace() as workspace:
        server = make_server(workspace / "data")
        with server.running():
            execute(server, "begin", "create table p (i int)", "prepare transaction 'kept'")
        yield server


@pytest.mark.parametrize("place", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_server_starts_at_an_lsn_without_recovery(
    server: Server, place: Callable[[int], int]
) -> None:
    prev_lsn = server.control().checkpoint_lsn
    lsn = normalize_lsn(place(segment_start(prev_lsn) + 2 * WAL_SEGMENT_SIZE))
    for segment in (server.datadir / "pg_wal").glob("0*"):
        segment.unlink()
    log = server.datadir / "server.log"
    log.unlink()
    wal = place_startup_wal(server, lsn, prev_lsn)
    assert_readable(server, wal, prev_lsn)
    give(server.datadir, recursive=True)
    with server.running():
        rows = execute(
            server,
            "drop table if exists after",
            "create table after (i int)",
            "insert into after select generate_series(1, 1000)",
            "select count(*), pg_is_in_recovery() from after",
        )
        assert rows == [(1000, False)]
        assert execute(server, "select gid from pg_prepared_xacts") == [("kept",)]
    assert not re.search("redo starts|not properly shut down", log.read_text())
    assert_chain_continues(server, wal)


def place_startup_wal(server: Server, lsn: int, prev_lsn: int) -> StartupWal:
    control = server.control()
    checkpoint = shutdown_checkpoint(control.checkpoint, lsn, full_page_writes=False)
    wal = build_startup_wal(
        checkpoint,
        prev_lsn=prev_lsn,
        version=control.version,
        system_identifier=control.system_identifier,
    )
    for segment in wal.segments:
        path = server.datadir / "pg_wal" / wal.file_name(segment)
        with path.open("wb") as file:
            file.truncate(WAL_SEGMENT_SIZE)
            for offset, data in wal.segment_extents(segment):
                file.seek(offset)
                file.write(data)
        assert path.read_bytes() == wal.segment_image(segment)
    (server.datadir / "global/pg_control").write_bytes(
        startup_control_file(control, checkpoint).file_bytes()
    )
    return wal


def assert_readable(server: Server, wal: StartupWal, prev_lsn: int) -> None:
    """pg_waldump finds the record from the segment's first byte, and so does the decoder."""
    (line,) = server.run(
        "pg_waldump",
        *("-p", server.datadir / "pg_wal", "-s", Lsn(wal.segments[0]), "-e", Lsn(wal.end_lsn)),
    ).splitlines()
    assert f"lsn: {wal.lsn >> 32:X}/{wal.lsn & 0xFFFFFFFF:08X}" in line
    assert f"prev {prev_lsn >> 32:X}/{prev_lsn & 0xFFFFFFFF:08X}" in line
    assert f"CHECKPOINT_SHUTDOWN redo {Lsn(wal.lsn)}" in line
    decoder = WalDecoder(wal.segments[0], join_mid_record=True)
    for segment in wal.segments:
        decoder.feed(wal.segment_image(segment))
    record = decoder.next_record()
    assert record is not None and record.raw == wal.record
    assert (record.start_lsn, record.end_lsn) == (wal.lsn, wal.end_lsn)


def assert_chain_continues(server: Server, wal: StartupWal) -> None:
    """The WAL the server wrote is one chain from the synthesized record to its shutdown."""
    control = server.control()
    content = b""
    segment = wal.segments[0]
    while (path := server.datadir / "pg_wal" / wal.file_name(segment)).exists():
        content += path.read_bytes()
        segment += WAL_SEGMENT_SIZE
    # a stream at a page boundary begins with the page's header
    page = wal.lsn - wal.lsn % PAGE
    start = page if wal.lsn == page + page_header_size(page) else wal.lsn
    records = decode(
        WalDecoder(start, system_identifier=control.system_identifier),
        content[start - wal.segments[0] :],
        1 << 20,
    )
    assert records[0].start_lsn == wal.lsn
    assert records[1].start_lsn == normalize_lsn(wal.end_lsn)
    assert records[-1].start_lsn == control.checkpoint_lsn
    assert records[-1].main_data == control.checkpoint_bytes
