"""Start, stop and restart of the pageserver process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.pageserver_support import (
    Pageserver,
    running,
    scratch_directory,
    template_files,
    wait_until,
)
from fixtures.utils import process_exists

from postgres_ffi.distrib import PgDistrib, find_distrib
from postgres_ffi.relfile import RelTag
from zenith_utils.ids import TenantId, TimelineId

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def distrib() -> PgDistrib:
    return find_distrib()


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


def test_restart_finds_everything(distrib: PgDistrib) -> None:
    with running() as root:
        server = root.server
        empty = server.create_tenant()
        branch = server.create_timeline(root.tenant, ancestor=root.timeline)
        before = {str(t): server.local(root.tenant, t) for t in (root.timeline, branch)}
        assert server.stop() == 0
        server.start()
        assert server.http("GET", f"tenant/{empty}/timeline") == []
        assert {str(t): server.local(root.tenant, t) for t in (root.timeline, branch)} == before
        assert server.stop(signal.SIGQUIT) == 111
        server.start()
        listed = server.http("GET", f"tenant/{root.tenant}/timeline")
        assert sorted(info["timeline_id"] for info in listed) == sorted(before)
        with root.pages() as client:
            rel = RelTag(1663, 5, 1259, 0)
            content = template_files(distrib)[rel, 0]
            assert client.page(rel, 0, root.lsn) == content[:8192]


def test_command_line(scratch: Path) -> None:
    server = Pageserver(scratch / "ps")
    assert not list((scratch / "ps/tenants").iterdir())
    result = server.run("-c", "id = 5")
    assert result.returncode == 1
    assert (
        "node id can only be set during pageserver init and cannot be overridden" in result.stderr
    )
    # Option and value in one argument, with a blank, as some callers pass them.
    result = server.run("-c listen_pg_addr='localhost:x'")
    assert "invalid address" in result.stderr
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        result = server.run(f"-c listen_pg_addr='127.0.0.1:{sock.getsockname()[1]}'", "-d")
    assert result.returncode == 1
    assert "Address already in use" in result.stderr
    assert server.run("--init", "-d").returncode == 1
    assert server.run("-D", str(scratch / "absent")).stderr.startswith("Error: Error opening")
    shutil.rmtree(scratch / "ps")
    (scratch / "ps").mkdir()
    assert "No pageserver config at" in server.run().stderr


def test_init_with_a_timeline_and_daemon(scratch: Path) -> None:
    server = Pageserver(scratch / "ps")
    (scratch / "ps/pageserver.toml").unlink()
    tenant, timeline = TenantId.generate(), TimelineId.generate()
    result = server.run(
        *("--init", "-c", "id=42"),
        *("-c", f"listen_pg_addr='localhost:{server.pg_port}'"),
        *("-c", f"listen_http_addr='localhost:{server.http_port}'"),
        *("--create-tenant", str(tenant), "--initial-timeline-id", str(timeline)),
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"initializing tenantid {tenant}"
    assert lines[1].startswith(f"created initial timeline {timeline} timeline.lsn 0/")
    assert lines[2:] == [f"initial timeline {timeline} created", "pageserver init succeeded"]
    result = server.run("--daemonize")
    assert result.returncode == 0, result.stderr
    pid = int((scratch / "ps/pageserver.pid").read_text())
    try:
        assert server.http("GET", "status") == {"id": 42}
        assert server.last_record_lsn(tenant, timeline) > 0
        second = server.run("--daemonize", "-c", "listen_pg_addr='127.0.0.1:0'")
        assert second.returncode == 1
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not process_exists(pid), "the daemon to end")
