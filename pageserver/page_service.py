"""The libpq side of the pageserver: commands a client sends as queries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pageserver.auth import Permission, authorize
from pageserver.basebackup import send_basebackup
from pageserver.failpoints import set_failpoints
from pageserver.pagestream import PageStream
from pageserver.tenant import TenantError
from pageserver.tenants import TenantManager
from pageserver.timelines import LsnNotReadableError, TimelineHandle
from zenith_utils.failpoints import FailpointError, FailpointFormatError
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import Lsn, LsnParseError, lsn_text
from zenith_utils.postgres_backend import INT8_OID, Column, Connection, QueryError

log = logging.getLogger(__name__)

# Errors a command may end with by itself; anything else is a defect and logged with its trace.
_EXPECTED = (TenantError, LsnNotReadableError, FailpointError)

# Commands whose last word is a text with blanks of its own, and how many blanks come before it.
_LAST_WORD = {"callmemaybe": 3, "failpoints": 1}

# What a command needs of its client's token; one that is not here is for the management.
PERMISSIONS = {
    "set": Permission.ANY,
    "failpoints": Permission.MANAGEMENT,
    **dict.fromkeys(
        (
            "pagestream",
            "basebackup",
            "callmemaybe",
            "checkpoint",
            "compact",
            "do_gc",
            "wal_position",
        ),
        Permission.TENANT,
    ),
}


class PageServiceHandler:
    """The commands of one connection."""

    def __init__(self, tenants: TenantManager) -> None:
        self._tenants = tenants
        self._commands: dict[str, Callable[[Connection, list[str]], None]] = {
            "pagestream": self._pagestream,
            "basebackup": self._basebackup,
            "callmemaybe": self._callmemaybe,
            "checkpoint": self._checkpoint,
            "compact": self._compact,
            "do_gc": self._do_gc,
            "failpoints": self._failpoints,
            "set": self._set,
            "wal_position": self._wal_position,
        }

    def startup(self, conn: Connection) -> None:
        """User and database do not matter: timelines are named by the commands."""

    def query(self, conn: Connection, query: str) -> None:
        """Runs one command. Raises QueryError with the text for the client."""
        words = query.strip().rstrip(";").split()
        command = words[0].lower() if words else ""
        run = self._commands.get(command)
        if run is None:
            raise QueryError("unknown command", sqlstate="42601")
        authorize(conn, PERMISSIONS[command], words)
        try:
            blanks = _LAST_WORD.get(command)
            run(conn, words if blanks is None else query.strip().split(maxsplit=blanks))
        except _EXPECTED as error:
            raise QueryError(str(error)) from error

    def _pagestream(self, conn: Connection, words: list[str]) -> None:
        handle = self._timeline(words, (3,))
        PageStream(handle).serve(conn)
        conn.send_copy_done()
        conn.send_command_complete("SELECT 1")

    def _basebackup(self, conn: Connection, words: list[str]) -> None:
        handle = self._timeline(words, (3, 4))
        lsn = _parse_lsn(words[3]) if len(words) == 4 else None
        send_basebackup(conn, handle, lsn)
        conn.send_command_complete("SELECT 1")

    def _callmemaybe(self, conn: Connection, words: list[str]) -> None:
        handle = self._timeline(words, (4,))
        self._tenants.activate(handle.tenant_id)
        handle.walreceiver.callmemaybe(words[3])
        conn.send_command_complete("SELECT 1")

    def _wal_position(self, conn: Connection, words: list[str]) -> None:
        """Up to where a timeline's WAL is on disk here, and in remote storage.

        For safekeepers from which it does not stream.
        """
        timeline = self._timeline(words, (3,)).timeline
        columns = [Column("disk_consistent_lsn"), Column("remote_consistent_lsn")]
        conn.send_result(columns, [(lsn_text(timeline.disk_consistent_lsn), lsn_text(0))])

    def _checkpoint(self, conn: Connection, words: list[str]) -> None:
        handle = self._timeline(words, (3,))
        handle.timeline.checkpoint()
        # The first merges what there is; what that makes due is done by the second.
        handle.compact()
        handle.compact()
        conn.send_row_description([Column("data")])
        conn.send_command_complete("SELECT 1")

    def _compact(self, conn: Connection, words: list[str]) -> None:
        self._timeline(words, (3,)).compact(force=True)
        conn.send_row_description([Column("data")])
        conn.send_command_complete("SELECT 1")

    def _do_gc(self, conn: Connection, words: list[str]) -> None:
        handle = self._timeline(words, (3, 4))
        tenant = self._tenants.tenant(handle.tenant_id)
        horizon = _parse_size(words[3]) if len(words) == 4 else tenant.settings.gc_horizon
        started = time.monotonic()
        result = handle.collect_all_garbage(horizon)
        elapsed = round((time.monotonic() - started) * 1000)
        row = {
            "layers_total": result.layers_total,
            "layers_needed_by_cutoff": result.layers_needed_by_cutoff,
            "layers_needed_by_branches": result.layers_needed_by_branches,
            "layers_not_updated": result.layers_not_updated,
            "layers_removed": result.layers_removed,
            "elapsed": elapsed,
        }
        conn.send_row_description([Column(name, INT8_OID) for name in row])
        conn.send_data_row([str(value).encode() for value in row.values()])
        conn.send_command_complete("SELECT 1")

    def _failpoints(self, conn: Connection, words: list[str]) -> None:
        try:
            set_failpoints(words[1] if len(words) > 1 else "")
        except FailpointFormatError as error:
            raise QueryError(str(error), sqlstate="42601") from error
        conn.send_command_complete("SELECT 1")

    def _set(self, conn: Connection, words: list[str]) -> None:
        # Drivers set session parameters when they connect; none of them means anything here.
        conn.send_command_complete("SELECT 1")

    def _timeline(self, words: list[str], lengths: tuple[int, ...]) -> TimelineHandle:
        """The timeline named by the second and third word of a command of so many words."""
        if len(words) not in lengths:
            raise QueryError(f"invalid param number for {words[0]} command", sqlstate="42601")
        try:
            tenant_id, timeline_id = TenantId.parse(words[1]), TimelineId.parse(words[2])
        except IdParseError as error:
            raise QueryError(str(error), sqlstate="42601") from error
        return self._tenants.timeline(tenant_id, timeline_id)


def _parse_size(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise QueryError(f"invalid number of bytes '{text}'", sqlstate="42601")
    return int(text)


def _parse_lsn(text: str) -> Lsn:
    try:
        return Lsn.parse(text)
    except LsnParseError as error:
        raise QueryError(str(error), sqlstate="42601") from error
