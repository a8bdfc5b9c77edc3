"""What a compute asks of its pageserver: a base backup, a lease, to be called back."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any

from compute_tools.auth import auth_token
from compute_tools.spec import ComputeSpec, address_text
from zenith_utils.lsn import Lsn, LsnParseError
from zenith_utils.pq_client import PqConnection, PqError, connect
from zenith_utils.zenith_feedback import ZenithFeedback, postgres_timestamp

# Renewed all the time, but a compute that is cut off from a living pageserver has to find its
# pages when it is back. The price is history at one LSN for so long, where a compute was killed and
# is not started again.
LEASE_TTL = 12 * 3600.0
LEASE_RENEWAL = 20.0
HTTP_TIMEOUT = 10.0
RELEASE_TIMEOUT = 2.0
CONNECT_TIMEOUT = 10.0
BASEBACKUP_TIMEOUT = 300.0
_GONE = 410
# Longer than the pageserver takes to give up a host that is gone without a word.
_RECEIVING_TIMEOUT = 45.0
_RECEIVING_POLL = 0.02


class PageserverError(Exception):
    """The pageserver refused a request or cannot be reached."""


class GoneError(PageserverError):
    """What was asked for is gone and does not come back."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise of the pageserver to keep an LSN readable for `ttl` seconds."""

    lease_id: str
    lsn: Lsn


class PageserverClient:
    """The pageserver's services for one timeline."""

    def __init__(self, spec: ComputeSpec) -> None:
        self._spec = spec
        self._path = f"/v1/tenant/{spec.tenant_id}/timeline/{spec.timeline_id}"

    def last_record_lsn(self) -> Lsn:
        """End of the last WAL record that the pageserver has of the timeline, and will ever have.

        What the compute before has sent may still lie in a socket, unacknowledged: ingested later,
        it would be another history than the one that is written from here on. So this waits until
        the pageserver has met the end of that connection.

        Raises PageserverError: also if it goes on receiving.
        """
        deadline = time.monotonic() + _RECEIVING_TIMEOUT
        while True:
            detail = self._http("GET", "")
            try:
                lsn = Lsn.parse(detail["local"]["last_record_lsn"])
                source = detail["local"]["wal_source"]
            except (KeyError, TypeError) as e:
                raise PageserverError(
                    f"the pageserver does not have timeline {self._spec.timeline_id}"
                ) from e
            if source is None:
                return lsn
            if time.monotonic() > deadline:
                raise PageserverError(
                    f"the pageserver is still receiving WAL of timeline {self._spec.timeline_id} "
                    f"from {source}: if another node runs on the branch, stop it"
                )
            time.sleep(_RECEIVING_POLL)

    def feedback(self) -> ZenithFeedback | None:
        """What the pageserver has of the timeline, as it reports to a WAL sender that can take it.

        Its LSNs are not above what its size is of. None while it cannot tell the size.
        """
        detail = self._http("GET", "")
        try:
            local, remote = detail["local"], detail["remote"]
            if local["current_logical_size"] is None:
                return None
            uploaded = None if remote is None else remote["remote_consistent_lsn"]
            return ZenithFeedback(
                current_timeline_size=local["current_logical_size"],
                ps_writelsn=Lsn.parse(local["last_record_lsn"]),
                ps_flushlsn=Lsn.parse(local["disk_consistent_lsn"]),
                ps_applylsn=0 if uploaded is None else Lsn.parse(uploaded),
                ps_replytime=postgres_timestamp(),
            )
        except (KeyError, TypeError, LsnParseError) as e:
            raise PageserverError(f"the pageserver describes the timeline as {detail!r}") from e

    def positions(self) -> tuple[Lsn, Lsn]:
        """Where the timeline's own WAL begins, and the end of the last record there is of it."""
        detail = self._http("GET", "")
        try:
            local = detail["local"]
            branched = local["ancestor_timeline_id"] is not None
            begin = local["ancestor_lsn"] if branched else local["initdb_lsn"]
            return Lsn.parse(begin), Lsn.parse(local["last_record_lsn"])
        except (KeyError, TypeError) as e:
            raise PageserverError(
                f"the pageserver does not have timeline {self._spec.timeline_id}"
            ) from e

    def basebackup(self, lsn: Lsn) -> bytes:
        """The base backup at `lsn`, a tar stream; the pageserver waits until it has that LSN.

        Raises PageserverError with the pageserver's own words.
        """
        spec = self._spec
        command = f"basebackup {spec.tenant_id} {spec.timeline_id} {lsn}"
        try:
            connection = self._connect()
        except (OSError, PqError) as e:
            raise PageserverError(f"connecting to page server failed: {e}") from e
        try:
            connection.sock.settimeout(BASEBACKUP_TIMEOUT)
            return b"".join(connection.copy_out(command))
        except (OSError, PqError) as e:
            raise PageserverError(f"page server 'basebackup' command failed: {e}") from e
        finally:
            connection.close()

    def callmemaybe(self) -> None:
        """Ask the pageserver to fetch WAL from this compute (the mode without safekeepers)."""
        spec = self._spec
        source = f"host=127.0.0.1 port={spec.port} user={spec.superuser} dbname=postgres"
        try:
            connection = self._connect()
            try:
                connection.simple_query(
                    f"callmemaybe {spec.tenant_id} {spec.timeline_id} {source}",
                    timeout=CONNECT_TIMEOUT,
                )
            finally:
                connection.close()
        except (OSError, PqError) as e:
            raise PageserverError(f"callmemaybe failed: {e}") from e

    def renew_lease(self, lease: Lease) -> None:
        """Take or extend a lease for LEASE_TTL seconds; one of the same id on another LSN moves.

        Raises PageserverError; GoneError if pages at the LSN cannot be read any more.
        """
        self._http("PUT", f"/lsn_lease/{lease.lease_id}", {"lsn": str(lease.lsn), "ttl": LEASE_TTL})

    def release_lease(self, lease: Lease) -> None:
        """Give a lease back; it would expire by itself, so this does not wait long."""
        self._http("DELETE", f"/lsn_lease/{lease.lease_id}", timeout=RELEASE_TIMEOUT)

    def _connect(self) -> PqConnection:
        host, port = self._spec.pageserver_pg
        return connect(host, port, user="no_user", password=auth_token(), timeout=CONNECT_TIMEOUT)

    def _http(
        self, method: str, path: str, body: object = None, *, timeout: float = HTTP_TIMEOUT
    ) -> Any:
        # http.client and not requests: its import would be a tenth of a compute's start.
        host, port = self._spec.pageserver_http
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        token = auth_token()
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, self._path + path, body=text, headers=headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise PageserverError(
                f"cannot reach the pageserver at {address_text(host, port)}: {e}"
            ) from e
        finally:
            connection.close()
        try:
            document = json.loads(answer) if answer else None
        except ValueError:
            document = None
        if response.status >= 300:
            error = GoneError if response.status == _GONE else PageserverError
            if isinstance(document, dict) and "msg" in document:
                raise error(document["msg"])
            raise error(f"the pageserver answers HTTP status {response.status}")
        return document
