"""A real pageserver process, its wire clients, and stock Postgres started from its base backups."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import requests
from fixtures.ports import free_port

from pageserver.initdb_template import template_cluster
from postgres_ffi.distrib import PgDistrib
from postgres_ffi.relfile import RelTag, parse_relpath, relpath
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.os_user import give, popen_kwargs
from zenith_utils.pq_client import PqConnection, connect

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKS_PER_SEGMENT = 131072
DEADLINE = 30.0


def wait_until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """The first true value of ``condition()``."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A folder that the Postgres user can reach, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="zenith-pageserver-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class HttpError(Exception):
    """An error answer of the HTTP API."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


class Pageserver:
    """One pageserver with its work directory."""

    def __init__(self, workdir: Path, *overrides: str) -> None:
        self.workdir = workdir
        self.pg_port, self.http_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        workdir.mkdir(exist_ok=True)
        result = self.run(
            "--init",
            *("-c", "id=42"),
            *("-c", f"listen_pg_addr='localhost:{self.pg_port}'"),
            *("-c", f"listen_http_addr='127.0.0.1:{self.http_port}'"),
            *(argument for text in overrides for argument in ("-c", text)),
        )
        assert result.returncode == 0, result.stderr

    def command(self, *arguments: str) -> list[str]:
        """Command line of the program on this work directory."""
        return [sys.executable, "-m", "pageserver.main", "-D", str(self.workdir), *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the program to its end."""
        return subprocess.run(
            self.command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=60
        )

    def start(self, *overrides: str) -> None:
        """Starts the server in the foreground and waits until it answers."""
        with (self.workdir / "pageserver.log").open("ab") as log:
            arguments = [argument for text in overrides for argument in ("-c", text)]
            self._process = subprocess.Popen(
                self.command(*arguments), cwd=REPOSITORY, stdout=log, stderr=log
            )
        wait_until(self._answers, "the pageserver to answer")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()[-4000:]
        with contextlib.suppress(requests.ConnectionError):
            return bool(self.http("GET", "status") == {"id": 42})
        return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the process by a signal; its exit status."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Waits until the process ends by itself; its exit status."""
        assert self._process is not None
        status = self._process.wait(DEADLINE)
        self._process = None
        return status

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Everything logged so far."""
        return (self.workdir / "pageserver.log").read_text()

    def http(self, method: str, path: str, body: Any = None) -> Any:
        """JSON answer of ``/v1/<path>``; raises HttpError."""
        response = requests.request(
            method, f"http://127.0.0.1:{self.http_port}/v1/{path}", json=body, timeout=60
        )
        answer = response.json()
        if response.status_code >= 400:
            raise HttpError(response.status_code, answer)
        return answer

    def metrics(self) -> str:
        """The page of ``/metrics``."""
        return requests.get(f"http://127.0.0.1:{self.http_port}/metrics", timeout=30).text

    def create_tenant(self) -> TenantId:
        """A new tenant."""
        return TenantId.parse(self.http("POST", "tenant", {}))

    def create_timeline(
        self,
        tenant: TenantId,
        *,
        timeline: TimelineId | None = None,
        ancestor: TimelineId | None = None,
        lsn: Lsn | None = None,
    ) -> TimelineId:
        """A fresh timeline, or with ``ancestor`` a branch."""
        body = {
            "new_timeline_id": timeline and str(timeline),
            "ancestor_timeline_id": ancestor and str(ancestor),
            "ancestor_start_lsn": lsn and str(lsn),
        }
        info = self.http("POST", f"tenant/{tenant}/timeline", body)
        return TimelineId.parse(info["timeline_id"])

    def local(self, tenant: TenantId, timeline: TimelineId) -> dict[str, Any]:
        """The local part of a timeline's description."""
        local: dict[str, Any] = self.http("GET", f"tenant/{tenant}/timeline/{timeline}")["local"]
        return local

    def last_record_lsn(self, tenant: TenantId, timeline: TimelineId) -> Lsn:
        """End of the last record ingested."""
        return Lsn.parse(self.local(tenant, timeline)["last_record_lsn"])

    def connect(self) -> PqConnection:
        """A connection to the page service."""
        return connect("127.0.0.1", self.pg_port, user="no_user", timeout=10)

    def query(self, text: str) -> list[list[bytes | None]]:
        """Rows of one command."""
        with contextlib.closing(self.connect()) as conn:
            return conn.simple_query(text)

    def basebackup(self, tenant: TenantId, timeline: TimelineId, lsn: Lsn | None = None) -> bytes:
        """The tar stream of a base backup."""
        with contextlib.closing(self.connect()) as conn:
            suffix = f" {lsn}" if lsn is not None else ""
            return b"".join(conn.copy_out(f"basebackup {tenant} {timeline}{suffix}"))


class PageClient:
    """Client of the pagestream protocol."""

    def __init__(self, server: Pageserver, tenant: TenantId, timeline: TimelineId) -> None:
        self.conn = server.connect()
        self.conn.start_copy_both(f"pagestream {tenant} {timeline}")

    def close(self) -> None:
        """Ends the connection."""
        self.conn.close()

    def ask(self, request: bytes) -> bytes:
        """Sends one request and waits for the reply."""
        self.conn.send_copy_data(request)
        reply = self.conn.recv_copy_data(timeout=DEADLINE)
        assert reply is not None
        return bytes(reply)

    def exists(self, rel: RelTag, lsn: int, *, latest: bool = False) -> bool:
        """Whether the fork exists."""
        reply = self.ask(struct.pack(">BBQIIIB", 0, latest, lsn, *rel))
        assert reply[0] == 100 and len(reply) == 2, reply
        return bool(reply[1])

    def nblocks(self, rel: RelTag, lsn: int, *, latest: bool = False) -> int:
        """Blocks of the fork."""
        reply = self.ask(struct.pack(">BBQIIIB", 1, latest, lsn, *rel))
        assert reply[0] == 101 and len(reply) == 5, reply
        return int.from_bytes(reply[1:], "big")

    def page(self, rel: RelTag, blkno: int, lsn: int, *, latest: bool = False) -> bytes:
        """One page."""
        reply = self.ask(struct.pack(">BBQIIIBI", 2, latest, lsn, *rel, blkno))
        assert reply[0] == 102 and len(reply) == 8193, reply[:200]
        return reply[1:]

    def pages(self, rel: RelTag, blkno: int, count: int, lsn: int) -> bytes:
        """Consecutive pages in one request."""
        reply = self.ask(struct.pack(">BBQIIIBII", 10, 0, lsn, *rel, blkno, count))
        assert reply[:5] == struct.pack(">BI", 110, count), reply[:200]
        assert len(reply) == 5 + count * 8192
        return reply[5:]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of zenith.manifest."""

    base_lsn: Lsn
    checksums: bool
    sizes: Mapping[RelTag, int]


def parse_manifest(data: bytes) -> Manifest:
    (crc,) = struct.unpack("<I", data[-4:])
    assert crc == crc32c(data[:-4])
    magic, base_lsn, count, flags = struct.unpack_from("<8sQII", data)
    assert magic == b"ZNMANIF1"
    assert len(data) == 24 + 24 * count + 4
    sizes = {}
    for entry in struct.iter_unpack("<6I", data[24:-4]):
        assert entry[5] == 0
        sizes[RelTag(*entry[:4])] = entry[4]
    assert list(sizes) == sorted(sizes)
    return Manifest(Lsn(base_lsn), bool(flags & 1), sizes)


def tar_files(archive: bytes) -> dict[str, bytes | None]:
    """Content by name of a tar stream; None for directories."""
    files: dict[str, bytes | None] = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        for member in tar:
            assert member.name not in files, f"{member.name} is in the archive twice"
            stream = tar.extractfile(member)
            files[member.name] = stream.read() if stream is not None else None
    return files


def materialise(archive: bytes, target: Path, client: PageClient, distrib: PgDistrib) -> Manifest:
    """A complete data directory: the base backup with all relation files fetched from storage."""
    files = tar_files(archive)
    data = files.pop("zenith.manifest")
    assert data is not None
    assert files.pop("zenith.startup_blocks")
    manifest = parse_manifest(data)
    target.mkdir(mode=0o700)
    for name, content in files.items():
        path = target / name
        if content is None:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            path.write_bytes(content)
    for rel, nblocks in manifest.sizes.items():
        assert nblocks < BLOCKS_PER_SEGMENT
        path = target / relpath(rel, distrib.version)
        assert not path.exists(), f"{rel} is both in the archive and in the manifest"
        with path.open("wb") as file:
            for blkno in range(0, nblocks, 256):
                count = min(256, nblocks - blkno)
                file.write(client.pages(rel, blkno, count, manifest.base_lsn))
    give(target, recursive=True)
    return manifest


class Postgres:
    """A stock server on a data directory."""

    def __init__(self, distrib: PgDistrib, datadir: Path, settings: Mapping[str, str]) -> None:
        self.distrib = distrib
        self.datadir = datadir
        self.port = free_port()
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "port": str(self.port),
            "fsync": "off",
            "full_page_writes": "off",
            "dynamic_shared_memory_type": "mmap",
            "shared_buffers": "16MB",
            "allow_in_place_tablespaces": "on",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server and waits until it takes connections."""
        config = self.datadir / "postgresql.conf"
        config.write_text("".join(f"{k} = '{v}'\n" for k, v in self._settings.items()))
        give(config)
        log_path = self.datadir.with_suffix(".log")
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self.distrib.bin_dir / "postgres"), "-D", str(self.datadir)],
                stdout=log,
                stderr=log,
                cwd="/",
                **popen_kwargs(),
            )

        def ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, log_path.read_text()
            with contextlib.suppress(psycopg2.OperationalError):
                self.connect().close()
                return True
            return False

        wait_until(ready, "postgres to take connections")

    def connect(self, database: str = "postgres") -> Any:
        """A connection in autocommit mode."""
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user="zenith_admin", dbname=database
        )
        connection.autocommit = True
        return connection

    def execute(self, *statements: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Rows of the last statement."""
        with contextlib.closing(self.connect(database)) as connection:
            cursor = connection.cursor()
            for statement in statements:
                cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def conninfo(self) -> str:
        """Connection string of the server."""
        return f"host=127.0.0.1 port={self.port} user=zenith_admin dbname=postgres"

    def tool(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a client program against the server."""
        return subprocess.run(
            [
                str(self.distrib.bin_dir / name),
                *("-h", "127.0.0.1", "-p", str(self.port), "-U", "zenith_admin"),
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env={"PATH": os.environ["PATH"]},
        )

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: fast shutdown; SIGQUIT: at once."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(DEADLINE)
            self._process = None


def settings_for(tenant: TenantId, timeline: TimelineId, **more: str) -> dict[str, str]:
    """Settings of a compute that streams to the pageserver itself."""
    return {
        "zenith.zenith_tenant": str(tenant),
        "zenith.zenith_timeline": str(timeline),
        "wal_keep_size": "1GB",
        **more,
    }


@dataclass(frozen=True)
class Root:
    """A pageserver with one fresh timeline."""

    server: Pageserver
    tenant: TenantId
    timeline: TimelineId
    lsn: Lsn

    @contextlib.contextmanager
    def pages(self) -> Iterator[PageClient]:
        """A page client of the timeline."""
        client = PageClient(self.server, self.tenant, self.timeline)
        try:
            yield client
        finally:
            client.close()


@contextlib.contextmanager
def running(*overrides: str) -> Iterator[Root]:
    """A pageserver of its own with a fresh timeline."""
    with scratch_directory() as path:
        server = Pageserver(path / "ps", "wait_lsn_timeout='1 s'", *overrides)
        server.start()
        try:
            tenant = server.create_tenant()
            timeline = server.create_timeline(tenant)
            yield Root(server, tenant, timeline, server.last_record_lsn(tenant, timeline))
        finally:
            server.stop(signal.SIGKILL)


def template_files(distrib: PgDistrib, *options: str) -> dict[tuple[RelTag, int], bytes]:
    """Relation files of the cluster that timelines are made from."""
    datadir = template_cluster(distrib, "zenith_admin", options)
    files = {}
    for path in datadir.rglob("*"):
        parsed = parse_relpath(str(path.relative_to(datadir)), distrib.version)
        if parsed is not None and path.is_file():
            files[parsed] = path.read_bytes()
    return files
