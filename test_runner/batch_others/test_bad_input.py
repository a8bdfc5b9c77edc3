"""Bad input gets one clear error and a non-zero exit; nothing is lost and the daemons live on."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import uuid
from pathlib import Path

import pytest
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder

GARBAGE = [
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 4096,
    b"\x00\x00\x00\x08\x04\xd2\x16\x2e" + b"\x16\x03\x01" * 50,
    b"\x00\x00\x00\x17\x00\x03\x00\x00user\0zenith\0\0" + b"Q\x7f\xff\xff\xffxx",
    b"\x00\x00\x00\x13\x00\x03\x00\x00user\0zen\0\0Z\x00\x00\x00\x05I",
]


def test_cli_errors(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Unknown things by name, each with an exit status.

    Scripts rely on the status and people on the text: an error that passes for success, or a
    traceback, helps neither.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()

    def fails(*arguments: str, code: int = 1) -> str:
        done = env.zenith_cli.raw_cli(list(arguments), check_return_code=False)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "already exists. Perhaps already initialized?" in fails("init")
    assert "Found no timeline id for branch name 'nowhere'" in fails(
        "pg", "create", "--branch-name", "nowhere", "n"
    )
    assert "postgres nobody is not found" in fails("pg", "stop", "nobody")
    assert "No node name was provided to start" in fails("pg", "start")
    assert "could not find safekeeper '7'" in fails("safekeeper", "start", "7")
    assert "Failed to parse Lsn from the request" in fails("pg", "create", "--lsn", "7", "n")
    fails("stop", "-m", "slowly", code=2)
    fails("timeline", "list", "--tenant-id", "xyz", code=2)
    fails("nonsense", code=2)
    fails(code=2)
    unknown = uuid.uuid4().hex
    assert unknown in fails("timeline", "create", "--branch-name", "b", "--tenant-id", unknown)
    # Another environment on this machine may be using the port that would be taken by default.
    env.zenith_cli.pg_create("main", "twice", port=env.port_distributor.get_port())
    assert "already exists" in fails("pg", "create", "twice")
    env.zenith_cli.pg_start("twice")
    assert "The node is already running" in fails("pg", "start", "twice")
    env.zenith_cli.pg_stop("twice")
    assert "not running" in fails("pg", "stop", "twice")


def test_occupied_ports(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A port that somebody else has is named, and the rest of the environment is untouched.

    It is the most frequent reason of a failed start, and must not leave half an environment
    behind.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init()
    with socket.create_server(("127.0.0.1", env.pageserver.service_port.pg)):
        done = env.zenith_cli.raw_cli(["pageserver", "start"], check_return_code=False)
        assert done.returncode == 1
        assert str(env.pageserver.service_port.pg) in done.stderr
        assert "pageserver start failed" in done.stderr
    with socket.create_server(("127.0.0.1", env.safekeepers[0].port.pg)):
        done = env.zenith_cli.raw_cli(["safekeeper", "start", "1"], check_return_code=False)
        assert done.returncode == 1
        assert str(env.safekeepers[0].port.pg) in done.stderr
    env.start()
    pg = env.postgres.create("main")
    with (
        socket.create_server(("127.0.0.1", pg.port)),
        pytest.raises(Exception, match=r"Address already in use|could not bind"),
    ):
        pg.start()
    pg.start()
    assert pg.safe_psql("SELECT 1") == [(1,)]


def test_missing_programs(zenith_env_builder: ZenithEnvBuilder, tmp_path: Path) -> None:
    """Without Postgres, or outside an environment, the command says what to do.

    These are a newcomer's first minutes: the remedy has to stand in the message.
    """
    paths = zenith_env_builder.paths
    zenith = str(paths.zenith_bin / "zenith")
    environment = {**os.environ, "ZENITH_REPO_DIR": str(tmp_path / "repo")}

    def run(*arguments: str, **extra: str) -> str:
        done = subprocess.run(
            [zenith, *arguments],
            env={**environment, **extra},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "You need to run 'zenith init' first" in run("start")
    no_postgres = run("init", POSTGRES_DISTRIB_DIR=str(tmp_path))
    assert no_postgres.startswith(
        "command failed: Failed to create zenith configuration\n\n"
        f"Caused by:\n    0: Can't find postgres binary at {tmp_path}"
    )
    config = tmp_path / "config.toml"
    config.write_text(f"pg_distrib_dir = '{paths.pg_distrib_dir}'\nzenith_distrib_dir = '/'\n")
    assert "Can't find binary 'pageserver'" in run("init", "--config", str(config))
    assert not (tmp_path / "repo").exists()


def send_garbage(port: int) -> None:
    """Every kind of nonsense, each on a connection of its own."""
    for data in GARBAGE:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            try:
                while sock.recv(4096):
                    pass
            except ConnectionResetError:
                pass


def test_garbage_on_every_port(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Bytes that are no protocol cost their connection, not the daemon.

    Port scanners and misdirected clients are everyday guests; none may take the storage of
    everybody else down.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    ports = [*_ports(env), pg.port]
    for port in ports:
        send_garbage(port)
    env.pageserver.http_client().check_status()
    env.safekeepers[0].http_client().check_status()
    pg.safe_psql("INSERT INTO t VALUES (0)")
    pg.kill()
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t") == [(1001,)]


def _ports(env: ZenithEnv) -> list[int]:
    pageserver, safekeeper = env.pageserver.service_port, env.safekeepers[0].port
    return [pageserver.pg, pageserver.http, safekeeper.pg, safekeeper.http]


def test_damaged_wal(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A flipped bit in a safekeeper's WAL is an error there, never a wrong page elsewhere.

    Disks rot. Damage must be found by the CRC and named before it becomes data that somebody
    trusts.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
        cur.execute("INSERT INTO t SELECT generate_series(1, 1000)")
        # Nothing cold is read from here on: what follows reaches the safekeeper alone.
        env.pageserver.kill()
        cur.execute("INSERT INTO t SELECT generate_series(1, 1000)")
    pg.kill()
    env.safekeepers[0].kill()
    segment = min(env.safekeepers[0].data_dir.glob("*/*/*.partial"))
    data = bytearray(segment.read_bytes())
    used = len(data.rstrip(b"\0"))
    # More than the padding behind a record, which nobody misses.
    for offset in range(used - 20000, used - 19992):
        data[offset] ^= 0x10
    segment.write_bytes(data)
    done = env.zenith_cli.raw_cli(["safekeeper", "start", "1"], check_return_code=False)
    env.safekeepers[0].running = done.returncode == 0
    env.pageserver.start(["--pageserver-config-override=wait_lsn_timeout='2 s'"])
    with pytest.raises(Exception):  # noqa: B017 (which component notices first is not the point)
        pg.start()
    env.pageserver.http_client().check_status()
