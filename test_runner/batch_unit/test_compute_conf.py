"""The settings a compute's Postgres gets out of what its user wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compute_tools import postgres_conf
from compute_tools.config_files import ConfigFiles, DirectoryWatch
from compute_tools.postgres_conf import Include, Node


def node(**changes: object) -> Node:
    values: dict[str, object] = {
        "pgdata": Path("/pgdata"),
        "port": 5000,
        "standby_name": "walproposer",
        "safekeepers": True,
        "tracked": {},
        "prepared": 0,
        "library": Path("/modules/zenith.so"),
        "feedback_file": Path("/state/pageserver.feedback"),
    }
    return Node(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "setting"),
    [
        ("port = 5432", ("port", "5432")),
        ("  Port 5432 # comment", ("port", "5432")),
        ("port=5432#comment", ("port", "5432")),
        ("a.b = 'x # y'", ("a.b", "x # y")),
        ("name='it''s'", ("name", "it's")),
        (r"name = 'it\'s\n\101\\'", ("name", "it's\nA\\")),
        ("wal_acceptors\t=\t'a:1, b:2' ", ("wal_acceptors", "a:1, b:2")),
        ("name ''", ("name", "")),
        ("# port = 1", None),
        ("", None),
        ("port", None),
        ("= 5", None),
    ],
)
def test_line(line: str, setting: tuple[str, str] | None) -> None:
    assert postgres_conf.parse_line(line) == setting


@pytest.mark.parametrize(
    ("line", "translated"),
    [
        ("wal_acceptors = 'a:1'", "zenith.wal_acceptors = 'a:1'"),
        ("  WAL_Acceptors 'wal_acceptors'", "  zenith.wal_acceptors 'wal_acceptors'"),
        ("recovery_target_lsn=0/1 # x", "zenith.recovery_target_lsn=0/1 # x"),
        ("zenith.wal_acceptors = 'a'", "zenith.wal_acceptors = 'a'"),
        ("# wal_acceptors = 'a'", "# wal_acceptors = 'a'"),
        ("wal_acceptors_more = 1", "wal_acceptors_more = 1"),
    ],
)
def test_translated_line(line: str, translated: str) -> None:
    assert postgres_conf.translate_line(line) == translated


def test_parse_takes_the_last_and_knows_twins() -> None:
    lines = ["PORT = 1", "port = 2", "zenith.max_replication_write_lag = 3MB"]
    assert postgres_conf.parse(lines) == {"port": "2", "max_replication_write_lag": "3MB"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500 << 20),
        ("15", 15 << 20),
        (" 2048 kB ", 2 << 20),
        ("1.5GB", 1536 << 20),
        ("1.5e1", 15 << 20),
        ("0x10", 16 << 20),
        ("010MB", 8 << 20),
        ("1TB", 1 << 40),
        ("100kB", 0),  # rounded, and 0 is no limit
        ("0", 0),
        ("-1", 0),
        ("-2", None),
        ("3000TB", None),
        ("1 mb", None),
        ("1.2.3", None),
        ("", None),
        ("x", None),
    ],
)
def test_size_limit(text: str, size: int | None) -> None:
    assert postgres_conf.size_limit({"lag": text}, "lag") == size
    assert postgres_conf.size_limit({}, "lag") == 0


def test_durability_is_forced() -> None:
    users = {
        "fsync": "on",
        "synchronous_standby_names": "",
        "restart_after_crash": "on",
        "port": "1",
        "data_directory": "/elsewhere",
        "wal_level": "minimal",
    }
    forced = postgres_conf.command_line(users, node())
    assert forced["fsync"] == forced["restart_after_crash"] == "off"
    assert forced["synchronous_standby_names"] == "walproposer"
    assert (forced["port"], forced["data_directory"]) == ("5000", "/pgdata")
    assert forced["wal_level"] == "replica"
    assert postgres_conf.command_line({"wal_level": "LOGICAL"}, node())["wal_level"] == "logical"


def test_local_wal_is_bounded_where_safekeepers_have_it() -> None:
    users = {"wal_keep_size": "10TB"}
    assert postgres_conf.command_line(users, node())["wal_keep_size"] == "1GB"
    assert "wal_keep_size" not in postgres_conf.command_line({"wal_keep_size": "5GB"}, node())
    direct = node(standby_name="pageserver", safekeepers=False)
    assert "wal_keep_size" not in postgres_conf.command_line(users, direct)


def test_wal_that_the_quorum_has_not_got_is_kept() -> None:
    users = {"max_slot_wal_keep_size": "64MB"}
    name = "max_slot_wal_keep_size"
    assert postgres_conf.command_line(users, node())[name] == "-1"
    # Others have no slot of ours: it is the user's, for slots of their own.
    assert name not in postgres_conf.command_line(
        users, node(standby_name="pageserver", safekeepers=False)
    )
    assert name not in postgres_conf.command_line(users, node(standby_name=None))


@pytest.mark.parametrize(
    ("users", "forced"),
    [
        ("", "/modules/zenith.so"),
        ("zenith", "/modules/zenith.so"),
        ("pg_stat_statements, zenith", "/modules/zenith.so,pg_stat_statements"),
        ('"$libdir/zenith", "auto_explain"', "/modules/zenith.so,auto_explain"),
        ("b,/old/zenith.so,zenithal", "/modules/zenith.so,b,zenithal"),
    ],
)
def test_preload_libraries(users: str, forced: str) -> None:
    settings = {"shared_preload_libraries": users}
    assert postgres_conf.command_line(settings, node())["shared_preload_libraries"] == forced


def test_limits() -> None:
    tracked = {"max_connections": 300, "max_locks_per_transaction": 64}
    past = postgres_conf.command_line(
        {"max_connections": "'50'"}, node(standby_name=None, tracked=tracked)
    )
    assert past["max_connections"] == "300"
    assert "max_locks_per_transaction" not in past
    assert past["zenith.read_only_node"] == "on"
    assert past["synchronous_standby_names"] == past["primary_conninfo"] == ""
    # A read-write node may have fewer than before, save for transactions that are prepared.
    now = postgres_conf.command_line(
        {"max_connections": "50", "max_worker_processes": "0x1", "max_replication_slots": "0"},
        node(tracked=tracked, prepared=3),
    )
    assert "max_connections" not in now
    assert now["max_prepared_transactions"] == "3"
    assert (now["max_worker_processes"], now["max_replication_slots"]) == ("2", "2")


@pytest.mark.parametrize(
    ("users", "forced"),
    [
        ("*", "*"),
        ("localhost, ::1", "localhost, ::1"),
        ("::", "127.0.0.1,::"),
        ("", "127.0.0.1"),
        ("10.0.0.1,10.0.0.2", "127.0.0.1,10.0.0.1,10.0.0.2"),
    ],
)
def test_loopback_is_listened_on(users: str, forced: str) -> None:
    forced_now = postgres_conf.command_line({"listen_addresses": users}, node())
    assert forced_now["listen_addresses"] == forced
    assert "listen_addresses" not in postgres_conf.command_line({}, node())


@pytest.fixture
def pgdata(tmp_path: Path) -> Path:
    """An empty data directory that the user who runs Postgres can read."""
    path = tmp_path / "pgdata"
    path.mkdir()
    for part in (path, *path.parents):
        if part.stat().st_uid == os.geteuid() and not part.stat().st_mode & 1:
            part.chmod(part.stat().st_mode | 0o11)
    return path


def test_includes_are_expanded(pgdata: Path, tmp_path: Path) -> None:
    (pgdata / "d").mkdir()
    (pgdata / "d" / "2.conf").write_text("port = 2\ninclude '../more.conf'\n")
    (pgdata / "d" / "1.conf").write_text("port = 1\n")
    (pgdata / "d" / ".3.conf").write_text("port = 3\n")
    (pgdata / "more.conf").write_text("max_replication_write_lag = 7MB\n")
    (pgdata / "postgresql.conf").write_bytes(
        b"# caf\xe9\ninclude_dir 'd'\ninclude_if_exists = 'none.conf'\ninclude 'it''s'\n"
    )
    (pgdata / "postgresql.auto.conf").write_text("work_mem = '8MB'\n")
    config = ConfigFiles(pgdata, tmp_path / "generated.conf")
    settings = config.generate()
    assert (settings["port"], settings["work_mem"]) == ("2", "8MB")
    assert settings["max_replication_write_lag"] == "7MB"
    text = (tmp_path / "generated.conf").read_bytes()
    assert b"# caf\xe9" in text
    assert b"\nzenith.max_replication_write_lag = 7MB" in text
    assert f"include '{pgdata}/it''s'".encode() in text, "Postgres itself says what is missing"
    assert b"work_mem" not in text
    assert (tmp_path / "generated.conf").stat().st_mode & 0o777 == 0o600
    assert config.directories() >= {pgdata, pgdata / "d"}
    assert not config.changed()
    (pgdata / "d" / "4.conf").write_text("port = 4\n")
    assert config.changed()
    assert config.generate()["port"] == "4"
    (pgdata / "none.conf").write_text("port = 5\n")
    assert config.changed()
    assert config.generate()["port"] == "5"


def test_a_file_that_includes_itself(pgdata: Path, tmp_path: Path) -> None:
    (pgdata / "postgresql.conf").write_text("include 'postgresql.conf'\nport = 9\n")
    assert ConfigFiles(pgdata, tmp_path / "generated.conf").generate()["port"] == "9"
    assert postgres_conf.parse_include("INCLUDE 'x'") == Include("include", "x")


@pytest.mark.parametrize("method", ["generate", "generate_plain"])
def test_an_unreadable_file_leaves_what_was_made_of_it(
    pgdata: Path, tmp_path: Path, method: str
) -> None:
    conf, generated = pgdata / "postgresql.conf", tmp_path / "generated.conf"
    conf.write_text("port = 5\n")
    config = ConfigFiles(pgdata, generated)
    getattr(config, method)()
    before = generated.read_text()
    conf.rename(pgdata / "away")
    for _ in range(2):
        assert config.changed()
        with pytest.raises(FileNotFoundError):
            getattr(config, method)()
        assert generated.read_text() == before
    (pgdata / "away").rename(conf)
    assert config.changed(), "it is read again though it is the same file as before"
    getattr(config, method)()
    assert not config.changed()
    assert generated.read_text() == before


def test_files_that_postgres_misses(pgdata: Path, tmp_path: Path) -> None:
    (pgdata / "d").mkdir()
    (pgdata / "d" / "1.conf").write_text("port = 1\n")
    conf = pgdata / "postgresql.conf"
    conf.write_text("include_dir 'd'\ninclude_if_exists 'none.conf'\n")
    config = ConfigFiles(pgdata, tmp_path / "generated.conf")
    assert config.generate()["port"] == "1"
    assert config.complete
    (pgdata / "d" / "2.conf").symlink_to("nowhere")
    assert config.generate()["port"] == "1"
    assert not config.complete
    text = (tmp_path / "generated.conf").read_text()
    assert f"\ninclude '{pgdata}/d/2.conf'\n" in text, "Postgres itself says what is missing"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read more than Postgres' user")
def test_only_what_postgres_may_read(pgdata: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password = 'of root'\n")
    secret.chmod(0o600)
    (pgdata / "postgresql.conf").write_text(f"include '{secret}'\n")
    (pgdata / "postgresql.auto.conf").symlink_to(secret)
    settings = ConfigFiles(pgdata, tmp_path / "generated.conf").generate()
    assert "password" not in settings
    assert "of root" not in (tmp_path / "generated.conf").read_text()


def test_watch(tmp_path: Path) -> None:
    watch = DirectoryWatch()
    watch.watch({tmp_path})
    watch.drain()
    (tmp_path / "postgresql.conf").write_text("port = 1\n")
    (fd,) = watch.filenos()
    assert os.read(fd, 4096)
    watch.drain()
    with pytest.raises(BlockingIOError):
        os.read(fd, 1)
    os.close(fd)
