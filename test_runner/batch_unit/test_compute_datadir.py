"""Swapping data directories, keeping the user's files, and the state others see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.utils import process_exists, wait_until

from compute_tools import datadir, state
from compute_tools.datadir import Prepared
from compute_tools.periodic import Periodic
from compute_tools.postgres_process import MAX_LOG_SIZE, PostgresProcess, end_leftovers
from compute_tools.state import Phase


def make_old(path: Path) -> None:
    """A data directory after a clean stop, with files of its user's."""
    for name in ("base/5", "pg_stat", "log", "certs/ca", "pg_wal"):
        (path / name).mkdir(parents=True)
    for name in (
        "postgresql.conf",
        "postgresql.auto.conf",
        "pg_hba.conf",
        "zenith.conf",
        "pg.log",
        "log/monday.log",
        "certs/ca/root.crt",
        "pg_stat/pgstat.stat",
        "postmaster.pid",
        "standby.signal",
        "zenith.signal",
        "base/5/1259",
        "pg_wal/000000010000000000000001",
        "PG_VERSION",
    ):
        (path / name).write_text(f"old {name}")
    (path / "server.crt").symlink_to("/etc/ssl/certs/server.crt")
    os.mkfifo(path / "certs" / "pipe")


def test_what_is_kept(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make_old(old)
    (new / "pg_stat").mkdir(parents=True)
    (new / "pg_hba.conf").write_text("new")
    (new / "PG_VERSION").write_text("new")
    datadir._keep(old, new)
    kept = {str(p.relative_to(new)) for p in new.rglob("*") if not p.is_dir() or p.is_symlink()}
    assert kept == {
        "PG_VERSION",
        "postgresql.conf",
        "postgresql.auto.conf",
        "pg_hba.conf",
        "zenith.conf",
        "pg.log",
        "log/monday.log",
        "certs/ca/root.crt",
        "pg_stat/pgstat.stat",
        "server.crt",
    }
    assert (new / "pg_hba.conf").read_text() == "old pg_hba.conf"
    assert (new / "PG_VERSION").read_text() == "new"
    assert (new / "server.crt").readlink() == Path("/etc/ssl/certs/server.crt")
    # The old directory stays whole when a file of the new one is replaced, as Postgres does.
    (new / "temp").write_text("newer")
    (new / "temp").rename(new / "postgresql.auto.conf")
    assert (old / "postgresql.auto.conf").read_text() == "old postgresql.auto.conf"


@pytest.fixture(params=["exchange", "two renames"])
def prepared(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Prepared:
    """A new directory ready to be swapped in, on file systems that exchange names or not."""
    if request.param == "two renames":
        monkeypatch.setattr(datadir, "_exchange", lambda _one, _other: False)
    (tmp_path / "pgdata").mkdir()
    (tmp_path / "pgdata" / "old").touch()
    (tmp_path / "state" / "pgdata.new").mkdir(parents=True)
    (tmp_path / "state" / "pgdata.new" / "new").touch()
    (tmp_path / "state" / "blocks.map.new").write_text("new map")
    (tmp_path / "state" / "blocks.map").write_text("old map")
    return Prepared(tmp_path / "state/pgdata.new", tmp_path / "state/blocks.map.new", 0)


def test_swap(prepared: Prepared, tmp_path: Path) -> None:
    pgdata, state_dir = tmp_path / "pgdata", tmp_path / "state"
    assert datadir.swap_in(prepared, pgdata, state_dir).read_text() == "new map"
    assert [p.name for p in pgdata.iterdir()] == ["new"]
    datadir.remove_leftovers(state_dir)
    assert [p.name for p in state_dir.iterdir()] == ["blocks.map"]


def test_recovered_swap(tmp_path: Path) -> None:
    pgdata, state_dir = tmp_path / "pgdata", tmp_path / "state"
    (state_dir / "pgdata.old" / "mine").mkdir(parents=True)
    datadir.recover_swap(pgdata, state_dir)
    assert (pgdata / "mine").is_dir()
    (state_dir / "pgdata.old").mkdir()
    datadir.recover_swap(pgdata, state_dir)
    assert (pgdata / "mine").is_dir()
    assert not list(state_dir.iterdir())


def test_nothing_is_left_of_a_bad_backup(tmp_path: Path) -> None:
    pgdata = tmp_path / "pgdata"
    make_old(pgdata)
    before = sorted(pgdata.rglob("*"))
    with pytest.raises(datadir.DatadirError, match="extracting base backup failed"):
        datadir.prepare(bytes(10240), pgdata, tmp_path, standby=False)
    assert [p.name for p in tmp_path.iterdir()] == ["pgdata"]
    assert sorted(pgdata.rglob("*")) == before


def test_sparse_files(tmp_path: Path) -> None:
    data = bytes(100_000) + b"x" + bytes(1_000_000)
    datadir._write(tmp_path / "f", data)
    assert (tmp_path / "f").read_bytes() == data
    assert (tmp_path / "f").stat().st_blocks * 512 < 200_000


def test_destroy(tmp_path: Path) -> None:
    pgdata, state_dir = tmp_path / "pgdata", tmp_path / "state"
    make_old(pgdata)
    (state_dir / "pgdata.new").mkdir(parents=True)
    state.write(state_dir, Phase.CRASHED)
    lock = state.lock(state_dir, to_destroy=True)
    datadir.destroy(pgdata, state_dir)
    os.close(lock)
    assert not pgdata.exists()
    assert not state_dir.exists()


HOLD = """
import signal, sys
from pathlib import Path
from compute_tools import state
state.lock(Path(sys.argv[1]))
state.write(Path(sys.argv[1]), state.Phase(sys.argv[2]))
print(flush=True)
signal.pause()
"""


@pytest.mark.parametrize("phase", list(Phase))
def test_state_follows_the_supervisor(tmp_path: Path, phase: Phase) -> None:
    """What a process that holds the lock said is true as long as it lives."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            said = state.read(tmp_path)
            assert (said.phase, said.supervisor_pid) == (phase, process.pid)
            assert said.ending == (phase in (Phase.STOPPING, Phase.STOPPED, Phase.CRASHED))
            with pytest.raises(state.AlreadyRunning, match="The node is already running"):
                state.lock(tmp_path)
        finally:
            process.kill()
    said = state.read(tmp_path)
    assert said.supervisor_pid is None
    assert said.phase is (Phase.STOPPED if phase is Phase.STOPPED else Phase.CRASHED)


def test_state_without_words(tmp_path: Path) -> None:
    assert state.read(tmp_path / "never") == state.ComputeState(Phase.STOPPED, None, "")
    (tmp_path / "state.json").write_text("{")
    assert "unreadable" in state.read(tmp_path).reason
    assert state.read(tmp_path).phase is Phase.CRASHED


def test_state_on_a_full_disk(tmp_path: Path) -> None:
    """A word that cannot be written is lost, and no more than that."""
    state.write(tmp_path / "no such directory", Phase.RUNNING)
    (tmp_path / "state.json.1234.___temp").touch()
    (tmp_path / "mine").touch()
    # Another command may be about to start the node, too.
    (tmp_path / "spec.json.5678.___temp").touch()
    state.remove_temp_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "spec.json.5678.___temp"]


def test_periodic_survives_failures() -> None:
    calls: list[int] = []

    def action() -> None:
        calls.append(1)
        raise KeyError("anything")

    periodic = Periodic("a call that fails", 0.001, action)
    periodic.start()
    wait_until(lambda: len(calls) > 3, what="more calls")
    assert periodic.stop(5.0)


def start_shell(pgdata: Path, script: str) -> PostgresProcess:
    """A real child where a postmaster would be."""
    program = pgdata.parent / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    for part in pgdata.parents:
        if part.stat().st_uid == os.geteuid() and not part.stat().st_mode & 1:
            part.chmod(part.stat().st_mode | 0o11)
    return PostgresProcess.start(program, pgdata, [], {"PATH": os.defpath})


def test_log(tmp_path: Path) -> None:
    """The tail is of this life alone; a large log is put aside; no link is followed."""
    pgdata = tmp_path / "pgdata"
    pgdata.mkdir()
    (pgdata / "pg.log").write_text("an earlier life\n")
    process = start_shell(pgdata, "echo hello; exit 3")
    assert process.wait(10)
    assert process.poll() == 3
    assert process.log_tail() == "hello"
    os.truncate(pgdata / "pg.log", MAX_LOG_SIZE + 1)
    assert start_shell(pgdata, "echo again").wait(10)
    assert (pgdata / "pg.log").read_text() == "again\n"
    assert (pgdata / "pg.log.old").stat().st_size == MAX_LOG_SIZE + 1
    (pgdata / "pg.log").unlink()
    (pgdata / "pg.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        start_shell(pgdata, "echo no")
    assert not (tmp_path / "elsewhere").exists()


def test_postgres_dies_with_its_supervisor(tmp_path: Path) -> None:
    """The parent is killed: its child gets SIGQUIT from the kernel.

    Also where a script has started the parent in the background: there the signal is ignored.
    """
    pgdata = tmp_path / "pgdata"
    pgdata.mkdir()
    (tmp_path / "program").write_text("#!/bin/sh\necho $$ > pid; exec sleep 1000\n")
    (tmp_path / "program").chmod(0o755)
    code = (
        "import sys, signal; from pathlib import Path\n"
        "from compute_tools import postgres_process as p\n"
        "p.popen_kwargs = lambda: {}\n"
        "signal.signal(signal.SIGQUIT, signal.SIG_IGN)\n"
        "p.PostgresProcess.start(Path(sys.argv[1]) / 'program', Path(sys.argv[1]) / 'pgdata', [],"
        " {'PATH': '/usr/bin:/bin'})\n"
        "signal.pause()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    wait_until(lambda: (pgdata / "pid").read_text().strip(), what="the child to run")
    child = int((pgdata / "pid").read_text())
    assert process_exists(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: not process_exists(child), what="the child to die")


def test_no_leftovers_after_a_clean_end(tmp_path: Path) -> None:
    """A shell in the directory is nobody's server, whatever a stale pid file says."""
    (tmp_path / "postmaster.pid").write_text(f"{os.getpid()}\n{tmp_path}\n1\n2\n\n\n 1 99999999\n")
    sleeper = subprocess.Popen(["sleep", "1000"], cwd=tmp_path)
    end_leftovers(tmp_path)
    assert sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()
