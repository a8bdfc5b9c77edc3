"""The zenith library: its settings, and what it refuses."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from batch_unit.lazyfiles_support import (
    Postgres,
    library_node,
    make_lazy_copy,
    stopped_cluster,
    wait_for,
)

from zenith_utils.os_user import give


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    with stopped_cluster() as datadir:
        yield datadir


@pytest.fixture
def node(template: Path) -> Iterator[Postgres]:
    with library_node(template) as node:
        yield node


def configure(node: Postgres, *lines: str) -> None:
    with (node.datadir / "postgresql.conf").open("a") as conf:
        conf.writelines(f"{line}\n" for line in lines)


def test_settings(node: Postgres) -> None:
    configure(
        node,
        "zenith.zenith_tenant = '11111111111111111111111111111111'",
        "zenith.wal_acceptors = 'localhost:1,localhost:2'",
        "zenith.max_replication_write_lag = 500MB",
        "zenith.max_replication_flush_lag = 10GB",
        "zenith.max_cluster_size = 30MB",
        "zenith.page_server_connstring = 'host=a'",
        "zenith.page_server_connstring = 'host=b'",
        "zenith.from_the_future = 'kept'",
        "log_min_messages = panic",
    )
    node.start()
    expected = {
        "zenith.zenith_tenant": "1" * 32,
        "zenith.zenith_timeline": "",
        "zenith.wal_acceptors": "localhost:1,localhost:2",
        "wal_acceptors": "localhost:1,localhost:2",
        "max_replication_write_lag": "500MB",
        "max_replication_flush_lag": "10GB",
        "max_replication_apply_lag": "-1",
        "zenith.max_cluster_size": "30MB",
        "zenith.page_server_connstring": "host=b",
        "zenith.from_the_future": "kept",
        "zenith.read_only_node": "off",
        "log_min_messages": "warning",
    }
    assert {name: node.value(f"SHOW {name}") for name in expected} == expected
    assert node.value("SELECT pg_size_bytes(current_setting('max_replication_write_lag'))") == (
        500 << 20
    )

    configure(node, "zenith.max_replication_write_lag = 15MB", "zenith.later = 1")
    node.sql("SELECT pg_reload_conf()")
    wait_for(lambda: node.value("SHOW max_replication_write_lag") == "15MB", "the reload")
    assert node.value("SHOW zenith.later") == "1"


def test_incomplete_directory_is_refused_without_lazyfiles(node: Postgres, template: Path) -> None:
    lazy = node.datadir.with_name("lazy")
    make_lazy_copy(template, lazy, node.datadir.with_name("map"))
    with pytest.raises(RuntimeError, match="lazyfiles library is not preloaded"):
        Postgres(node.distrib, lazy, node.settings).start()


def test_read_only_node_is_not_promoted(node: Postgres) -> None:
    (node.datadir / "standby.signal").touch()
    node.settings = {**node.settings, "zenith.read_only_node": "on"}
    node.start()
    with pytest.raises(
        psycopg2.errors.ObjectNotInPrerequisiteState, match="read-only node cannot be promoted"
    ):
        node.sql("SELECT pg_promote()")
    assert node.value("SELECT pg_is_in_recovery()") is True

    process = node.process
    assert process is not None
    promote = node.datadir / "promote"
    promote.touch()
    give(promote)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: process.poll() is not None, "the promoted node to stop")


def test_follower_may_be_promoted(node: Postgres) -> None:
    (node.datadir / "standby.signal").touch()
    node.start()
    assert node.value("SELECT pg_promote()") is True
    assert node.value("SELECT pg_is_in_recovery()") is False
