"""The installation of links to a distribution, and what its server makes of a command line."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from compute_tools import pg_install, postgres_conf, quorum_server
from compute_tools.config_files import ConfigFiles
from compute_tools.quorum_settings import QuorumSettings
from compute_tools.quorum_sidecar import Sidecar, make_spec
from postgres_ffi.distrib import DistribError, find_distrib
from zenith_utils.ids import TenantId, TimelineId

SERVER = "/distrib/bin/postgres"
LIBRARY = "/modules/zenith.so"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pg") / "install"
    pg_install.install(directory, find_distrib())
    return directory


def test_programs_are_the_distribution_s(installation: Path) -> None:
    distrib = find_distrib()
    for program in sorted(distrib.bin_dir.iterdir()):
        if program.name == "postmaster":
            continue
        outputs = [
            subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            for path in (program, installation / "bin" / program.name)
        ]
        assert outputs[0] == outputs[1]
    assert (installation / "share" / "extension").is_dir()
    assert (installation / "lib" / "libpqwalreceiver.so").is_file()


def test_it_stands_for_the_distribution(
    installation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computes and redo processes are started from the distribution, not through the scripts."""
    assert find_distrib(installation) == find_distrib()
    monkeypatch.setenv("POSTGRES_DISTRIB_DIR", str(installation))
    # Also one that is made from it.
    pg_install.install(tmp_path / "second", find_distrib())
    link = (tmp_path / "second" / "bin" / "postgres.distrib").readlink()
    assert link == find_distrib(tmp_path / "second").bin_dir / "postgres"


def test_made_again(installation: Path) -> None:
    """What is right is left alone, what is not is repaired."""
    bin_dir = installation / "bin"
    before = {path: path.lstat().st_mtime_ns for path in bin_dir.iterdir()}
    pg_install.install(installation, find_distrib())
    assert {path: path.lstat().st_mtime_ns for path in bin_dir.iterdir()} == before
    good = (bin_dir / "postgres").read_text()
    (bin_dir / "postgres").write_text("#!/bin/false\n")
    (bin_dir / "psql").unlink()
    (bin_dir / "psql").symlink_to("/nowhere")
    pg_install.install(installation, find_distrib())
    assert (bin_dir / "postgres").read_text() == good
    assert os.access(bin_dir / "postgres", os.X_OK) and os.access(bin_dir / "psql", os.X_OK)


def test_a_distribution_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "postgres").write_text("theirs")
    with pytest.raises(DistribError, match="is another installation of Postgres"):
        pg_install.install(tmp_path, find_distrib())
    assert [path.name for path in (tmp_path / "bin").iterdir()] == ["postgres"]


@pytest.fixture
def pgdata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PGDATA", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    (tmp_path / "postgresql.conf").write_text("port = 5544\nwork_mem = 5MB\n")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-D", "{}"],
        ["-D{}", "-c", "work_mem=5MB", "-p", "5", "-F"],
        ["-D", "{}", "-C", "port"],
        ["-D", "{}", "-c", "config_file=/etc/other.conf"],
        ["-D", "/nowhere"],
    ],
)
def test_other_command_lines_stay(pgdata: Path, arguments: list[str]) -> None:
    command = [argument.format(pgdata) for argument in arguments]
    assert quorum_server.prepare(SERVER, LIBRARY, command) == [SERVER, *command]
    assert not (pgdata / quorum_server.GENERATED).exists()


def test_an_unreadable_configuration_is_not_one_without_safekeepers(pgdata: Path) -> None:
    (pgdata / "postgresql.conf").unlink()
    command = ["-D", str(pgdata)]
    assert quorum_server.prepare(SERVER, LIBRARY, command) == [SERVER, *command]
    (pgdata / "postgresql.conf").mkdir()
    with pytest.raises(OSError, match=r"postgresql\.conf"):
        quorum_server.prepare(SERVER, LIBRARY, command)


def test_settings_are_translated(pgdata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (pgdata / "postgresql.conf").open("a") as conf:
        conf.write("Max_Replication_Write_Lag 15MB # ours\nshared_preload_libraries='a, zenith'\n")
    monkeypatch.setenv("PGDATA", str(pgdata))
    command = quorum_server.prepare(SERVER, LIBRARY, ["-c", "port=5"])
    generated = pgdata / quorum_server.GENERATED
    assert command == [
        *(SERVER, "-c", "port=5"),
        *("-c", f"config_file={generated}"),
        *("-c", f"shared_preload_libraries={LIBRARY},a"),
    ]
    assert generated.read_text() == (
        "port = 5544\nwork_mem = 5MB\nzenith.max_replication_write_lag 15MB # ours\n"
        "shared_preload_libraries='a, zenith'\n\n"
    )


def test_a_compute_s_directory_is_refused(pgdata: Path) -> None:
    (pgdata / "postgresql.conf").write_text("wal_acceptors = 'localhost:1'\n")
    (pgdata / "pg_stat").mkdir()
    (pgdata / "pg_stat" / "zenith.lazyfiles").touch()
    with pytest.raises(quorum_server.QuorumServerError, match='start it with "zenith pg start"'):
        quorum_server.prepare(SERVER, LIBRARY, ["-D", str(pgdata)])


def test_a_release_whose_commits_do_not_wait_is_refused(pgdata: Path, tmp_path: Path) -> None:
    (pgdata / "postgresql.conf").write_text("wal_acceptors = 'localhost:1'\n")
    server = tmp_path / "distrib" / "bin" / "postgres"
    server.parent.mkdir(parents=True)
    server.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 15.12'\n")
    server.chmod(0o755)
    with pytest.raises(DistribError, match=r"install PostgreSQL 15\.13"):
        quorum_server.prepare(str(server), LIBRARY, ["-D", str(pgdata)])


def test_a_configuration_that_cannot_be_written_harms_no_server(
    pgdata: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = pgdata / "place"
    place.mkdir()
    config = ConfigFiles(pgdata, place / quorum_server.GENERATED)
    config.generate_plain()
    shutil.rmtree(place)
    (pgdata / "postgresql.conf").write_text("port = 1\n")
    quorum = QuorumSettings(TenantId.generate(), TimelineId.generate(), (("127.0.0.1", 1),), "")
    checks = iter([None, None, "fenced"])
    keeper = SimpleNamespace(next_check=0.0, check=lambda: next(checks), followed_postgres=False)
    us = os.pidfd_open(os.getpid())
    sidecar = Sidecar(make_spec(quorum, pgdata, 1), config, os.getpid(), us)
    assert sidecar._watch(keeper) == "fenced"  # type: ignore[arg-type]
    os.close(us)
    (record,) = caplog.records
    assert record.getMessage().startswith("cannot follow the change of the configuration: ")


@pytest.mark.parametrize(
    ("line", "well_formed"),
    [
        ("", True),
        ("  # a = b c", True),
        ("a = 'b' # c", True),
        ("a b", True),
        ("a.b=''", True),
        ("a = b c", False),
        ("a = 'b", False),
        ("a", False),
        ("= b", False),
        ("a = 'it''s' x", False),
    ],
)
def test_well_formed_lines(line: str, well_formed: bool) -> None:
    assert postgres_conf.is_well_formed(line) is well_formed
