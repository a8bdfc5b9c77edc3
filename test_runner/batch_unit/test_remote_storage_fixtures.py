"""The fixtures of remote storage: a mock S3 server, and what a pageserver is told about storage."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import requests
from fixtures.mock_s3 import MockS3Server
from fixtures.ports import PortDistributor
from fixtures.remote_storage import (
    LocalFsStorage,
    S3Storage,
    append_pageserver_param_overrides,
)
from fixtures.utils import process_exists
from fixtures.zenith_env import ZenithEnvBuilder

OPTION = "--pageserver-config-override="


def test_mock_s3_server(port_distributor: PortDistributor, test_output_dir: str) -> None:
    """Objects are there after they were put, the server is on the loopback, and it ends."""
    server = MockS3Server(port_distributor.get_port(), Path(test_output_dir))
    try:
        assert server.endpoint() == f"http://127.0.0.1:{server.port}"
        client = server.client()
        client.create_bucket(Bucket="some_bucket")
        client.put_object(Bucket="some_bucket", Key="a/b", Body=b"content")
        assert client.get_object(Bucket="some_bucket", Key="a/b")["Body"].read() == b"content"
        listed = client.list_objects_v2(Bucket="some_bucket")["Contents"]
        assert [(entry["Key"], entry["Size"]) for entry in listed] == [("a/b", 7)]
        with pytest.raises(client.exceptions.NoSuchKey):
            client.get_object(Bucket="some_bucket", Key="nothing")
        # An address of this machine that the loopback has, too: all would be more than that one.
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.2", server.port)) != 0
    finally:
        server.kill()
    with pytest.raises(requests.ConnectionError):
        requests.get(server.endpoint(), timeout=5)


def overrides(
    monkeypatch: pytest.MonkeyPatch,
    storage: LocalFsStorage | S3Storage | None,
    environment: str | None = None,
    override: str | None = None,
) -> list[str]:
    """The settings of the options that are appended to a command, in their order."""
    monkeypatch.delenv("ZENITH_PAGESERVER_OVERRIDES", raising=False)
    if environment is not None:
        monkeypatch.setenv("ZENITH_PAGESERVER_OVERRIDES", environment)
    command = ["pageserver", "start"]
    append_pageserver_param_overrides(command, storage, override)
    assert command[:2] == ["pageserver", "start"]
    assert all(option.startswith(OPTION) for option in command[2:])
    return [option.removeprefix(OPTION) for option in command[2:]]


def test_options_of_the_pageserver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage first, then the environment, then the builder: the last one wins."""
    assert overrides(monkeypatch, None) == []
    assert overrides(monkeypatch, None, "", ";") == []
    local = LocalFsStorage(Path("/some where"))
    assert overrides(monkeypatch, local, "a=1; b=2", "a=3;c='x'") == [
        "remote_storage={local_path='/some where'}",
        *("a=1", "b=2", "a=3", "c='x'"),
    ]
    whole = S3Storage("bucket", "region", "key", "secret", "http://127.0.0.1:1")
    assert overrides(monkeypatch, whole) == [
        "remote_storage={bucket_name='bucket', bucket_region='region', access_key_id='key', "
        "secret_access_key='secret', endpoint='http://127.0.0.1:1'}"
    ]
    assert overrides(monkeypatch, S3Storage("bucket", "region")) == [
        "remote_storage={bucket_name='bucket', bucket_region='region'}"
    ]


def builder(test_output_dir: str, ports: PortDistributor) -> ZenithEnvBuilder:
    """A builder whose environment is never made."""
    return ZenithEnvBuilder(Path(test_output_dir) / "repo", ports)


def test_builder(
    test_output_dir: str, port_distributor: PortDistributor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of storage can be had, another only in its place; the server ends with the test."""
    monkeypatch.delenv("FORCE_MOCK_S3", raising=False)
    with builder(test_output_dir, port_distributor) as made:
        assert made.pageserver_remote_storage is None
        assert made.s3_mock_server is None
        made.enable_local_fs_remote_storage()
        local = LocalFsStorage(made.repo_dir / "local_fs_remote_storage")
        assert made.pageserver_remote_storage == local
        with pytest.raises(AssertionError, match="enabled already"):
            made.enable_local_fs_remote_storage(force_enable=False)
        made.enable_s3_mock_remote_storage("one")
        server = made.s3_mock_server
        assert server is not None
        made.enable_s3_mock_remote_storage("two")
        assert made.s3_mock_server is server
        assert made.pageserver_remote_storage == S3Storage(
            "two", "us-east-1", "test", "test", server.endpoint()
        )
        buckets = server.client().list_buckets()["Buckets"]
        assert {bucket["Name"] for bucket in buckets} == {"one", "two"}
        assert process_exists(server.pid)
    assert not process_exists(server.pid)


def test_forced_mock_s3(
    test_output_dir: str, port_distributor: PortDistributor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FORCE_MOCK_S3 gives every builder a server with a bucket named after its directory."""
    monkeypatch.setenv("FORCE_MOCK_S3", "1")
    with builder(test_output_dir, port_distributor) as made:
        assert isinstance(made.pageserver_remote_storage, S3Storage)
        assert made.pageserver_remote_storage.bucket == "repo_bucket"
        assert made.s3_mock_server is not None
        made.s3_mock_server.client().head_bucket(Bucket="repo_bucket")
