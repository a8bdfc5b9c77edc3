"""The proxy in front of real servers: logins, sessions, cancel requests, TLS, faults."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import random
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg2
import pytest
from fixtures.certificate import write_certificate
from fixtures.pg_protocol import PgBin, VanillaPostgres
from fixtures.ports import PortDistributor
from fixtures.proxy import ZenithProxy, require_password
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnvBuilder

MIB = 1 << 20
BIG = 24 * MIB


def running(vanilla: VanillaPostgres, query: str) -> bool:
    """Whether some session is executing a query."""
    text = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = '%s'"
    return bool(vanilla.safe_psql(text % query)[0][0])


def sessions(vanilla: VanillaPostgres) -> int:
    """How many sessions of pytest the server has."""
    text = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'pytest'"
    return int(vanilla.safe_psql(text)[0][0])


async def many_clients(proxy: ZenithProxy) -> list[list[int]]:
    """60 clients, each of which asks 20 times for a number of its own; what they got, less `n`."""

    async def client(number: int) -> list[int]:
        conn = await proxy.connect_async()
        try:
            answers = [await conn.fetchval("SELECT $1::int", number + n) for n in range(20)]
            return [answer - n for n, answer in enumerate(answers)]
        finally:
            await conn.close()

    return await asyncio.gather(*map(client, range(60)))


def test_session(static_proxy: ZenithProxy, vanilla_pg: VanillaPostgres) -> None:
    """Drivers find what they expect of a server, and it is the server behind the proxy."""
    with contextlib.closing(static_proxy.connect()) as conn:
        assert conn.get_parameter_status("client_encoding") == "UTF8"
        expected = vanilla_pg.safe_psql("SHOW server_version")[0][0]
        assert conn.get_parameter_status("server_version") == expected
        assert conn.get_parameter_status("standard_conforming_strings") == "on"
        with conn.cursor() as cursor:
            cursor.execute("SELECT current_user, current_database(), 'ä€😀'")
            assert cursor.fetchall() == [("pytest", "postgres", "ä€😀")]
            with pytest.raises(psycopg2.errors.DivisionByZero):
                cursor.execute("SELECT 1 / 0")
            cursor.execute("SELECT 1")

    async def ask() -> Any:
        conn = await static_proxy.connect_async()
        try:
            return await conn.fetchval("SELECT $1::int + 1", 41)
        finally:
            await conn.close()

    assert asyncio.run(ask()) == 42
    # Many that come at once get in, and each gets its own answers.
    assert asyncio.run(many_clients(static_proxy)) == [[number] * 20 for number in range(60)]
    wait_until(lambda: sessions(vanilla_pg) == 0, what="the server's sessions to end")


def test_options_reach_the_server(static_proxy: ZenithProxy) -> None:
    """What a client says when it connects is what it would be without the proxy."""
    query = (
        "SELECT current_setting('work_mem'), current_setting('search_path'), "
        "current_setting('application_name'), current_setting('client_encoding')"
    )
    connstr = (
        static_proxy.connstr(schema="pg_toast") + " application_name=job client_encoding=LATIN1"
    )
    with contextlib.closing(psycopg2.connect(connstr)) as conn, conn.cursor() as cursor:
        assert conn.get_parameter_status("client_encoding") == "LATIN1"
        cursor.execute(query)
        assert cursor.fetchall()[0][1:] == ("pg_toast", "job", "LATIN1")

    async def ask() -> Any:
        conn = await asyncpg.connect(
            host="127.0.0.1",
            port=static_proxy.port,
            user="pytest",
            password="pytest",
            database="postgres",
            server_settings={"work_mem": "7MB", "DateStyle": "German"},
        )
        try:
            return await conn.fetchrow(query + ", current_setting('DateStyle')")
        finally:
            await conn.close()

    row = asyncio.run(ask())
    assert (row[0], row[3], row[4]) == ("7MB", "UTF8", "German, DMY")
    # A walsender can be reached, too: a base backup or a replica may go through the proxy.
    connstr = static_proxy.connstr() + " replication=true"
    with contextlib.closing(psycopg2.connect(connstr)) as conn, conn.cursor() as cursor:
        conn.autocommit = True
        cursor.execute("IDENTIFY_SYSTEM")
        assert cursor.fetchall()[0][1] == 1


def test_logins(static_proxy: ZenithProxy, vanilla_pg: VanillaPostgres) -> None:
    """Whatever method the server uses: the right password gets in, the wrong one gets its error."""
    for method in ("scram-sha-256", "md5", "password"):
        encryption = "md5" if method == "md5" else "scram-sha-256"
        user, password = f"u {method}", f"pass'{method} \\ ä"
        vanilla_pg.safe_psql(
            f"SET password_encryption = '{encryption}'; "
            f'CREATE USER "{user}" PASSWORD $${password}$$'
        )
        require_password(vanilla_pg, f'"{user}"', method)
    vanilla_pg.safe_psql("SELECT pg_reload_conf()")
    for method in ("scram-sha-256", "md5", "password"):
        user, password = f"u {method}", f"pass'{method} \\ ä"

        def connect(password: str, user: str = user) -> Any:
            return psycopg2.connect(
                host="127.0.0.1", port=static_proxy.port, dbname="postgres", user=user,
                password=password,
            )  # fmt: skip

        wait_until(
            lambda connect=connect, password=password: connect(password).close() or True,  # type: ignore[misc]
            what=f"a login with {method}",
        )
        with pytest.raises(psycopg2.OperationalError, match=f'failed for user "{user}"'):
            connect("wrong")
    assert "asks for no password" not in static_proxy.log_text()
    # The server lets this one in, whatever it says.
    ((superuser,),) = vanilla_pg.safe_psql("SELECT current_user::text")
    assert static_proxy.safe_psql(
        "SELECT current_user::text", username=superuser, password="anything"
    ) == [(superuser,)]
    assert "asks for no password" in static_proxy.log_text()

    # The server's own errors reach the client, each with its SQLSTATE.
    async def log_in(**changes: str) -> None:
        arguments = {"user": "pytest", "password": "pytest", "database": "postgres", **changes}
        conn = await asyncpg.connect(host="127.0.0.1", port=static_proxy.port, **arguments)
        await conn.close()

    with pytest.raises(asyncpg.InvalidPasswordError, match='failed for user "pytest"'):
        asyncio.run(log_in(password="wrong"))
    with pytest.raises(asyncpg.InvalidCatalogNameError, match='"nowhere" does not exist'):
        asyncio.run(log_in(database="nowhere"))
    with pytest.raises(asyncpg.InvalidPasswordError, match="empty password"):
        asyncio.run(log_in(password=""))
    asyncio.run(log_in())


def test_cancel(static_proxy: ZenithProxy, vanilla_pg: VanillaPostgres) -> None:
    """A cancel request ends the query of its session, and of no other."""
    with (
        contextlib.closing(static_proxy.connect()) as conn,
        contextlib.closing(static_proxy.connect()) as other,
        conn.cursor() as cursor,
        other.cursor() as other_cursor,
    ):

        def sleep() -> None:
            other_cursor.execute("SELECT pg_sleep(1.5)")

        asleep = threading.Thread(target=sleep)
        asleep.start()
        query = "SELECT pg_sleep(600)"

        def cancel() -> None:
            wait_until(lambda: running(vanilla_pg, query), what="the query to run")
            conn.cancel()

        canceller = threading.Thread(target=cancel)
        canceller.start()
        with pytest.raises(psycopg2.errors.QueryCanceled):
            cursor.execute(query)
        canceller.join()
        cursor.execute("SELECT 1")
        asleep.join()
        assert other_cursor.fetchall() == [("",)]

    # The server's own keys, and any other that the proxy has not given, cancel nothing.
    with contextlib.closing(static_proxy.connect()) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
        assert pid != conn.get_backend_pid()
        for process in (pid, conn.get_backend_pid()):
            with socket.create_connection(("127.0.0.1", static_proxy.port), 10) as sock:
                sock.sendall(bytes([0, 0, 0, 16, 4, 210, 22, 46]) + process.to_bytes(4, "big"))
                sock.sendall(bytes(4))
                assert sock.recv(1) == b""
        cursor.execute("SELECT 1")
        assert cursor.fetchall() == [(1,)]
    assert static_proxy.log_text().count("a key that no session has") == 2


def copy_both_ways(conn: Any) -> None:
    """Bulk data in and out at once over one session, compared byte by byte."""
    numbers = random.Random(7)
    lines = [numbers.randbytes(3000).hex().encode() + b"\n" for _ in range(BIG // 6001)]
    data = b"".join(lines)
    with conn.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE t (line text)")
        cursor.copy_expert("COPY t FROM STDIN", io.BytesIO(data))
        out = io.BytesIO()
        cursor.copy_expert("COPY t TO STDOUT", out)
        assert hashlib.sha256(out.getvalue()).digest() == hashlib.sha256(data).digest()
        # In one message, as large as they get.
        cursor.execute("SELECT string_agg(line, '') FROM t")
        assert cursor.fetchone()[0] == data.replace(b"\n", b"").decode()


def test_large_transfers(static_proxy: ZenithProxy) -> None:
    """Every byte arrives, in order, in both directions; the metrics count them."""
    with contextlib.closing(static_proxy.connect()) as conn:
        copy_both_ways(conn)
    metrics = static_proxy.metrics()
    assert metrics["zenith_proxy_num_bytes_proxied"] > 3 * BIG
    assert metrics["zenith_proxy_num_connections_accepted"] == 1
    wait_until(
        lambda: static_proxy.metrics()["zenith_proxy_num_connections_closed"] == 1,
        what="the session to be over",
    )


def test_slow_reader_costs_no_memory(
    static_proxy: ZenithProxy, vanilla_pg: VanillaPostgres
) -> None:
    """A client that does not read makes the server wait; the proxy does not take all into memory.

    Others are served meanwhile.
    """
    query = "SELECT repeat(''x'', 1000000) FROM generate_series(1, 300)"
    with (
        contextlib.closing(static_proxy.connect()) as probe,
        probe.cursor() as cursor,
        contextlib.closing(psycopg2.connect(static_proxy.connstr(), async_=True)) as conn,
    ):
        wait_until(lambda: conn.poll() == psycopg2.extensions.POLL_OK, what="the login")
        before = static_proxy.metrics()["zenith_proxy_maxrss_kb"]
        conn.cursor().execute(query.replace("''", "'"))
        assert conn.poll() == psycopg2.extensions.POLL_READ
        waiting = (
            "SELECT count(*) FROM pg_stat_activity "
            f"WHERE wait_event = 'ClientWrite' AND query = '{query}'"
        )
        wait_until(lambda: vanilla_pg.safe_psql(waiting)[0][0] == 1, what="the server to wait")
        cursor.execute("SELECT 1")
        grown = static_proxy.metrics()["zenith_proxy_maxrss_kb"] - before
        assert grown < 30 << 10
    # Of a session whose client has left nothing stays.
    wait_until(lambda: sessions(vanilla_pg) == 0, what="the server's sessions to end")


def test_tls(
    static_proxy: ZenithProxy, vanilla_pg: VanillaPostgres, port_distributor: PortDistributor,
    test_output_dir: str,
) -> None:  # fmt: skip
    """With a certificate clients encrypt, by TLS 1.3, and nothing is taken from others."""
    key, certificate = write_certificate(Path(test_output_dir))
    options = ("--ssl-key", str(key), "--ssl-cert", str(certificate))
    get_port = port_distributor.get_port
    log_file = Path(test_output_dir) / "tls.log"
    with ZenithProxy(get_port(), get_port(), log_file) as proxy:
        proxy.start_static(f"127.0.0.1:{vanilla_pg.port}", options)
        verified = f"{proxy.connstr()} sslmode=verify-full sslrootcert={certificate}"
        with contextlib.closing(psycopg2.connect(verified)) as conn:
            assert conn.info.ssl_attribute("protocol") == "TLSv1.3"
            copy_both_ways(conn)
            query = "SELECT pg_sleep(600)"

            def cancel() -> None:
                wait_until(lambda: running(vanilla_pg, query), what="the query to run")
                conn.cancel()

            canceller = threading.Thread(target=cancel)
            canceller.start()
            with pytest.raises(psycopg2.errors.QueryCanceled), conn.cursor() as cursor:
                cursor.execute(query)
            canceller.join()
        wait_until(lambda: sessions(vanilla_pg) == 0, what="the server's sessions to end")
        with pytest.raises(psycopg2.OperationalError, match="sslmode=require"):
            psycopg2.connect(f"{proxy.connstr()} sslmode=disable")
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(f"{verified} ssl_max_protocol_version=TLSv1.2")
        wait_until(lambda: "TLS handshake failed" in proxy.log_text(), what="the failure's log")
        assert "Traceback" not in proxy.log_text()
        assert proxy.safe_psql("SELECT 1") == [(1,)]


def test_server_goes_and_comes_back(static_proxy: ZenithProxy, vanilla_pg: VanillaPostgres) -> None:
    """Sessions end with the server's last word, logins fail clearly, and later all is well."""

    async def end_session() -> None:
        conn = await static_proxy.connect_async()
        await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(asyncpg.PostgresError, match="terminating connection due to admin"):
        asyncio.run(end_session())
    vanilla_pg.stop()
    with pytest.raises(
        psycopg2.OperationalError, match=r"cannot connect to the target .*Connection refused"
    ):
        static_proxy.connect()
    vanilla_pg.start()
    assert static_proxy.safe_psql("SELECT 1") == [(1,)]


def test_signals(static_proxy: ZenithProxy, vanilla_pg: VanillaPostgres) -> None:
    """Each signal ends the proxy and all its sessions."""
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGQUIT, 111)):
        with contextlib.closing(static_proxy.connect()) as conn, conn.cursor() as cursor:
            cursor.execute("SELECT 1")
            static_proxy.process.send_signal(number)
            assert static_proxy.process.wait(30) == code
            with pytest.raises(psycopg2.OperationalError, match="closed the connection"):
                cursor.execute("SELECT 1")
        wait_until(lambda: sessions(vanilla_pg) == 0, what="the server's sessions to end")
        static_proxy.kill()
        static_proxy.start_static(f"127.0.0.1:{vanilla_pg.port}")


@pytest.fixture
def talkative_proxy(
    static_proxy: ZenithProxy, vanilla_pg: VanillaPostgres
) -> Iterator[ZenithProxy]:
    """The proxy with all that it can log."""
    static_proxy.kill()
    yield static_proxy.start_static(f"127.0.0.1:{vanilla_pg.port}", env={"RUST_LOG": "trace"})


def test_no_password_in_the_log(talkative_proxy: ZenithProxy, vanilla_pg: VanillaPostgres) -> None:
    """Neither a right password nor a wrong one is logged, whatever goes wrong."""
    vanilla_pg.safe_psql("ALTER USER pytest PASSWORD 'Geheimnis1'")
    talkative_proxy.password = "Geheimnis1"
    talkative_proxy.safe_psql("SELECT 1")
    with pytest.raises(psycopg2.OperationalError):
        talkative_proxy.connect(password="Geheimnis2")
    vanilla_pg.stop()
    with pytest.raises(psycopg2.OperationalError):
        talkative_proxy.connect()
    text = talkative_proxy.log_text()
    assert "DEBUG" in text
    assert "Geheimnis" not in text


def test_compute_behind_the_proxy(
    zenith_env_builder: ZenithEnvBuilder, port_distributor: PortDistributor, pg_bin: PgBin,
    test_output_dir: str,
) -> None:  # fmt: skip
    """A compute is a server like any other: also to pgbench, and when it is killed and replaced."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE USER pytest SUPERUSER PASSWORD 'pytest'")
    get_port = port_distributor.get_port
    log_file = Path(test_output_dir) / "proxy.log"
    with ZenithProxy(get_port(), get_port(), log_file) as proxy:
        proxy.start_static(f"localhost:{pg.port}")
        pg_bin.run_capture(["pgbench", "-i", "-s", "1", proxy.connstr()])
        pg_bin.run_capture(["pgbench", "-c", "4", "-t", "50", proxy.connstr()])
        assert proxy.safe_psql("SELECT count(*) FROM pgbench_history") == [(200,)]
        pg.kill()
        with pytest.raises(psycopg2.OperationalError, match="cannot connect to the target"):
            proxy.connect()
        pg.start()
        assert proxy.safe_psql("SELECT count(*) FROM pgbench_history") == [(200,)]
