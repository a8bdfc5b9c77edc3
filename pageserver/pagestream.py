"""The ``pagestream`` protocol: pages and relation sizes at an LSN, over CopyBoth.

Every message is one CopyData; all integers are big-endian. Requests::

    0 exists   u8 tag, u8 latest, u64 lsn, u32 spcnode, u32 dbnode, u32 relnode, u8 forknum
    1 nblocks  the same
    2 getpage  the same, u32 blkno
    10 getpages the same, u32 blkno, u32 nblocks (1..256)

Replies, in the order of the requests, which may be pipelined::

    100 exists u8 tag, u8 0 or 1          101 nblocks u8 tag, u32 blocks
    102 page   u8 tag, 8192 bytes         110 pages   u8 tag, u32 nblocks, nblocks * 8192 bytes
    103 error  u8 tag, message, NUL

``latest`` = 0 reads at exactly ``lsn``. ``latest`` = 1 reads the newest state, for which ``lsn``
is only a lower bound (0: none).
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Sequence

from pageserver.pgdatadir_mapping import RelationNotFound
from pageserver.timelines import LsnNotReadableError, Reading, TimelineHandle
from postgres_ffi.relfile import INIT_FORKNUM, RelTag
from zenith_utils.postgres_backend import Connection, FatalQueryError

log = logging.getLogger(__name__)

TAG_EXISTS = 0
TAG_NBLOCKS = 1
TAG_GETPAGE = 2
TAG_GETPAGES = 10
TAG_ERROR = 103
MAX_BATCH = 256

_RELATION = struct.Struct(">BBQIIIB")
_PAGE = struct.Struct(">BBQIIIBI")
_PAGES = struct.Struct(">BBQIIIBII")
_EXISTS_REPLY = struct.Struct(">BB")
_NBLOCKS_REPLY = struct.Struct(">BI")
_PAGE_REPLY = b"\x66"  # 102
_PAGES_REPLY = struct.Struct(">BI")

Reply = Sequence[bytes | bytearray | memoryview]


class RequestError(Exception):
    """The request cannot be answered; the client gets the text and may go on."""


class PageStream:
    """Answers the requests of one client about one timeline."""

    def __init__(self, handle: TimelineHandle) -> None:
        self._handle = handle
        self._handlers: dict[int, tuple[struct.Struct, Callable[..., Reply]]] = {
            TAG_EXISTS: (_RELATION, self._exists),
            TAG_NBLOCKS: (_RELATION, self._nblocks),
            TAG_GETPAGE: (_PAGE, self._getpage),
            TAG_GETPAGES: (_PAGES, self._getpages),
        }
        labels = (str(handle.tenant_id), str(handle.timeline_id))
        query_time = handle.metrics.smgr_query_time
        page_time = query_time.labels("get_page_at_lsn", *labels).observe
        self._observers = {
            TAG_EXISTS: query_time.labels("get_rel_exists", *labels).observe,
            TAG_NBLOCKS: query_time.labels("get_rel_size", *labels).observe,
            TAG_GETPAGE: page_time,
            TAG_GETPAGES: page_time,
        }

    def serve(self, conn: Connection) -> None:
        """Answers requests until the client ends the stream.

        Bytes that are no request raise FatalQueryError: framing is lost, so the connection ends.
        """
        conn.send_copy_both_response()
        while True:
            if not conn.has_buffered_input():
                conn.flush()
            message = conn.recv_copy_data()
            if message is None:
                return
            conn.send_copy_data(*self.answer(message))

    def answer(self, message: memoryview) -> Reply:
        """The parts of the reply to one request."""
        tag = message[0] if message else -1
        layout_handler = self._handlers.get(tag)
        if layout_handler is None:
            raise FatalQueryError(f"unknown smgr message tag: {tag}")
        layout, handler = layout_handler
        if len(message) != layout.size:
            raise FatalQueryError(
                f"smgr message with tag {tag} has {len(message)} bytes instead of {layout.size}"
            )
        fields = layout.unpack(message)
        started = time.perf_counter()
        try:
            reply = handler(*fields[1:])
        except (RequestError, LsnNotReadableError, RelationNotFound) as error:
            return _error(str(error))
        except Exception as error:
            log.exception("%s: request with tag %d failed", self._handle, tag)
            return _error(str(error) or type(error).__name__)
        self._observers[tag](time.perf_counter() - started)
        return reply

    def _exists(self, latest: int, lsn: int, spc: int, db: int, rel: int, fork: int) -> Reply:
        tag = _fork(spc, db, rel, fork)
        with self._reading(latest, lsn) as at:
            return (_EXISTS_REPLY.pack(100, self._handle.datadir.rel_exists(tag, at)),)

    def _nblocks(self, latest: int, lsn: int, spc: int, db: int, rel: int, fork: int) -> Reply:
        tag = _fork(spc, db, rel, fork)
        with self._reading(latest, lsn) as at:
            return (_NBLOCKS_REPLY.pack(101, self._handle.datadir.get_rel_size(tag, at)),)

    def _getpage(
        self, latest: int, lsn: int, spc: int, db: int, rel: int, fork: int, blkno: int
    ) -> Reply:
        tag = _fork(spc, db, rel, fork)
        with self._reading(latest, lsn) as at:
            return (_PAGE_REPLY, self._handle.get_page(tag, blkno, at))

    def _getpages(
        self, latest: int, lsn: int, spc: int, db: int, rel: int, fork: int, blkno: int, count: int
    ) -> Reply:
        tag = _fork(spc, db, rel, fork)
        if not 1 <= count <= MAX_BATCH:
            raise RequestError(f"{count} blocks requested at once, expected 1 to {MAX_BATCH}")
        with self._reading(latest, lsn) as at:
            pages = self._handle.get_pages(tag, blkno, count, at)
        return (_PAGES_REPLY.pack(110, count), *pages)

    def _reading(self, latest: int, lsn: int) -> Reading:
        if not latest and lsn == 0:
            raise RequestError("invalid LSN(0) in request")
        return self._handle.reading(lsn, latest=bool(latest))


def _fork(spc: int, db: int, rel: int, fork: int) -> RelTag:
    if rel == 0:
        raise RequestError("invalid relnode")
    if fork > INIT_FORKNUM:
        raise RequestError(f"invalid fork number {fork}")
    return RelTag(spc, db, rel, fork)


def _error(text: str) -> Reply:
    return (bytes((TAG_ERROR,)), text.encode().replace(b"\0", b" "), b"\0")
