"""A stock server on lazily opened files, and a page server that serves a stopped data directory."""

import contextlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import psycopg2
import psycopg2.extensions

from compute_tools.lazy_map import MANIFEST_MAGIC, create_lazy_files, lazyfiles_environment
from pgxn.build import build_module
from postgres_ffi.distrib import PgDistrib, find_distrib
from zenith_utils.crc32c import crc32c
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.os_user import give, popen_kwargs, postgres_user

BLOCK_SIZE = 8192
SEGMENT_BLOCKS = 131072
BASE_LSN = 0x1_0000_0028
PORT = 5432  # of the servers, on Unix sockets in directories of their own
TENANT = TenantId.parse("11" * 16)
TIMELINE = TimelineId.parse("22" * 16)
FORKS = {"": 0, "_fsm": 1, "_vm": 2, "_init": 3}
SUFFIXES = {number: suffix for suffix, number in FORKS.items()}

_RELATION = re.compile(r"(\d+)(_fsm|_vm|_init)?(?:\.(\d+))?")

# A compute's settings: its directory is disposable.
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "restart_after_crash": "off",
    "autovacuum": "off",
    "shared_buffers": "1MB",
    "dynamic_shared_memory_type": "mmap",
    "listen_addresses": "",
    "max_wal_senders": "4",
    "min_wal_size": "32MB",
    "max_wal_size": "64MB",
    "log_min_messages": "warning",
}


@dataclass(frozen=True, order=True)
class Fork:
    """A relation fork as a manifest has it."""

    spcnode: int
    dbnode: int
    relnode: int
    forknum: int


def fork_path(root: Path, fork: Fork, segment: int = 0) -> Path:
    directory = root / ("global" if fork.spcnode == 1664 else f"base/{fork.dbnode}")
    suffix = f".{segment}" if segment else ""
    return directory / f"{fork.relnode}{SUFFIXES[fork.forknum]}{suffix}"


def relation_files(root: Path) -> Iterator[tuple[Path, Fork, int]]:
    """Every relation file of a data directory with its fork and segment number."""
    places = [(1664, 0, root / "global")]
    places += [(1663, int(d.name), d) for d in (root / "base").iterdir() if d.name.isdigit()]
    for spcnode, dbnode, directory in places:
        for path in directory.iterdir():
            match = _RELATION.fullmatch(path.name)
            if match is not None:
                fork = Fork(spcnode, dbnode, int(match[1]), FORKS[match[2] or ""])
                yield path, fork, int(match[3] or 0)


def fork_sizes(root: Path) -> dict[Fork, int]:
    """Size in blocks of every fork of a data directory."""
    sizes: dict[Fork, int] = {}
    for path, fork, segment in relation_files(root):
        end = segment * SEGMENT_BLOCKS + path.stat().st_size // BLOCK_SIZE
        sizes[fork] = max(sizes.get(fork, 0), end)
    return sizes


def make_manifest(sizes: Mapping[Fork, int], base_lsn: int = BASE_LSN) -> bytes:
    body = MANIFEST_MAGIC + struct.pack("<QII", base_lsn, len(sizes), 0)
    for fork, blocks in sorted(sizes.items()):
        numbers = (fork.spcnode, fork.dbnode, fork.relnode, fork.forknum, blocks, 0)
        body += struct.pack("<6I", *numbers)
    return body + crc32c(body).to_bytes(4, "little")


def make_startup_blocks(blocks: Mapping[tuple[Fork, int], bytes]) -> bytes:
    body = b""
    for (fork, block), page in blocks.items():
        body += struct.pack("<5I", fork.spcnode, fork.dbnode, fork.relnode, fork.forknum, block)
        body += page
    return body + crc32c(body).to_bytes(4, "little")


def make_lazy_copy(
    source: Path, target: Path, map_path: Path, startup: Mapping[tuple[Fork, int], bytes] = {}
) -> None:
    """Copy a stopped data directory; its relation files become names and sizes."""
    lazy = {path for path, _, _ in relation_files(source)}

    def ignored(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(directory, name) in lazy]

    shutil.copytree(source, target, ignore=ignored)
    give(target, recursive=True)
    target.chmod(0o700)
    manifest = make_manifest(fork_sizes(source))
    create_lazy_files(
        target, map_path, manifest, make_startup_blocks(startup), owner=postgres_user()
    )


@dataclass
class Faults:
    """What the page server does wrong; may be changed while it runs."""

    delay: float = 0.0
    """Seconds before each reply."""
    refuse: Callable[[Fork, int], str | None] = lambda fork, block: None
    """Message of the error reply for a block, if there is to be one."""
    drop_after: int | None = None
    """Requests after which the connection is cut in the middle of a reply, once."""
    password: str | None = None
    hold_from: int | None = None
    """Replies to requests that begin at this block or a later one wait for `released`."""
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class PageServer:
    """Serves blocks of a data directory with the `pagestream` protocol, a thread per connection."""

    root: Path
    faults: Faults = field(default_factory=Faults)
    port: int = 0
    requests: list[tuple[Fork, int, int]] = field(default_factory=list)
    _listener: socket.socket | None = None
    _connections: set[socket.socket] = field(default_factory=set)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._run(self._accept, listener)

    def stop(self) -> None:
        """Stop listening and cut all connections."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        for sock in (listener, *self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.faults.released.set()
        listener.close()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def __enter__(self) -> "PageServer":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _run(self, target: Callable[[socket.socket], None], sock: socket.socket) -> None:
        thread = threading.Thread(target=target, args=(sock,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.add(connection)
            self._run(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            stream = connection.makefile("rb")
            _exactly(stream, struct.unpack("!I", _exactly(stream, 4))[0] - 4)
            if self.faults.password is not None:
                connection.sendall(_message(b"R", struct.pack("!I", 3)))
                _, body = _read_message(stream)
                if body != self.faults.password.encode() + b"\0":
                    connection.sendall(_message(b"E", b"SFATAL\0Mwrong password\0\0"))
                    return
            connection.sendall(_message(b"R", bytes(4)) + _message(b"Z", b"I"))
            _, body = _read_message(stream)
            if body != f"pagestream {TENANT} {TIMELINE}\0".encode():
                connection.sendall(_message(b"E", b"SERROR\0Munknown command\0\0"))
                return
            connection.sendall(_message(b"W", bytes(3)))
            while True:
                kind, body = _read_message(stream)
                if kind != b"d":
                    return
                self._reply(connection, body)
        self._connections.discard(connection)

    def _reply(self, connection: socket.socket, body: bytes) -> None:
        tag, latest, lsn, spc, db, rel, forknum, block, count = struct.unpack("!BBQIIIBII", body)
        if (tag, latest, lsn) != (10, 0, BASE_LSN):
            raise EOFError
        fork = Fork(spc, db, rel, forknum)
        self.requests.append((fork, block, count))
        if self.faults.hold_from is not None and block >= self.faults.hold_from:
            self.faults.released.wait()
        if self.faults.delay:
            time.sleep(self.faults.delay)
        for b in range(block, block + count):
            refusal = self.faults.refuse(fork, b)
            if refusal is not None:
                connection.sendall(_message(b"d", b"\x67" + refusal.encode() + b"\0"))
                return
        pages = self._read(fork, block, count)
        reply = _message(b"d", struct.pack("!BI", 110, count) + pages)
        if self.faults.drop_after is not None:
            self.faults.drop_after -= 1
            if self.faults.drop_after < 0:
                self.faults.drop_after = None
                connection.sendall(reply[: len(reply) // 2])
                connection.shutdown(socket.SHUT_RDWR)
                raise EOFError
        connection.sendall(reply)

    def _read(self, fork: Fork, block: int, count: int) -> bytes:
        pages = b""
        while count > 0:
            segment, offset = divmod(block, SEGMENT_BLOCKS)
            n = min(count, SEGMENT_BLOCKS - offset)
            with fork_path(self.root, fork, segment).open("rb") as f:
                f.seek(offset * BLOCK_SIZE)
                pages += f.read(n * BLOCK_SIZE).ljust(n * BLOCK_SIZE, b"\0")
            block, count = block + n, count - n
        return pages


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _read_message(stream: BinaryIO) -> tuple[bytes, bytes]:
    header = _exactly(stream, 5)
    return header[:1], _exactly(stream, struct.unpack("!I", header[1:])[0] - 4)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


@dataclass
class Postgres:
    """A stock server, on a Unix socket in its own directory."""

    distrib: PgDistrib
    datadir: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket_dir(self) -> Path:
        """Where the server's Unix socket is."""
        return self.datadir.parent

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.datadir.parent / f"{self.datadir.name}.log"

    def start(self) -> "Postgres":
        """Start, and wait until it accepts connections; RuntimeError if it ends instead."""
        arguments = {**SETTINGS, "unix_socket_directories": str(self.socket_dir), **self.settings}
        options = [part for name, value in arguments.items() for part in ("-c", f"{name}={value}")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.distrib.binary("postgres"), "-D", self.datadir, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", **self.environment},
                **popen_kwargs(),
            )
        try:
            wait_for(self._answers, "the server to start", self._diagnose)
        except BaseException:
            self.stop(signal.SIGQUIT)
            raise
        return self

    def __enter__(self) -> "Postgres":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop(signal.SIGQUIT)

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{self._diagnose()}")
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def _diagnose(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def connect(
        self, database: str = "postgres", options: str = ""
    ) -> psycopg2.extensions.connection:
        """A session in autocommit mode."""
        connection = psycopg2.connect(
            host=str(self.socket_dir),
            port=PORT,
            user="postgres",
            dbname=database,
            options=options,
        )
        connection.autocommit = True
        return connection

    def sql(self, *statements: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run statements one by one in one session; rows of the last one, if it gives any."""
        with contextlib.closing(self.connect(database)) as session, session.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def value(self, query: str, database: str = "postgres") -> object:
        """The one value that a query gives."""
        return self.sql(query, database=database)[0][0]

    def run(self, program: str, *arguments: str) -> str:
        """Output of a client program; an error if it fails."""
        command = [self.distrib.binary(program), "-h", self.socket_dir, "-p", str(PORT)]
        done = subprocess.run(
            [*map(str, command), "-U", "postgres", *arguments],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """Shut down (SIGINT fast, SIGQUIT immediate); returns the exit status."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        if process.poll() is None:
            process.send_signal(how)
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            return process.wait(timeout=30)


def wait_for(
    condition: Callable[[], bool], what: str, diagnose: Callable[[], str] = lambda: ""
) -> None:
    """Wait until a condition holds; fails after half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}\n{diagnose()}"
        time.sleep(0.01)


def initdb(distrib: PgDistrib, datadir: Path) -> None:
    command = [distrib.binary("initdb"), "-D", datadir, "-U", "postgres", "-N", "-A", "trust"]
    subprocess.run(
        [*map(str, command), "--locale=C", "-E", "UTF8"],
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin"},
        **popen_kwargs(),
    )


def lazy_environment(module: Path, map_path: Path, port: int) -> dict[str, str]:
    return lazyfiles_environment(
        module, map_path, pageserver=("127.0.0.1", port), tenant_id=TENANT, timeline_id=TIMELINE
    )


@contextlib.contextmanager
def server_directory() -> Iterator[Path]:
    """A directory for servers: theirs, and not below pytest's, which only we may enter."""
    with tempfile.TemporaryDirectory(prefix="zenith-", ignore_cleanup_errors=True) as name:
        give(Path(name))
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def stopped_cluster(*statements: str) -> Iterator[Path]:
    """A data directory to be copied, of a server that ran statements and was shut down."""
    with server_directory() as root:
        distrib = find_distrib()
        initdb(distrib, root / "data")
        with Postgres(distrib, root / "data") as postgres:
            postgres.sql("SELECT 1", *statements)
            postgres.stop()
        yield root / "data"


@contextlib.contextmanager
def library_node(template: Path) -> Iterator[Postgres]:
    """A stopped server on a copy of a data directory that preloads the zenith library."""
    with server_directory() as root:
        shutil.copytree(template, root / "node")
        give(root / "node", recursive=True)
        distrib = find_distrib()
        settings = {"shared_preload_libraries": str(build_module(distrib, "zenith"))}
        postgres = Postgres(distrib, root / "node", settings)
        try:
            yield postgres
        finally:
            postgres.stop(signal.SIGQUIT)
