"""Compare every relation page of a stopped compute with what the pageserver serves.

`python -m pageserver.page_verifier` walks a data directory, asks the page service for each block
that the compute holds, and compares: exactly, or after Postgres' own rm_mask of the relation's
access method, or up to one of the few differences that are right (DIFFERENCES). It prints one
JSON report by access method; its exit status is 1 when a page remains unexplained.

Blocks that the compute never fetched are holes of its sparse files and are only counted.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pageserver.walredo import WalRedoError, WalRedoPool
from pgxn.build import build_modules
from postgres_ffi.control_file import parse_control_file
from postgres_ffi.distrib import find_distrib
from postgres_ffi.relfile import (
    FSM_FORKNUM,
    INIT_FORKNUM,
    RELSEG_SIZE,
    VISIBILITYMAP_FORKNUM,
    RelTag,
    parse_relpath,
)
from postgres_ffi.versions import PgVersion, Rmgr
from zenith_utils.lsn import Lsn
from zenith_utils.pq_client import PqConnection, connect

BLCKSZ = 8192
BATCH = 64

DIFFERENCES = {
    "sequence": "WAL logs sequence values ahead: last_value and log_cnt of the tuple differ",
    "spgist-meta": "the cache of last used pages in an SP-GiST metapage is not WAL-logged",
    "vm-lsn": "setting a bit of the visibility map may leave the map page's LSN behind",
    "vm-copied": "CREATE DATABASE logs a copied visibility map as if it were a standard page, so "
    "that its bits are in the hole of the image (RelationCopyStorageUsingBuffer, bufmgr.c)",
}

# Access method (pg_am.amname, or what pg_class says without one) -> resource manager of its pages.
MASKS = {
    "heap": Rmgr.HEAP,
    "btree": Rmgr.BTREE,
    "hash": Rmgr.HASH,
    "gin": Rmgr.GIN,
    "gist": Rmgr.GIST,
    "sequence": Rmgr.SEQ,
    "spgist": Rmgr.SPGIST,
    "brin": Rmgr.BRIN,
}

# A sequence's one tuple ends the page: FormData_pg_sequence_data (commands/sequence.h) holds
# last_value int8 and log_cnt int8, then is_called, in the last 24 bytes before the special space.
_SEQUENCE_VALUES = slice(8160, 8176)
# SpGistMetaPageData.lastUsedPages (access/spgist_private.h): 8 entries of 8 bytes after magic.
_SPGIST_CACHE = slice(28, 28 + 64)
_CHECKSUM = slice(8, 10)

_REQUEST = struct.Struct(">BBQIIIBII")
_NBLOCKS = struct.Struct(">BBQIIIB")


class VerifyError(Exception):
    """The comparison itself cannot be made."""


@dataclass(slots=True)
class Report:
    """Counts by access method and outcome, and the first unexplained pages of each."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    mismatches: list[str] = field(default_factory=list)

    def mismatch(self, kind: str, text: str) -> None:
        """Note something that nothing explains."""
        self.counts[kind]["MISMATCH"] += 1
        if len(self.mismatches) < 100:
            self.mismatches.append(text)

    def to_json(self) -> str:
        """The report as a JSON object."""
        counts = {kind: dict(counter) for kind, counter in sorted(self.counts.items())}
        return json.dumps({"pages": counts, "mismatches": self.mismatches}, indent=2)


class PageClient:
    """Pages and sizes of one timeline at one LSN, over `pagestream`."""

    def __init__(self, connection: PqConnection, tenant: str, timeline: str, lsn: Lsn) -> None:
        self._connection = connection
        self._lsn = lsn
        connection.start_copy_both(f"pagestream {tenant} {timeline}")

    def size(self, rel: RelTag) -> int:
        """Blocks of a relation fork."""
        reply = self._ask(_NBLOCKS.pack(1, 0, self._lsn, *rel))
        return int.from_bytes(reply[1:5], "big")

    def exists(self, rel: RelTag) -> bool:
        """Whether the relation fork is known."""
        return self._ask(_NBLOCKS.pack(0, 0, self._lsn, *rel))[1] == 1

    def pages(self, rel: RelTag, blkno: int, count: int) -> list[bytes]:
        """`count` pages from block `blkno` on."""
        reply = self._ask(_REQUEST.pack(10, 0, self._lsn, *rel, blkno, count))
        return [reply[5 + i * BLCKSZ : 5 + (i + 1) * BLCKSZ] for i in range(count)]

    def _ask(self, request: bytes) -> bytes:
        self._connection.send_copy_data(request)
        reply = self._connection.recv_copy_data()
        if reply is None:
            raise VerifyError("the pageserver ended the stream")
        if reply[0] == 103:
            raise VerifyError(f"the pageserver says: {bytes(reply[1:-1]).decode()}")
        return bytes(reply)


class Verifier:
    """One comparison of a data directory."""

    def __init__(
        self,
        pgdata: Path,
        version: PgVersion,
        client: PageClient,
        redo: WalRedoPool,
        access_methods: Mapping[tuple[int, int, int], str],
    ) -> None:
        self._pgdata = pgdata
        self._version = version
        self._client = client
        self._redo = redo
        self._access_methods = access_methods
        self.report = Report()

    def run(self) -> Report:
        """Compare all relation forks of the directory."""
        forks = self._local_forks()
        unlogged = {rel[:3] for rel in forks if rel.forknum == INIT_FORKNUM}
        for rel, segments in sorted(forks.items()):
            if rel[:3] in unlogged and rel.forknum != INIT_FORKNUM:
                self.report.counts["unlogged"]["not compared"] += 1
                continue
            self._compare_fork(rel, segments)
        return self.report

    def _local_forks(self) -> dict[RelTag, dict[int, Path]]:
        forks: dict[RelTag, dict[int, Path]] = defaultdict(dict)
        for top in ("global", "base", "pg_tblspc"):
            for path in (self._pgdata / top).rglob("*"):
                parsed = parse_relpath(str(path.relative_to(self._pgdata)), self._version)
                if parsed is not None and path.is_file():
                    rel, segno = parsed
                    forks[rel][segno] = path
        return forks

    def _compare_fork(self, rel: RelTag, segments: Mapping[int, Path]) -> None:
        kind = self._kind(rel)
        local = sum(path.stat().st_size for path in segments.values()) // BLCKSZ
        remote = self._client.size(rel)
        if local != remote:
            if rel.forknum == FSM_FORKNUM:
                self.report.counts[kind]["size differs"] += 1
            elif local == 0 and not self._client.exists(rel):
                # A dropped relation's first file stays, empty, until the next checkpoint.
                self.report.counts[kind]["dropped"] += 1
            elif rel.forknum == VISIBILITYMAP_FORKNUM and local > remote:
                # Extended for a bit that was then not set: see the pages served as zeros below.
                self.report.counts[kind]["size differs"] += 1
            else:
                self.report.mismatch(kind, f"{kind} {rel}: {local} blocks, pageserver {remote}")
                return
        if rel.forknum == FSM_FORKNUM:
            # Not WAL-logged page by page: a hint that only has to be plausible.
            self.report.counts[kind]["not compared"] += min(local, remote)
            return
        for segno, path in sorted(segments.items()):
            for offset, pages in _present_pages(path, self.report.counts[kind]):
                first = segno * RELSEG_SIZE + offset
                served = self._client.pages(rel, first, len(pages))
                for i, (ours, theirs) in enumerate(zip(pages, served, strict=True)):
                    self._compare_page(kind, rel, first + i, ours, theirs)

    def _compare_page(
        self, kind: str, rel: RelTag, blkno: int, local: bytes, served: bytes
    ) -> None:
        local, served = _without_checksum(local), _without_checksum(served)
        if local == served:
            self.report.counts[kind]["exact"] += 1
            return
        explanation = self._explain(kind, rel, blkno, local, served)
        if explanation is not None:
            self.report.counts[kind][explanation] += 1
            return
        offsets = [i for i in range(BLCKSZ) if local[i] != served[i]]
        self.report.mismatch(
            kind,
            f"{kind} {rel} block {blkno}: {len(offsets)} bytes differ, first at {offsets[:8]}; "
            f"page LSN {_page_lsn(local)}, pageserver {_page_lsn(served)}",
        )

    def _explain(
        self, kind: str, rel: RelTag, blkno: int, local: bytes, served: bytes
    ) -> str | None:
        if rel.forknum == VISIBILITYMAP_FORKNUM:
            return _explain_vm(local, served)
        if kind == "sequence" and _blank(local, _SEQUENCE_VALUES) == _blank(
            served, _SEQUENCE_VALUES
        ):
            return "sequence"
        if (
            kind == "spgist"
            and blkno == 0
            and _blank(local, _SPGIST_CACHE) == _blank(served, _SPGIST_CACHE)
        ):
            return "spgist-meta"
        if not any(local) or not any(served):
            # rm_mask expects a page; an all-zero one has nothing to mask.
            return None
        rmgr = MASKS.get(kind)
        if rmgr is None:
            return None
        try:
            masked = [self._redo.mask(rmgr, blkno, page) for page in (local, served)]
        except WalRedoError:
            # A page that is none of this access method: it stays unexplained.
            return None
        return "equal after rm_mask" if masked[0] == masked[1] else None

    def _kind(self, rel: RelTag) -> str:
        if rel.forknum == FSM_FORKNUM:
            return "fsm"
        if rel.forknum == VISIBILITYMAP_FORKNUM:
            return "vm"
        return self._access_methods.get((rel.spcnode, rel.dbnode, rel.relnode), "heap")


def _present_pages(path: Path, counts: Counter[str]) -> Iterator[tuple[int, list[bytes]]]:
    """(first block, pages) of the blocks that a sparse file holds, BATCH at most at a time."""
    with path.open("rb") as f:
        fd, end = f.fileno(), path.stat().st_size
        position = 0
        while position < end:
            try:
                data = os.lseek(fd, position, os.SEEK_DATA)
            except OSError:
                data = end
            data -= data % BLCKSZ
            if data > position:
                counts["never fetched"] += (data - position) // BLCKSZ
                position = data
            if position >= end:
                return
            hole = os.lseek(fd, position, os.SEEK_HOLE)
            hole = min(end, hole + -hole % BLCKSZ)
            while position < hole:
                size = min(hole - position, BATCH * BLCKSZ)
                block = os.pread(fd, size, position)
                yield (
                    position // BLCKSZ,
                    [block[i : i + BLCKSZ] for i in range(0, len(block), BLCKSZ)],
                )
                position += size


def _explain_vm(local: bytes, served: bytes) -> str | None:
    """Two pages of a visibility map that differ."""
    if local[24:] == served[24:]:
        return "vm-lsn"
    missing_only = int.from_bytes(served[24:]) & ~int.from_bytes(local[24:]) == 0
    # Equal LSNs: every record that set or cleared a bit was applied on both sides.
    return "vm-copied" if missing_only and local[:8] == served[:8] else None


def _without_checksum(page: bytes) -> bytes:
    return _blank(page, _CHECKSUM)


def _blank(page: bytes, part: slice) -> bytes:
    return page[: part.start] + bytes(part.stop - part.start) + page[part.stop :]


def _page_lsn(page: bytes) -> Lsn:
    high, low = struct.unpack_from("<II", page)
    return Lsn(high << 32 | low)


def _read_access_methods(path: Path | None) -> dict[tuple[int, int, int], str]:
    """A JSON list of [spcnode, dbnode, relfilenode, access method]."""
    if path is None:
        return {}
    rows = json.loads(path.read_text())
    return {(spcnode, dbnode, relnode): name for spcnode, dbnode, relnode, name in rows}


def main(arguments: list[str] | None = None) -> int:
    """Compare one directory; returns the exit status.

    The environment variable ZENITH_AUTH_TOKEN lets it in where authentication is on.
    """
    parser = argparse.ArgumentParser(prog="page_verifier", description=__doc__)
    parser.add_argument("pgdata", type=Path, help="data directory of a stopped compute")
    parser.add_argument("--pageserver", required=True, metavar="HOST:PORT")
    parser.add_argument("--tenant", required=True)
    parser.add_argument("--timeline", required=True)
    parser.add_argument("--lsn", required=True, type=Lsn.parse)
    parser.add_argument("--pg-distrib-dir", type=Path)
    parser.add_argument("--access-methods", type=Path, help=_read_access_methods.__doc__)
    options = parser.parse_args(arguments)
    distrib = find_distrib(options.pg_distrib_dir)
    control_bytes = (options.pgdata / "global" / "pg_control").read_bytes()
    parse_control_file(control_bytes)
    host, _, port = options.pageserver.rpartition(":")
    token = os.environ.get("ZENITH_AUTH_TOKEN")
    with (
        connect(host, int(port), user="no_user", password=token) as connection,
        tempfile.TemporaryDirectory(prefix="page_verifier.") as workdir,
    ):
        # The redo processes run as another user when we are root.
        Path(workdir).chmod(0o755)
        redo = WalRedoPool(
            distrib,
            build_modules(distrib).walredo,
            Path(workdir),
            control_file=control_bytes,
            max_processes=1,
        )
        try:
            client = PageClient(connection, options.tenant, options.timeline, options.lsn)
            methods = _read_access_methods(options.access_methods)
            report = Verifier(options.pgdata, distrib.version, client, redo, methods).run()
        finally:
            redo.close()
    print(report.to_json())
    return 1 if report.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
