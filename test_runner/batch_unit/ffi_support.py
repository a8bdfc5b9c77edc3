"""Stock servers for the tests of Postgres' formats."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import psycopg2.extensions

from postgres_ffi.control_file import ControlFile, parse_control_file
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.distrib import PgDistrib, find_distrib
from postgres_ffi.wal_decoder import WalDecodeError, WalDecoder
from zenith_utils.os_user import popen_kwargs

SETTINGS = """
listen_addresses = ''
fsync = off
wal_level = logical
wal_log_hints = on
wal_keep_size = 1GB
max_prepared_transactions = 10
max_connections = 30
autovacuum = off
allow_in_place_tablespaces = on
wal_compression = off
log_min_messages = log
"""


class Server:
    """A data directory with a stock server that can be started on it."""

    def __init__(self, distrib: PgDistrib, datadir: Path) -> None:
        self.distrib = distrib
        self.datadir = datadir

    def run(self, program: str, *arguments: object) -> str:
        """Output of one of Postgres' programs; fails with what it wrote to stderr."""
        result = subprocess.run(
            [self.distrib.binary(program), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
            **popen_kwargs(),
        )
        assert result.returncode == 0, f"{program}: {result.stderr}{result.stdout}"
        return result.stdout

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start it, and stop it cleanly at the end."""
        log = self.datadir / "server.log"
        sockets = f"-c unix_socket_directories={self.datadir}"
        self.run("pg_ctl", "-w", "-D", self.datadir, "-l", log, "-o", sockets, "start")
        try:
            yield
        finally:
            self.run("pg_ctl", "-w", "-D", self.datadir, "-m", "fast", "stop")

    def connect(self) -> psycopg2.extensions.connection:
        """A connection in autocommit mode."""
        connection = psycopg2.connect(host=str(self.datadir), user="postgres", dbname="postgres")
        connection.autocommit = True
        return connection

    def control(self) -> ControlFile:
        """Its pg_control."""
        return parse_control_file((self.datadir / "global/pg_control").read_bytes())


def make_server(datadir: Path) -> Server:
    """A new cluster with checksums that is not running."""
    server = Server(find_distrib(), datadir)
    server.run("initdb", "-k", "-A", "trust", "-U", "postgres", "--no-sync", "-D", datadir)
    with (datadir / "postgresql.conf").open("a") as conf:
        conf.write(SETTINGS)
    return server


def execute(server: Server, *statements: str) -> list[tuple[object, ...]]:
    """Run statements one by one on one connection; the rows of the last one."""
    with contextlib.closing(server.connect()) as connection:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def decode(decoder: WalDecoder, wal: bytes, chunk: int) -> list[DecodedRecord]:
    """Records up to the first that is not valid, fed in pieces of `chunk` bytes."""
    records = []
    with contextlib.suppress(WalDecodeError):
        for offset in range(0, len(wal), chunk):
            decoder.feed(wal[offset : offset + chunk])
            while (record := decoder.next_record()) is not None:
                records.append(record)
    return records
