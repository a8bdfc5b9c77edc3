"""The safekeeper's libpq service: which commands there are, and for which timeline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE
from safekeeper.callmemaybe import CallMeMaybe
from safekeeper.control_file import ControlFileError
from safekeeper.json_ctrl import append_logical_message, parse_request
from safekeeper.receive_wal import PushSession
from safekeeper.send_wal import StreamDone, WalSender
from safekeeper.timeline import Timeline, TimelineFailedError
from safekeeper.timeline_registry import RegistryError
from safekeeper.timelines import TimelineNotFoundError, Timelines
from safekeeper.wal_files import WalMissingError, WalStorageError
from zenith_utils.conninfo import redact_start, without_password
from zenith_utils.ids import IdParseError, TenantId, TenantTimelineId, TimelineId
from zenith_utils.lsn import Lsn, LsnParseError, lsn_text
from zenith_utils.metrics import IntegerMetric
from zenith_utils.postgres_backend import (
    Column,
    Connection,
    ConnectionClosed,
    FatalQueryError,
    QueryError,
    is_set_statement,
)
from zenith_utils.postgres_connection import INT4_OID

RECOVERY_APPLICATION = "wal_proposer_recovery"
STANDBY_APPLICATION = "zenith_hot_standby"
UNDEFINED_FILE = "58P01"
"""SQLSTATE of WAL that is not here, as of a stock walsender."""

_PUSH = re.compile(r"START_WAL_PUSH(?: (?P<connstr>.+))?", re.DOTALL)
_REPLICATE = re.compile(
    r"START_REPLICATION (?:PHYSICAL )?(?P<lsn>[0-9A-Fa-f]+/[0-9A-Fa-f]+)(?: TIMELINE 1)?"
)
_JSON_CTRL = re.compile(r"JSON_CTRL(?: (?P<request>.*))?", re.DOTALL)
_FIRST_PROPOSER_POLL = 1.0


@dataclass(frozen=True, slots=True)
class WalService:
    """What the handlers of all connections share."""

    timelines: Timelines
    callmemaybe: CallMeMaybe
    streams: IntegerMetric
    """Number of streams to pageservers."""

    def handler_factory(self) -> Callable[[], WalServiceHandler]:
        """Makes the handler of a new connection."""
        return lambda: WalServiceHandler(self)


class WalServiceHandler:
    """Answers one connection."""

    def __init__(self, service: WalService) -> None:
        self._service = service
        self._params: dict[str, str] = {}

    def startup(self, conn: Connection) -> None:
        """Keep the parameters; which of them are needed depends on the command."""
        self._params = conn.parse_options()

    def query(self, conn: Connection, query: str) -> None:
        """Run a command. Raises QueryError."""
        command = query.strip().rstrip(";").rstrip()
        try:
            if match := _PUSH.fullmatch(command):
                self._push(conn, match["connstr"])
            elif match := _REPLICATE.fullmatch(command):
                self._replicate(conn, Lsn.parse(match["lsn"]))
            elif command == "IDENTIFY_SYSTEM":
                self._identify(conn)
            elif match := _JSON_CTRL.fullmatch(command):
                self._json_ctrl(conn, match["request"] or "")
            elif is_set_statement(command):
                conn.send_command_complete()
            else:
                raise QueryError(f"unsupported command {redact_start(query)}")
        except WalMissingError as e:
            raise FatalQueryError(str(e), UNDEFINED_FILE) from e
        except (
            TimelineNotFoundError,
            TimelineFailedError,
            ControlFileError,
            RegistryError,
            WalStorageError,
            LsnParseError,
        ) as e:
            raise FatalQueryError(str(e)) from e

    def _timeline_id(self) -> TenantTimelineId:
        try:
            return TenantTimelineId(
                TenantId.parse(self._required("ztenantid", "tenantid is required")),
                TimelineId.parse(self._required("ztimelineid", "timelineid is required")),
            )
        except IdParseError as e:
            raise QueryError(str(e)) from e

    def _required(self, name: str, complaint: str) -> str:
        value = self._params.get(name)
        if value is None:
            raise QueryError(complaint)
        return value

    def _push(self, conn: Connection, pageserver: str | None) -> None:
        timeline_id = self._timeline_id()
        callmemaybe = self._service.callmemaybe

        def subscribe(timeline: Timeline) -> None:
            if pageserver:
                timeline.deliver_to(pageserver)
                callmemaybe.subscribe(timeline_id, pageserver)

        PushSession(conn, self._service.timelines, timeline_id, subscribe).run()
        conn.send_command_complete()

    def _identify(self, conn: Connection) -> None:
        timeline = self._service.timelines.get(self._timeline_id())
        columns = [
            Column("systemid"),
            Column("timeline", INT4_OID),
            Column("xlogpos"),
            Column("dbname"),
        ]
        system_id = str(timeline.acceptor.state.server.system_id)
        conn.send_result(columns, [(system_id, 1, lsn_text(timeline.flush_lsn), None)])

    def _json_ctrl(self, conn: Connection, text: str) -> None:
        timeline_id = self._timeline_id()
        request = parse_request(text)
        timeline = self._service.timelines.get_or_create(timeline_id)
        answer = append_logical_message(timeline, request)
        conn.send_result([Column("json")], [(json.dumps(answer),)])

    def _replicate(self, conn: Connection, start_lsn: int) -> None:
        timeline_id = self._timeline_id()
        timeline = self._service.timelines.get(timeline_id)
        if self._params.get("application_name") == RECOVERY_APPLICATION:
            self._recover(conn, timeline, start_lsn)
            return
        if self._params.get("application_name") == STANDBY_APPLICATION:
            self._feed_standby(conn, timeline, start_lsn)
            return
        pageserver = without_password(
            self._required("pageserver_connstr", "pageserver_connstr is required")
        )
        callmemaybe = self._service.callmemaybe
        self._wait_for_first_proposer(conn, timeline)
        callmemaybe.stream_started(timeline_id, pageserver)
        self._service.streams.inc()
        try:
            WalSender(conn, timeline, pageserver).stream(start_lsn)
        except StreamDone as e:
            # The pageserver is called again when a compute comes.
            callmemaybe.unsubscribe(
                timeline_id, pageserver, unless=lambda: timeline.wants_pageserver
            )
            timeline.save_delivery()
            # An error is how the protocol ends the stream; as it is none, it is not raised as one.
            conn.send_error(str(e), fatal=True)
            conn.flush()
            raise ConnectionClosed("the stream is complete") from e
        finally:
            self._service.streams.inc(by=-1)
            callmemaybe.stream_ended(timeline_id, pageserver)
        conn.send_command_complete()

    def _recover(self, conn: Connection, timeline: Timeline, start_lsn: int) -> None:
        term = self._params.get("zterm")
        try:
            wanted = None if term is None else int(term)
        except ValueError as e:
            raise QueryError(f"invalid zterm {term!r}: expected a term number") from e
        WalSender(conn, timeline).stream_for_recovery(start_lsn, wanted)

    def _feed_standby(self, conn: Connection, timeline: Timeline, start_lsn: int) -> None:
        """Stream to a hot standby, which asks for whole segments (RequestXLogStreaming()).

        Of the segment that the timeline begins in there is only the rest. A standby has the
        headers of the pages before from its base backup, and takes what comes where it belongs.
        """
        begin = timeline.wal_begin_lsn
        if start_lsn < begin and start_lsn // WAL_SEGMENT_SIZE == begin // WAL_SEGMENT_SIZE:
            start_lsn = begin
        WalSender(conn, timeline, standby=True).stream(start_lsn)
        conn.send_command_complete()

    def _wait_for_first_proposer(self, conn: Connection, timeline: Timeline) -> None:
        """WAL has no known segment size before a proposer has told it."""
        while not timeline.acceptor.state.server.wal_seg_size:
            if conn.stopping:
                raise FatalQueryError("the safekeeper is shutting down", "57P01")
            timeline.wait_for_commit(timeline.commit_lsn, _FIRST_PROPOSER_POLL)
