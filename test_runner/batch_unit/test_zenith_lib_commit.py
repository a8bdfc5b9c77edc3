"""The zenith library: a commit is never acknowledged before the synchronous standby has it."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest
from batch_unit.lazyfiles_support import PORT, Postgres, initdb, server_directory, wait_for
from fixtures.utils import process_exists

from pgxn.build import build_module
from postgres_ffi.distrib import find_distrib
from zenith_utils.os_user import popen_kwargs

ASYNC = "SET synchronous_commit = off"


@dataclass
class Statement:
    """A statement that runs in a session of its own, in a thread."""

    connection: psycopg2.extensions.connection
    query: str
    error: Exception | None = None
    finished: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            with self.connection.cursor() as cursor:
                cursor.execute(self.query)
        except Exception as e:
            self.error = e
        self.finished.set()

    @property
    def pid(self) -> int:
        """The backend's process id."""
        return self.connection.get_backend_pid()

    def join(self) -> Exception | None:
        """Wait for the end; the error, if it failed."""
        assert self.finished.wait(30), "the statement does not end"
        return self.error


@dataclass
class Primary:
    """A server whose commits need a standby, and the standby, which may be away."""

    postgres: Postgres
    wal: Path
    receiver: subprocess.Popen[bytes] | None = None

    def connect_standby(self) -> None:
        """Let the standby appear: commits are confirmed from now on."""
        self.receiver = subprocess.Popen(
            [
                self.postgres.distrib.binary("pg_receivewal"),
                *("-D", str(self.wal), "--synchronous", "--no-loop"),
                *("-h", str(self.postgres.socket_dir), "-p", str(PORT)),
                *("-U", "postgres"),
            ],
            env={"PATH": "/usr/bin:/bin", "PGAPPNAME": "walproposer"},
            stderr=subprocess.DEVNULL,
            **popen_kwargs(),
        )

    def stop_standby(self) -> None:
        """End the standby's process, if it runs."""
        if self.receiver is not None:
            self.receiver.send_signal(signal.SIGINT)
            self.receiver.wait()
            self.receiver = None

    def disconnect_standby(self) -> None:
        """Let it go, and wait until the server has noticed."""
        self.stop_standby()
        wait_for(lambda: self.postgres.value("SELECT count(*) FROM pg_stat_replication") == 0, "")

    def wait_in_commit(self, statement: Statement) -> None:
        """Until the statement's backend waits for the standby."""
        query = f"SELECT wait_event FROM pg_stat_activity WHERE pid = {statement.pid}"
        wait_for(lambda: self.postgres.value(query) == "SyncRep", "the commit to wait")

    def cancel(self, statement: Statement, times: int = 5) -> None:
        """Cancel a statement whose commit waits, and see it go on waiting."""
        for _ in range(times):
            self.postgres.sql(f"SELECT pg_cancel_backend({statement.pid})")
            assert not statement.finished.wait(0.05), "the commit stopped waiting"
        self.wait_in_commit(statement)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    distrib = find_distrib()
    settings = {
        "shared_preload_libraries": str(build_module(distrib, "zenith")),
        "wal_level": "replica",
        "max_prepared_transactions": "2",
        "log_min_messages": "fatal",
    }
    with server_directory() as root:
        initdb(distrib, root / "data")
        conf = root / "data/postgresql.conf"
        conf.write_text(conf.read_text() + "synchronous_standby_names = walproposer\n")
        with Postgres(distrib, root / "data", settings) as postgres:
            yield postgres


@pytest.fixture
def primary(server: Postgres) -> Iterator[Primary]:
    if server.process is None:
        server.start()
    server.sql(ASYNC, "DROP TABLE IF EXISTS t", "CREATE TABLE t (i int)")
    with server_directory() as wal:
        primary = Primary(server, wal)
        yield primary
        primary.stop_standby()


@pytest.mark.parametrize("log_level", ["warning", "error", "panic", "log"])
def test_cancelled_commit_goes_on_waiting(primary: Primary, log_level: str) -> None:
    connection = primary.postgres.connect(options=f"-c log_min_messages={log_level}")
    with contextlib.closing(connection):
        statement = Statement(connection, "INSERT INTO t VALUES (1)")
        primary.wait_in_commit(statement)
        primary.cancel(statement)
        primary.connect_standby()
        assert statement.join() is None
        assert connection.notices == []
        # The cancels were for the statement that is done.
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM t, pg_sleep(0.1)")
            assert cursor.fetchone() == (1,)


def test_statement_timeout_in_commit_wait(primary: Primary) -> None:
    with contextlib.closing(primary.postgres.connect()) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SET statement_timeout = '2s'")
        statement = Statement(connection, "INSERT INTO t VALUES (1)")
        primary.wait_in_commit(statement)
        assert not statement.finished.wait(3), "the commit stopped waiting"
        primary.connect_standby()
        assert statement.join() is None
        assert connection.notices == []


def test_prepared_transaction_waits_too(primary: Primary) -> None:
    postgres = primary.postgres
    with contextlib.closing(postgres.connect()) as connection:
        for query in ("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'p'",
                      "COMMIT PREPARED 'p'"):  # fmt: skip
            statement = Statement(connection, query)
            primary.wait_in_commit(statement)
            primary.cancel(statement)
            primary.connect_standby()
            assert statement.join() is None
            primary.disconnect_standby()
        assert connection.notices == []
        assert postgres.value("SELECT count(*) FROM t") == 1


def test_cancel_stops_a_procedure_after_its_commit(primary: Primary) -> None:
    postgres = primary.postgres
    postgres.sql(
        ASYNC,
        "CREATE OR REPLACE PROCEDURE two() LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO t VALUES (1); COMMIT; INSERT INTO t VALUES (2); COMMIT; END $$",
    )
    with contextlib.closing(postgres.connect()) as connection:
        statement = Statement(connection, "CALL two()")
        primary.wait_in_commit(statement)
        primary.cancel(statement, times=1)
        primary.connect_standby()
        assert isinstance(statement.join(), psycopg2.errors.QueryCanceled)
        assert postgres.sql("SELECT i FROM t") == [(1,)]


def test_terminated_commit_tells_the_client_nothing(primary: Primary) -> None:
    with contextlib.closing(primary.postgres.connect()) as connection:
        statement = Statement(connection, "INSERT INTO t VALUES (1)")
        primary.wait_in_commit(statement)
        primary.postgres.sql(f"SELECT pg_terminate_backend({statement.pid})")
        error = statement.join()
        assert isinstance(error, psycopg2.OperationalError)
        assert "server closed the connection unexpectedly" in str(error)
        assert connection.notices == []


def test_cancelled_then_terminated(primary: Primary) -> None:
    with contextlib.closing(primary.postgres.connect()) as connection:
        statement = Statement(connection, "INSERT INTO t VALUES (1)")
        primary.wait_in_commit(statement)
        primary.cancel(statement)
        primary.postgres.sql(f"SELECT pg_terminate_backend({statement.pid})")
        assert isinstance(statement.join(), psycopg2.OperationalError)
        assert connection.notices == []


def test_fast_shutdown_ends_waiting_commits_without_success(primary: Primary) -> None:
    with contextlib.closing(primary.postgres.connect()) as connection:
        statement = Statement(connection, "INSERT INTO t VALUES (1)")
        primary.wait_in_commit(statement)
        assert primary.postgres.stop() == 0
        assert isinstance(statement.join(), psycopg2.OperationalError)
        assert connection.notices == []


def test_death_of_the_postmaster_ends_a_cancelled_commit(primary: Primary) -> None:
    with contextlib.closing(primary.postgres.connect()) as connection:
        statement = Statement(connection, "INSERT INTO t VALUES (1)")
        primary.wait_in_commit(statement)
        primary.cancel(statement)
        pid = statement.pid
        primary.postgres.stop(signal.SIGKILL)
        assert isinstance(statement.join(), psycopg2.OperationalError)
        wait_for(lambda: not process_exists(pid), "the backend to end")
    _wait_for_children_to_end(primary.postgres)


def _extended_insert(postgres: Postgres) -> tuple[socket.socket, int]:
    """A client whose insert, in the extended protocol, waits; its socket and backend.

    CommandComplete precedes the commit there: it lies in the backend's output buffer.
    """

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack(">I", len(body) + 4) + body

    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(f"{postgres.socket_dir}/.s.PGSQL.{PORT}")
    startup = struct.pack(">I", 3 << 16) + b"user\0postgres\0database\0postgres\0\0"
    sock.sendall(struct.pack(">I", len(startup) + 4) + startup)
    greeting = b""
    while not greeting.endswith(message(b"Z", b"I")):
        greeting += sock.recv(4096)
    key = greeting.index(message(b"K", bytes(8))[:5])
    sock.sendall(
        message(b"P", b"\0INSERT INTO t VALUES (1)\0\0\0")
        + message(b"B", bytes(8))
        + message(b"E", b"\0" + bytes(4))
        + message(b"S", b"")
    )
    return sock, struct.unpack_from(">I", greeting, key + 5)[0]


def _rest(sock: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(4096):
            received += data
    return received


@pytest.mark.parametrize("how", ["postmaster", "backend", "terminate"])
def test_nothing_is_flushed_at_the_end(primary: Primary, how: str) -> None:
    """An immediate shutdown, SIGQUIT out of the blue, terminate: the buffered success stays."""
    postgres = primary.postgres
    sock, pid = _extended_insert(postgres)
    with sock:
        query = f"SELECT wait_event FROM pg_stat_activity WHERE pid = {pid}"
        wait_for(lambda: postgres.value(query) == "SyncRep", "the commit to wait")
        if how == "postmaster":
            postgres.stop(signal.SIGQUIT)
        elif how == "backend":
            os.kill(pid, signal.SIGQUIT)
        else:
            postgres.sql(f"SELECT pg_terminate_backend({pid})")
        assert b"INSERT" not in _rest(sock)
    if how == "backend":
        assert postgres.process is not None
        postgres.process.wait(30)
        postgres.stop()


def test_local_is_on(primary: Primary) -> None:
    """What promises to survive a crash of this server needs the standby here."""
    with contextlib.closing(primary.postgres.connect()) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = local")
            assert "is taken as" in connection.notices[0]
            cursor.execute("SHOW synchronous_commit")
            assert cursor.fetchone() == ("on",)
            cursor.execute(
                "BEGIN; ALTER ROLE CURRENT_USER SET synchronous_commit = local; ROLLBACK"
            )
            assert len(connection.notices) == 1
        statement = Statement(connection, "INSERT INTO t VALUES (1)")
        primary.wait_in_commit(statement)
        primary.connect_standby()
        assert statement.join() is None


def test_subscription_confirms_what_the_standby_has(primary: Primary) -> None:
    """With its default, off, the publisher would forget what may be lost here."""
    postgres = primary.postgres
    with server_directory() as root:
        initdb(postgres.distrib, root / "data")
        settings = {"wal_level": "logical"}
        with Postgres(postgres.distrib, root / "data", settings) as publisher:
            publisher.sql("CREATE TABLE t (i int)")
            publisher.sql("CREATE PUBLICATION p FOR TABLE t")
            postgres.sql(
                ASYNC,
                f"CREATE SUBSCRIPTION s CONNECTION 'host={publisher.socket_dir} port={PORT} "
                "user=postgres dbname=postgres' PUBLICATION p WITH (copy_data = false)",
            )
            publisher.sql("INSERT INTO t VALUES (1)")
            end = publisher.value("SELECT pg_current_wal_lsn()")
            worker = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' "
                "AND backend_type = 'logical replication worker'"
            )
            wait_for(lambda: postgres.value(worker) == 1, "the worker's commit to wait")
            confirmed = f"SELECT confirmed_flush_lsn >= '{end}' FROM pg_replication_slots"
            assert publisher.value(confirmed) is False
            primary.connect_standby()
            wait_for(lambda: publisher.value(confirmed) is True, "the confirmation")
            primary.disconnect_standby()
            postgres.sql(ASYNC, "ALTER SUBSCRIPTION s DISABLE")
            postgres.sql(ASYNC, "ALTER SUBSCRIPTION s SET (slot_name = NONE)")
            postgres.sql(ASYNC, "DROP SUBSCRIPTION s")


def test_synchronous_standby_names_cannot_be_reset(primary: Primary) -> None:
    postgres = primary.postgres
    with contextlib.closing(postgres.connect()) as connection:
        statement = Statement(connection, "INSERT INTO t VALUES (1)")
        primary.wait_in_commit(statement)
        with pytest.raises(psycopg2.errors.CantChangeRuntimeParam):
            postgres.sql("ALTER SYSTEM SET synchronous_standby_names = ''")
        conf = postgres.datadir / "postgresql.conf"
        text = conf.read_text()
        # A line that changes tells when the reload has been processed.
        conf.write_text(text.replace("= walproposer", "= ''") + "work_mem = 1234kB\n")
        try:
            postgres.sql("SELECT pg_reload_conf()")
            wait_for(lambda: postgres.value("SHOW work_mem") == "1234kB", "the reload")
            assert postgres.value("SHOW synchronous_standby_names") == "walproposer"
            assert not statement.finished.wait(0.2), "the reload released the commit"
        finally:
            conf.write_text(text)
            postgres.sql("SELECT pg_reload_conf()")
        primary.connect_standby()
        assert statement.join() is None


def _wait_for_children_to_end(postgres: Postgres) -> None:
    """After SIGKILL of the postmaster its children go by themselves; then it may start again."""

    def gone() -> bool:
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cwd").readlink() == postgres.datadir:
                    return False
        return True

    wait_for(gone, "the server's processes to end")
    (postgres.datadir / "postmaster.pid").unlink(missing_ok=True)
