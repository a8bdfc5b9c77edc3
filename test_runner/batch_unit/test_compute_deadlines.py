"""Servers that let a compute in and then say nothing: nobody waits for them for ever."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compute_tools import pageserver_client, quorum_sidecar, standby_feed, standby_start
from compute_tools.pageserver_client import PageserverClient, PageserverError
from compute_tools.quorum_settings import QuorumSettings
from compute_tools.quorum_sidecar import SidecarError
from compute_tools.spec import ComputeSpec
from compute_tools.walproposer import link, wal_source
from postgres_ffi.versions import VERSIONS
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.postgres_backend import Connection, PostgresServer
from zenith_utils.pq_client import PqConnectionLost

LSN = Lsn(0x2000000)
LIMIT = 2.0  # there has to be time to log in
DEADLINE = 20.0


class Silent:
    """Takes every query and answers none."""

    def startup(self, conn: Connection) -> None:
        """Let everybody in."""

    def query(self, conn: Connection, query: str) -> None:
        """Wait until the client leaves."""
        while not conn.wait_readable(0.05) and not conn.stopping:
            pass


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComputeSpec]:
    """A compute all of whose servers are silent, and short limits."""
    for module, names in (
        (link, ["_CONNECT_TIMEOUT"]),
        (wal_source, ["_TIMEOUT"]),
        (standby_feed, ["_CHECK_TIMEOUT"]),
        (standby_start, ["_READ_TIMEOUT"]),
        (quorum_sidecar, ["_READ_TIMEOUT"]),
        (pageserver_client, ["CONNECT_TIMEOUT"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, LIMIT)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server = PostgresServer(listener, Silent, name="silent")
    server.start()
    yield ComputeSpec(
        tenant_id=TenantId.generate(),
        timeline_id=TimelineId.generate(),
        pgdata=tmp_path,
        state_dir=tmp_path,
        distrib_dir=tmp_path,
        pageserver_pg=address,
        pageserver_http=address,
        port=1,
        safekeepers=(address,),
    )
    server.stop(5)


def failure(work: Callable[[], object]) -> Exception:
    """What a call fails with, which must come in time."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as e:
            failures.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert failures, "it still waits, or has not failed"
    return failures[0]


def test_walproposer_session(spec: ComputeSpec) -> None:
    error = failure(lambda: link.open_session(spec.safekeepers[0], "", None))
    assert isinstance(error, PqConnectionLost)
    assert "no answer within" in str(error)


def test_recovery_from_a_safekeeper(spec: ComputeSpec) -> None:
    woken = threading.Event()
    reader = wal_source.RecoveryReader(spec.safekeepers[0], "", LSN, LSN + 8, woken.set)
    assert woken.wait(DEADLINE)
    assert reader.take() is None and reader.finished
    assert "no answer within" in (reader.error or "")


def test_standby(spec: ComputeSpec) -> None:
    address = spec.safekeepers[0]
    error = failure(lambda: standby_feed.has_wal(address, spec, LSN))
    assert isinstance(error, PqConnectionLost)
    with standby_feed.connect_safekeeper(address, spec) as conn:
        error = failure(lambda: standby_start._read(conn, LSN, VERSIONS[15], {}))
    assert isinstance(error, PqConnectionLost)


def test_server_of_an_installation(spec: ComputeSpec) -> None:
    quorum = QuorumSettings(spec.tenant_id, spec.timeline_id, spec.safekeepers, "")
    its = quorum_sidecar.make_spec(quorum, spec.pgdata, 1)
    error = failure(lambda: quorum_sidecar.check_wal(its, LSN))
    assert isinstance(error, SidecarError)
    assert "no answer within" in str(error)


def test_call_of_the_pageserver(spec: ComputeSpec) -> None:
    error = failure(PageserverClient(spec).callmemaybe)
    assert isinstance(error, PageserverError)
    assert "no answer within" in str(error)
