"""Real processes for tests of the WAL service: safekeepers, a stock Postgres, a walproposer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import requests
from fixtures.ports import free_port

from postgres_ffi.distrib import find_distrib
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.os_user import give, popen_kwargs
from zenith_utils.pq_client import PqConnection, connect

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 20.0
SUPERUSER = "zenith_admin"


def wait_until(condition: Callable[[], Any], what: str, timeout: float = DEADLINE) -> Any:
    """Wait for a condition to become true; its value."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.01)


class Process:
    """A child process that is ended with the test."""

    process: subprocess.Popen[bytes] | None = None

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        code = self.process.wait(DEADLINE)
        self.process = None
        return code


class Safekeeper(Process):
    """A safekeeper process."""

    def __init__(self, directory: Path, node_id: int, *, sync: bool = False) -> None:
        self.directory = directory
        self.id = node_id
        self.sync = sync
        self.pg_port, self.http_port = free_port(), free_port()
        directory.mkdir()

    @property
    def address(self) -> str:
        """Address of the WAL service."""
        return f"127.0.0.1:{self.pg_port}"

    def start(self) -> None:
        """Start and wait until it answers."""
        command = [sys.executable, "-m", "safekeeper.main", "-D", str(self.directory)]
        command += ["--id", str(self.id), "-l", self.address]
        command += ["--listen-http", f"127.0.0.1:{self.http_port}", "--recall", "100 ms"]
        with (self.directory / "out.log").open("ab") as log:
            self.process = subprocess.Popen(
                command if self.sync else [*command, "--no-sync"],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        wait_until(self._answers, f"safekeeper {self.id}")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "out.log").read_text()
        try:
            return bool(self.http("v1/status")["id"] == self.id)
        except (requests.ConnectionError, requests.Timeout):
            return False

    def http(self, path: str) -> Any:
        """GET a JSON document."""
        response = requests.get(f"http://127.0.0.1:{self.http_port}/{path}", timeout=10)
        assert response.status_code == 200, response.text
        return response.json()

    def metrics(self) -> str:
        """The metrics page."""
        return requests.get(f"http://127.0.0.1:{self.http_port}/metrics", timeout=10).text


class Postgres(Process):
    """A stock Postgres whose commits wait for the walproposer."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        give(directory)
        self.directory = directory
        self.pgdata = directory / "data"
        self.distrib = find_distrib()
        self.port = free_port()
        subprocess.run(
            [
                *(self.distrib.bin_dir / "initdb", "-D", self.pgdata, "-U", SUPERUSER),
                *("--no-sync", "--auth=trust", "--no-instructions", "--no-locale", "-E", "UTF8"),
            ],
            check=True,
            capture_output=True,
            cwd=directory,
            **popen_kwargs(),
        )

    def checkpoint_lsn(self) -> Lsn:
        """LSN of the last checkpoint of the stopped cluster: where its WAL goes on being read."""
        text = subprocess.run(
            [self.distrib.bin_dir / "pg_controldata", self.pgdata],
            check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"},
        ).stdout  # fmt: skip
        for line in text.splitlines():
            if line.startswith("Latest checkpoint location:"):
                return Lsn.parse(line.split()[-1])
        raise AssertionError(text)

    def start(self, *settings: str, synchronous: str = "walproposer") -> None:
        """Start and wait until it takes connections."""
        options = [
            "fsync=off", "full_page_writes=off", "max_wal_senders=10", "wal_level=replica",
            f"unix_socket_directories={self.directory}", "listen_addresses=127.0.0.1",
            f"synchronous_standby_names={synchronous}", "wal_sender_timeout=5s",
            "max_replication_slots=10", "dynamic_shared_memory_type=mmap",
            "restart_after_crash=off", f"port={self.port}", *settings,
        ]  # fmt: skip
        command = [str(self.distrib.bin_dir / "postgres"), "-D", str(self.pgdata)]
        for option in options:
            command += ["-c", option]
        with (self.directory.parent / f"{self.directory.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.directory, **popen_kwargs()
            )
        wait_until(self._answers, "Postgres")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "Postgres has ended"
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def connect(self) -> Any:
        """A connection in autocommit mode."""
        conn = psycopg2.connect(
            host=str(self.directory), port=self.port, user=SUPERUSER, dbname="postgres"
        )
        conn.autocommit = True
        return conn

    def sql(self, statement: str) -> Any:
        """Run a statement in a connection of its own; its rows, if any."""
        conn = self.connect()
        try:
            with conn.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else None
        finally:
            conn.close()

    def stop(self) -> int:
        """Fast shutdown, which waits for the walproposer; the exit code."""
        return self.kill(signal.SIGINT)


class Walproposer(Process):
    """A walproposer process, with this test as its supervisor."""

    def __init__(
        self,
        log: Path,
        tenant: TenantId,
        timeline: TimelineId,
        safekeepers: list[Safekeeper],
        *arguments: str,
    ) -> None:
        command = [sys.executable, "-m", "compute_tools.walproposer"]
        command += ["--tenant", str(tenant), "--timeline", str(timeline)]
        command += ["--safekeepers", ",".join(sk.address for sk in safekeepers), *arguments]
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._buffer = b""

    def command(self, **fields: Any) -> None:
        """Send a command."""
        assert self._stdin is not None
        self._stdin.write(json.dumps(fields).encode() + b"\n")
        self._stdin.flush()

    def event(self, name: str, timeout: float = DEADLINE) -> dict[str, Any]:
        """Wait for an event of this name, passing over those that come at any time."""
        end = time.monotonic() + timeout
        while True:
            event = self._next_event(end)
            if event["event"] == name:
                return event
            passing = event["event"] in ("status", "waiting", "campaign", "won")
            assert passing, f"expected {name}, got {event}"

    def _next_event(self, end: float) -> dict[str, Any]:
        assert self._stdout is not None
        while b"\n" not in self._buffer:
            left = max(0.0, end - time.monotonic())
            assert select.select([self._stdout], [], [], left)[0], "no event of the walproposer"
            data = os.read(self._stdout.fileno(), 65536)
            assert data, "the walproposer has ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        event = json.loads(line)
        assert isinstance(event, dict)
        return event

    def start(self, postgres: Postgres, lsn: Lsn) -> None:
        """Have it stream from Postgres, and wait until it does."""
        self.command(
            cmd="start", host=str(postgres.directory), port=postgres.port,
            user=SUPERUSER, start_lsn=str(lsn),
        )  # fmt: skip
        self.event("streaming")

    def close(self) -> None:
        """Kill it and release its pipes."""
        self.kill()
        for pipe in (self._stdin, self._stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class WalCluster:
    """Safekeepers of one timeline, and what writes to them."""

    def __init__(self, directory: Path, safekeepers: int, *, sync: bool = False) -> None:
        directory.chmod(0o755)
        self.directory = directory
        self.tenant = TenantId.generate()
        self.timeline = TimelineId.generate()
        self.safekeepers = [
            Safekeeper(directory / f"sk{i + 1}", i + 1, sync=sync) for i in range(safekeepers)
        ]
        self.postgres: Postgres | None = None
        self.proposers: list[Walproposer] = []

    def proposer(self, *arguments: str) -> Walproposer:
        """Start a walproposer."""
        log = self.directory / "walproposer.log"
        if self.postgres is not None:
            arguments = ("--pgdata", str(self.postgres.pgdata), *arguments)
        proposer = Walproposer(log, self.tenant, self.timeline, self.safekeepers, *arguments)
        self.proposers.append(proposer)
        return proposer

    def start(self, *settings: str) -> tuple[Postgres, Walproposer]:
        """Everything, from nothing to commits that return."""
        for safekeeper in self.safekeepers:
            safekeeper.start()
        self.postgres = Postgres(self.directory / "pg")
        lsn = self.postgres.checkpoint_lsn()
        proposer = self.proposer()
        assert proposer.event("elected")["bootstrap"]
        self.postgres.start(*settings)
        proposer.start(self.postgres, lsn)
        return self.postgres, proposer

    def status(self, safekeeper: Safekeeper) -> Any:
        """Timeline status of a safekeeper."""
        return safekeeper.http(f"v1/timeline/{self.tenant}/{self.timeline}")

    def flush_lsn(self, safekeeper: Safekeeper) -> Lsn:
        """Flush LSN of a safekeeper."""
        return Lsn.parse(self.status(safekeeper)["flush_lsn"])

    def connect(self, safekeeper: Safekeeper, application_name: str = "test") -> PqConnection:
        """A connection to a safekeeper's WAL service."""
        options = f"-c ztimelineid={self.timeline} ztenantid={self.tenant}"
        return connect(
            "127.0.0.1", safekeeper.pg_port, user="test",
            options=f"{options} pageserver_connstr=postgresql://nobody",
            application_name=application_name,
        )  # fmt: skip

    def close(self) -> None:
        """End all processes."""
        for proposer in self.proposers:
            proposer.close()
        if self.postgres is not None:
            self.postgres.kill(signal.SIGQUIT)
        for safekeeper in self.safekeepers:
            safekeeper.kill()


@contextlib.contextmanager
def wal_cluster(
    directory: Path, safekeepers: int = 3, *, sync: bool = False
) -> Iterator[WalCluster]:
    """A cluster that is taken down at the end."""
    cluster = WalCluster(directory, safekeepers, sync=sync)
    try:
        yield cluster
    finally:
        cluster.close()
