"""Which WAL nobody needs any more, and its removal from a timeline's directory.

WAL below an LSN may go when nobody can ask for it again:

- the other safekeepers: they have it. The peer horizon says so. A safekeeper that is down keeps
  the horizon where it is; one that joins empty starts at the horizon;
- the pageserver: it has made it durable, and says how far. A branch needs no WAL of its ancestor,
  its pageserver reads the ancestor's layers;
- this safekeeper: after a restart it looks for the end of WAL from the persisted commit LSN on;
- who streams right now, whoever that is: a hot standby may be behind the pageserver;
- the offload: WAL that is to be stored elsewhere must be there first.

Only what is durable counts: the positions of the control file as it is on disk. Segments go one
after the other, the oldest first, each removal durable before the next. So after a crash at any
moment the oldest segment there is says what was removed, and a hole is damage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from postgres_ffi.wal_format import WAL_BLCKSZ, WAL_SEGMENT_SIZE
from safekeeper.wal_files import SegmentReader, list_segments, segment_path
from zenith_utils.durable import fsync_dir

HOLDER_COMMIT: Final = "commit"
HOLDER_KEEP_SIZE: Final = "keep_size"
HOLDER_OFFLOAD: Final = "offload"
HOLDER_PAGESERVER: Final = "pageserver"
HOLDER_READER: Final = "reader"
HOLDER_SAFEKEEPERS: Final = "safekeepers"


@dataclass(frozen=True, slots=True)
class WalNeeds:
    """How far WAL of a timeline is wherever it may be needed; all LSNs, `keep_size` in bytes.

    commit_lsn, peer_horizon_lsn: persisted; pageserver_lsn: 0 while it is not known;
    offload_lsn: None without an offload; reader_lsn: of the reader that is furthest behind, None
    without readers; keep_size: what is kept anyway.
    """

    commit_lsn: int
    peer_horizon_lsn: int
    pageserver_lsn: int
    offload_lsn: int | None = None
    reader_lsn: int | None = None
    keep_size: int = 0


def removable_below(needs: WalNeeds) -> tuple[int, str]:
    """The LSN below which nobody needs WAL, and who needs what is there (a ``HOLDER_``)."""
    limits = [
        (needs.peer_horizon_lsn, HOLDER_SAFEKEEPERS),
        (needs.pageserver_lsn, HOLDER_PAGESERVER),
        (needs.commit_lsn, HOLDER_COMMIT),
        (max(needs.commit_lsn - needs.keep_size, 0), HOLDER_KEEP_SIZE),
    ]
    if needs.offload_lsn is not None:
        limits.append((needs.offload_lsn, HOLDER_OFFLOAD))
    if needs.reader_lsn is not None:
        limits.append((needs.reader_lsn, HOLDER_READER))
    # Of several at the same place the first one is named: what an operator can do something about.
    return min(limits, key=lambda limit: limit[0])


def removable_segments(segments: Sequence[tuple[int, bool]], below: int) -> list[int]:
    """Numbers of the segments that end at or below an LSN, ascending.

    `segments` are all there are, as of list_segments(). The last one stays in any case, and so
    does everything from the first partial one on.
    """
    removable = []
    for (segno, partial), _following in pairwise(segments):
        if partial or (segno + 1) * WAL_SEGMENT_SIZE > below:
            break
        removable.append(segno)
    return removable


def remove_segments(directory: Path, segnos: Iterable[int], *, sync: bool) -> None:
    """Remove complete segments, in the order given (ascending), each durably before the next.

    One that is gone already is no error. Raises OSError.
    """
    for segno in segnos:
        segment_path(directory, segno, partial=False).unlink(missing_ok=True)
        if sync:
            fsync_dir(directory)


def first_wal_lsn(directory: Path) -> int:
    """Where local WAL begins, 8-aligned; 0 if there is none. Raises WalStorageError, OSError.

    That is the start of the oldest segment, unless WAL began to be written inside it: what is
    before it are zeros then. Written WAL has a page header at the start of a segment.
    """
    segments = list_segments(directory)
    if not segments:
        return 0
    start = segments[0][0] * WAL_SEGMENT_SIZE
    reader = SegmentReader(directory)
    try:
        for lsn in range(start, start + WAL_SEGMENT_SIZE, WAL_BLCKSZ):
            page = reader.read(lsn, WAL_BLCKSZ)
            zeros = len(page) - len(page.lstrip(b"\0"))
            if zeros < len(page):
                return lsn + zeros // 8 * 8
    finally:
        reader.close()
    return 0


def missing_segment(segments: Sequence[tuple[int, bool]]) -> int | None:
    """Number of the first segment that is missing between others: damage; None if none is."""
    for (segno, _), (following, _) in pairwise(segments):
        if following != segno + 1:
            return segno + 1
    return None
