"""Computes and daemons are started, stopped and killed at any moment, by commands at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fixtures.postgres import Postgres
from fixtures.utils import process_exists, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder


def spawn(env: ZenithEnv, *arguments: str) -> subprocess.Popen[str]:
    """A `zenith` command that is not waited for."""
    return subprocess.Popen(
        [str(env.paths.zenith_bin / "zenith"), *arguments],
        env={**os.environ, "ZENITH_REPO_DIR": str(env.repo_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that were started in the background of a shell ignore it, and their children, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def servers(pg: Postgres) -> list[int]:
    """Processes that work in the node's data directory."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and (process / "cwd").samefile(pg.pg_data_dir_path()):
                found.append(int(process.name))
    return found


def test_supervisor_killed_while_starting(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Whenever it is killed: no server is left behind, and the next start has data and files.

    A machine may die at any moment of a start; a server nobody watches, or a directory half
    swapped, would need an expert to clean up.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create("main", config_lines=["include 'own.d/extra.conf'"])
    own = Path(pg.pg_data_dir_path()) / "own.d"
    own.mkdir()
    (own / "extra.conf").write_text("work_mem = 5MB\n")
    pg.start().safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    pg.stop()
    rng = random.Random(7)
    for _ in range(12):
        start = spawn(env, "pg", "start", str(pg.node_name))
        found = wait_until(lambda: pg.supervisor_pids(), what="the supervisor to appear")
        time.sleep(rng.uniform(0, 0.6))  # the moment of the kill
        with contextlib.suppress(ProcessLookupError):
            os.kill(found[0], signal.SIGKILL)
        _, err = start.communicate(timeout=60)
        assert "Traceback" not in err
        wait_until(lambda: not servers(pg), what="the server to follow its supervisor")
        assert pg.status() in ("crashed", "stopped")
    pg.start()
    assert pg.safe_psql("SELECT count(*), sum(i) FROM t") == [(1000, 500500)]
    assert pg.safe_psql("SHOW work_mem") == [("5MB",)]
    left = {path.name for path in pg.state_dir().iterdir()} & {"pgdata.old", "blocks.map.new"}
    assert not left
    # Each life has taken over the lease of the one before, so that no history is kept for it.
    tenant = env.repo_dir / "tenants" / pg.safe_psql("SHOW zenith.zenith_tenant")[0][0]
    leases = tenant / "leases" / pg.safe_psql("SHOW zenith.zenith_timeline")[0][0]
    assert leases.read_text().count("lease_id") == 1


def test_stop_while_starting(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A start that waits for the safekeepers ends at once when it is told to.

    Who sees a start hang presses Ctrl-C: it must be over then, and leave a node that can be
    started.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create("main")
    name = str(pg.node_name)
    env.safekeepers[0].kill()
    env.safekeepers[1].kill()

    def start() -> subprocess.Popen[str]:
        process = spawn(env, "pg", "start", name)
        wait_until(lambda: pg.status() == "starting", what="the start to begin")
        return process

    stopped = start()
    assert "server stopped (it was stopped while starting)" in env.zenith_cli.pg_stop(name).stdout
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 1
    assert "stopped while starting" in err
    assert pg.status() == "stopped"

    interrupted = start()
    interrupted.send_signal(signal.SIGINT)
    out, err = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, (out, err)
    assert pg.status() == "stopped"

    destroyed = start()
    env.zenith_cli.pg_stop(name, destroy=True)
    assert destroyed.wait(60) == 1
    destroyed.communicate()
    assert not Path(pg.pg_data_dir_path()).exists()
    assert not pg.state_dir().exists()

    env.safekeepers[0].start()
    env.safekeepers[1].start()
    assert pg.create("main", name).start().safe_psql("SELECT 1") == [(1,)]


def test_teardown_while_starting(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The end of a test ends a node that waits for its safekeepers, and so has no server yet.

    It would go on for a minute, beside the tests that follow and on their ports.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    pg = env.postgres.create("main")
    for safekeeper in env.safekeepers[1:]:
        safekeeper.kill()
    start = spawn(env, "pg", "start", str(pg.node_name))
    wait_until(lambda: pg.status() == "starting", what="the start to begin")
    env.postgres.stop_all_immediately()
    assert not pg.supervisor_pids()
    assert pg.status() == "stopped"
    _, err = start.communicate(timeout=60)
    assert start.returncode == 1
    assert "stopped while starting" in err


def test_stop_without_quorum(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A stop that cannot push the last WAL has a deadline, and may be cut short.

    Stock Postgres waits for ever for a standby that is away: no node may be impossible to stop.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["zenith.stop_timeout = '2 s'"])
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    env.safekeepers[0].kill()
    said = env.zenith_cli.pg_stop(str(pg.node_name)).stdout
    assert "nothing acknowledged is lost" in said
    env.safekeepers[0].start()
    with Path(pg.config_file_path()).open("a") as conf:
        conf.write("zenith.stop_timeout = '1 h'\n")
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t") == [(1000,)]
    pid = pg.supervisor_pid()
    env.safekeepers[0].kill()
    slow = spawn(env, "pg", "stop", str(pg.node_name))
    wait_until(lambda: pg.status() == "stopping", what="the stop to begin")
    os.kill(pid, signal.SIGQUIT)
    out, err = slow.communicate(timeout=30)
    assert slow.returncode == 0, (out, err)
    assert pg.status() == "stopped"
    assert not servers(pg)
    env.safekeepers[0].start()
    pg.start()
    assert pg.safe_psql("SELECT count(*) FROM t") == [(1000,)]


def test_crash_leaves_nothing(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A killed postmaster's backends, and what they started, end; a start right then waits.

    A backend that outlived its server could still write into the directory that the next one is
    using.
    """
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS i")
        busy = pg.connect()
        busy.cursor().execute("SELECT 1")
        program = spawn_program(pg)
        pids = servers(pg)
        assert len(pids) > 5
        postmaster = int(Path(pg.pg_data_dir_path(), "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGKILL)
        # Not waited for: the supervisor has hardly noticed.
        wait_until(lambda: pg.status() == "crashed", what="the crash to show")
        pg.running = False
        pg.start()
        assert not [pid for pid in (*pids, program) if process_exists(pid)]
        busy.close()
    assert pg.safe_psql("SELECT count(*) FROM t") == [(10,)]


def spawn_program(pg: Postgres) -> int:
    """A process that a backend has started and that outlives its backend."""
    # It reads what it is sent: a shell that ends before that breaks the pipe.
    program = "sleep 1000 > /dev/null 2>&1 & echo $! > program.pid; cat > /dev/null"
    pg.safe_psql(f"COPY (SELECT 1) TO PROGRAM '{program}'")
    return int(Path(pg.pg_data_dir_path(), "program.pid").read_text())


def test_settings(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The user's settings hold in every form, save those that durability rests on.

    People bring their postgresql.conf along. What they set must work, but no line of it may
    cost them a commit.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create("main")
    directory = Path(pg.pg_data_dir_path())
    (directory / "conf.d").mkdir()
    (directory / "conf.d" / "a.conf").write_text(
        "shared_preload_libraries = 'pg_stat_statements, zenith'\nWAL_ACCEPTORS = 'nobody:1'\n"
    )
    (directory / "key.pem").symlink_to("/dev/null")
    with Path(pg.config_file_path()).open("ab") as conf:
        conf.write(b"include_dir = 'conf.d'  # a comment\nFsync ON\nMAX_connections='120'\n")
        conf.write(b"data_directory = '/nowhere'\nlisten_addresses = '127.0.0.2'\n# caf\xe9\n")
    pg.start()

    def show(name: str) -> str:
        answer = pg.safe_psql(f"SHOW {name}")[0][0]
        assert isinstance(answer, str)
        return answer

    assert show("fsync") == "off"
    assert show("max_connections") == "120"
    assert show("listen_addresses") == "127.0.0.1,127.0.0.2"
    assert show("shared_preload_libraries").endswith(",pg_stat_statements")
    pg.safe_psql("CREATE EXTENSION pg_stat_statements")
    with contextlib.closing(pg.connect()) as conn, conn.cursor() as cur:
        cur.execute("ALTER SYSTEM SET port = 1")
        cur.execute("ALTER SYSTEM SET work_mem = '7MB'")
        cur.execute("ALTER SYSTEM SET full_page_writes = on")
        cur.execute("ALTER SYSTEM SET max_replication_slots = 0")
    pg.stop().start()
    assert show("port") == str(pg.port)
    assert show("work_mem") == "7MB"
    assert show("full_page_writes") == "off"
    assert show("max_replication_slots") == "2"
    assert (directory / "key.pem").is_symlink()
    (directory / "conf.d" / "b.conf").write_text("maintenance_work_mem = 33MB\n")
    reload_until(pg, "maintenance_work_mem", "33MB")
    pg.config(["maintenance_work_mem = '44MB'"])
    reload_until(pg, "maintenance_work_mem", "44MB")


def reload_until(pg: Postgres, name: str, value: str) -> None:
    """The change of a file shows soon after a reload."""

    def shows() -> bool:
        pg.safe_psql("SELECT pg_reload_conf()")
        return bool(pg.safe_psql(f"SHOW {name}") == [(value,)])

    wait_until(shows, what=f"{name} to be {value}")


def test_parallel_commands(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Commands at once lose no branch, share no port, and start a node once.

    Test suites and CI jobs run the command side by side: a lost name or a shared port would
    fail one of them at random.
    """
    env = zenith_env_builder.init_start()
    names = [f"b{i}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(env.zenith_cli.create_branch, names))
        assert {name for name, _ in env.zenith_cli.list_timelines()} == {"main", *names}
        list(pool.map(env.zenith_cli.pg_create, names))
    listed = env.zenith_cli.raw_cli(["pg", "list"]).stdout.splitlines()[1:]
    assert len({line.split("\t")[1] for line in listed}) == 8
    pg = env.postgres.create("main")
    commands = [spawn(env, "pg", "start", str(pg.node_name)) for _ in range(4)]
    answers = [command.communicate(timeout=60) for command in commands]
    assert sorted(command.returncode for command in commands) == [0, 1, 1, 1]
    assert sum("The node is already running" in err for _, err in answers) == 3
    assert pg.safe_psql("SELECT 1") == [(1,)]
    commands = [spawn(env, "stop") for _ in range(3)]
    for command in commands:
        _, err = command.communicate(timeout=60)
        assert command.returncode == 0, err
    assert pg.status() == "stopped"
    env.pageserver.running = False


@pytest.mark.parametrize("immediate", [False, True])
def test_daemons_twice(zenith_env_builder: ZenithEnvBuilder, immediate: bool) -> None:
    """What runs is not started again, what is stopped says so, a stale pid file deceives nobody.

    A pid file outlives its process: signalling whoever has the number now would kill a
    stranger.
    """
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pid_file = env.repo_dir / "pageserver.pid"
    pid = pid_file.read_text()
    again = env.zenith_cli.raw_cli(["start"]).stdout
    assert f"Pageserver is already running with pid {pid}" in again
    assert "Safekeeper 1 is already running with pid" in again
    assert pid_file.read_text() == pid
    mode = ["-m", "immediate"] if immediate else []
    said = env.zenith_cli.raw_cli(["pageserver", "stop", *mode]).stdout.splitlines()
    env.pageserver.running = False
    word = "immediately" if immediate else "gracefully"
    assert said[0] == f"Stop pageserver {word}"
    assert said[-2] == "Pageserver stopped receiving connections"
    assert said[-1].startswith("Pageserver status is: ")
    stop = ["pageserver", "stop"]
    assert "but a PID file was found" in env.zenith_cli.raw_cli(stop).stdout
    # Somebody else has the number by now: us.
    pid_file.write_text(str(os.getpid()))
    assert (
        f"Pageserver with pid {os.getpid()} does not exist" in env.zenith_cli.raw_cli(stop).stdout
    )
    pid_file.unlink()
    assert env.zenith_cli.raw_cli(stop).stdout == "Pageserver is already stopped\n"
    env.pageserver.start()
