"""WAL for a safekeeper that is behind: out of the compute's pg_wal, or from another safekeeper.

Nothing is kept in memory for it, however far behind it is.
"""

from __future__ import annotations

import os
import queue
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, wal_file_name
from zenith_utils.lsn import lsn_text
from zenith_utils.pq_client import PqError, connect

RECOVERY_APPLICATION: Final = "wal_proposer_recovery"

_XLOG_DATA = struct.Struct(">cQQq")
_QUEUED_CHUNKS: Final = 8
_TIMEOUT: Final = 10.0


class PgWalReader:
    """Reads WAL that Postgres has written from its segment files."""

    def __init__(self, pgdata: Path) -> None:
        self._directory = pgdata / "pg_wal"
        self._segno = -1
        self._fd = -1

    def read(self, lsn: int, size: int) -> bytes | None:
        """`size` bytes at `lsn`, fewer at a segment's end; None if Postgres removed them."""
        segno, offset = divmod(lsn, WAL_SEGMENT_SIZE)
        path = self._directory / wal_file_name(1, segno)
        if segno != self._segno:
            self.close()
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            self._segno = segno
        data = os.pread(self._fd, min(size, WAL_SEGMENT_SIZE - offset), offset)
        # Postgres recycles a segment by renaming it before it is overwritten: if the name still
        # leads to this file now, the bytes just read were the right ones.
        try:
            current = path.stat().st_ino == os.fstat(self._fd).st_ino
        except FileNotFoundError:
            current = False
        if current and data:
            return data
        self.close()
        return None

    def close(self) -> None:
        """Close the open segment."""
        if self._fd >= 0:
            os.close(self._fd)
        self._segno = self._fd = -1


class RecoveryReader:
    """Streams WAL from a safekeeper of our term, in a thread of its own, ahead of its use."""

    def __init__(
        self,
        address: tuple[str, int],
        options: str,
        lsn: int,
        end_lsn: int,
        wake: Callable[[], None],
    ) -> None:
        """Read [lsn, end_lsn). `options` are the start-up options, `wake` is called per chunk."""
        self.lsn = lsn
        """Position of the next chunk to be taken."""
        self.error: str | None = None
        self._address = address
        self._options = options
        self._end_lsn = end_lsn
        self._wake = wake
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_QUEUED_CHUNKS)
        self._finished = False
        self._cancelled = threading.Event()
        threading.Thread(target=self._run, name="recovery", daemon=True).start()

    @property
    def finished(self) -> bool:
        """Whether there will be no more chunks; `error` says why if the end was not reached."""
        return self._finished

    def take(self) -> bytes | None:
        """The next chunk, at `lsn`; None if there is none now."""
        try:
            chunk = self._chunks.get_nowait()
        except queue.Empty:
            return None
        if chunk is None:
            self._finished = True
            return None
        self.lsn += len(chunk)
        return chunk

    def cancel(self) -> None:
        """Give up; the thread ends soon."""
        self._cancelled.set()

    def _run(self) -> None:
        try:
            self._stream()
        except (PqError, TimeoutError, OSError) as e:
            self.error = str(e)
        self._put(None)

    def _stream(self) -> None:
        host, port = self._address
        lsn = self.lsn
        with connect(
            host,
            port,
            user="walproposer",
            options=self._options,
            application_name=RECOVERY_APPLICATION,
            timeout=_TIMEOUT,
        ) as conn:
            command = f"START_REPLICATION PHYSICAL {lsn_text(lsn)}"
            conn.start_copy_both(command, timeout=_TIMEOUT)
            while lsn < self._end_lsn and not self._cancelled.is_set():
                message = conn.recv_copy_data(timeout=_TIMEOUT)
                if message is None:
                    return
                if message[0] != ord("w"):
                    continue
                start = _XLOG_DATA.unpack_from(message)[1]
                if start != lsn:
                    raise OSError(f"got WAL at {lsn_text(start)}, expected {lsn_text(lsn)}")
                chunk = bytes(message[_XLOG_DATA.size :][: self._end_lsn - lsn])
                lsn += len(chunk)
                self._put(chunk)

    def _put(self, chunk: bytes | None) -> None:
        while not self._cancelled.is_set():
            try:
                self._chunks.put(chunk, timeout=0.5)
            except queue.Full:
                continue
            self._wake()
            return
