"""Object storage that speaks S3: WAL goes there and comes back, a pageserver is told of it."""

from __future__ import annotations

import subprocess
import tomllib
import uuid
from pathlib import Path
from typing import Any

import pytest
from batch_others.test_wal_retention import (
    begin_with_copy,
    main_timeline,
    make_durable,
    metric,
    put_back,
    rows,
    start,
    wait_removed,
    wait_stored,
    wal_begin,
    write,
)
from fixtures.mock_s3 import MockS3Server
from fixtures.remote_storage import LocalFsStorage, S3Storage
from fixtures.safekeeper_wal import SEGMENT
from fixtures.utils import process_exists, wait_until
from fixtures.zenith_env import Safekeeper, ZenithEnv, ZenithEnvBuilder

# The places that --ttl has.
TTL_BUCKET = "zenith-testbucket"
TTL_PREFIX = "walarchive"
# The mock takes any.
SECRET = "Geheimnis"


def mock_s3(builder: ZenithEnvBuilder, bucket: str) -> MockS3Server:
    """A mock S3 server with a bucket, which ends with the environment; for safekeepers only."""
    builder.enable_s3_mock_remote_storage(bucket)
    builder.pageserver_remote_storage = None
    assert builder.s3_mock_server is not None
    return builder.s3_mock_server


def stored(server: MockS3Server, bucket: str, prefix: str) -> dict[str, int]:
    """Keys below a prefix, without it, and the sizes of their objects."""
    pages = server.client().get_paginator("list_objects_v2")
    return {
        entry["Key"].removeprefix(prefix): entry["Size"]
        for page in pages.paginate(Bucket=bucket, Prefix=prefix)
        for entry in page.get("Contents", ())
    }


def check_objects(objects: dict[str, int], count: int) -> None:
    """Whole segments, at least `count` in a row, each with its checksum beside it."""
    names = sorted(name for name in objects if not name.endswith(".crc32c"))
    assert sorted(objects) == sorted([*names, *(f"{name}.crc32c" for name in names)])
    assert {objects[name] for name in names} == {SEGMENT}
    assert all(name.startswith("00000001") and len(name) == 24 for name in names)
    numbers = [int(name[8:], 16) for name in names]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len(numbers) >= count


def test_wal_offload_to_s3(
    zenith_env_builder: ZenithEnvBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WAL that no safekeeper has any more comes out of the bucket for an old pageserver.

    Place, credentials and endpoint are the environment's, as with other tools.
    """
    server = mock_s3(zenith_env_builder, "wal_bucket")
    for name, value in (
        ("AWS_ACCESS_KEY_ID", server.access_key()),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_REGION", server.region()),
        ("AWS_ENDPOINT_URL", server.endpoint()),
    ):
        monkeypatch.setenv(name, value)
    env = start(zenith_env_builder, 2, wal_offload="s3://wal_bucket/some/place")
    pg, timeline, lsn = begin_with_copy(env, tmp_path / "tenants")
    end = write(pg, 3)
    make_durable(env, timeline, end)
    for safekeeper in env.safekeepers:
        wait_removed(safekeeper, timeline, end)
        wait_stored(safekeeper, timeline, end)
    prefix = f"some/place/{env.initial_tenant.hex}/{timeline.hex}/"
    count = end // SEGMENT - lsn // SEGMENT
    check_objects(stored(server, "wal_bucket", prefix), count)
    assert sum(metric(s, "offloaded_bytes") for s in env.safekeepers) >= count * SEGMENT
    pg.stop()
    put_back(env, tmp_path / "tenants")
    pg.start()
    assert rows(pg) == 6
    assert sum(metric(s, "fetched_segments") for s in env.safekeepers) >= 3
    for safekeeper in env.safekeepers:
        assert SECRET not in safekeeper.log_text()


def start_with_ttl(safekeeper: Safekeeper, environment: dict[str, str]) -> None:
    """Start a safekeeper that the command line has made, with --ttl."""
    command: list[str] = [
        str(safekeeper.env.paths.zenith_bin / "safekeeper"),
        *("-D", str(safekeeper.data_dir), "--id", str(safekeeper.id)),
        *("--listen-pg", f"127.0.0.1:{safekeeper.port.pg}"),
        *("--listen-http", f"127.0.0.1:{safekeeper.port.http}"),
        *("--recall", "1 second", "--no-sync", "--daemonize"),
        *("--ttl", "100 ms", "--wal-keep-size", "0", "--wal-removal-interval", "100 ms"),
    ]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True)
    safekeeper.running = True

    def answers() -> bool:
        safekeeper.http_client().check_status()
        return True

    wait_until(answers, what="the safekeeper to answer")


def test_wal_offload_with_ttl(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The older form: segments that are old enough go to the bucket that --ttl is for."""
    server = mock_s3(zenith_env_builder, TTL_BUCKET)
    env = start(zenith_env_builder, 1)
    (safekeeper,) = env.safekeepers
    safekeeper.stop()
    start_with_ttl(
        safekeeper,
        {
            "S3_REGION": server.region(),
            "S3_ENDPOINT": server.endpoint(),
            "S3_ACCESSKEY": server.access_key(),
            "S3_SECRET": server.secret_key(),
        },
    )
    pg = env.postgres.create_start("main")
    timeline = main_timeline(env)
    begin = wal_begin(safekeeper, timeline)
    end = write(pg, 3)
    make_durable(env, timeline, end)
    wait_removed(safekeeper, timeline, end)
    prefix = f"{TTL_PREFIX}/{env.initial_tenant.hex}/{timeline.hex}/"
    check_objects(stored(server, TTL_BUCKET, prefix), end // SEGMENT - begin // SEGMENT)
    assert rows(pg) == 4


def test_ttl_without_credentials(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A safekeeper that is told to offload and not how does not start."""
    env = start(zenith_env_builder, 1)
    (safekeeper,) = env.safekeepers
    safekeeper.stop()
    with pytest.raises(subprocess.CalledProcessError):
        start_with_ttl(safekeeper, {"S3_REGION": "us-east-1", "S3_ACCESSKEY": "test"})


def pageserver_config(env: ZenithEnv) -> Any:
    """The pageserver's configuration file."""
    return tomllib.loads((env.repo_dir / "pageserver.toml").read_text())


@pytest.mark.parametrize("kind", ["local_fs", "mock_s3"])
def test_pageserver_is_told_of_its_storage(zenith_env_builder: ZenithEnvBuilder, kind: str) -> None:
    """What the builder is told reaches pageserver.toml, and the pageserver starts with it."""
    expected: dict[str, str]
    if kind == "local_fs":
        zenith_env_builder.enable_local_fs_remote_storage()
        local = zenith_env_builder.pageserver_remote_storage
        assert isinstance(local, LocalFsStorage)
        expected = {"local_path": str(local.root)}
    else:
        zenith_env_builder.enable_s3_mock_remote_storage("pages")
        server = zenith_env_builder.s3_mock_server
        assert server is not None
        expected = {
            "bucket_name": "pages",
            "bucket_region": server.region(),
            "access_key_id": server.access_key(),
            "secret_access_key": server.secret_key(),
            "endpoint": server.endpoint(),
        }
    env = zenith_env_builder.init_start()
    assert pageserver_config(env)["remote_storage"] == expected
    assert env.pageserver.remote_storage == zenith_env_builder.pageserver_remote_storage
    assert env.s3_mock_server is zenith_env_builder.s3_mock_server
    assert [uuid.UUID(tenant["id"]) for tenant in env.pageserver.http_client().tenant_list()] == [
        env.initial_tenant
    ]
    env.pageserver.stop()
    env.pageserver.start()


def test_forced_mock_s3(
    zenith_env_builder: ZenithEnvBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FORCE_MOCK_S3 any test runs with a mock S3 server, which ends with its environment."""
    monkeypatch.setenv("FORCE_MOCK_S3", "true")
    with ZenithEnvBuilder(
        zenith_env_builder.repo_dir, zenith_env_builder.port_distributor
    ) as builder:
        env = builder.init_start()
        assert isinstance(env.pageserver.remote_storage, S3Storage)
        assert pageserver_config(env)["remote_storage"]["bucket_name"] == "repo_bucket"
        assert env.s3_mock_server is not None
        pid = env.s3_mock_server.pid
        assert env.postgres.create_start("main").safe_psql("SELECT 1") == [(1,)]
    assert not process_exists(pid)
