"""What a safekeeper tells about itself: HTTP status, metrics, control file dump, start errors."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from batch_unit.test_safekeeper_service import run
from batch_unit.walproposer_support import Safekeeper, WalCluster, wait_until, wal_cluster
from batch_unit.workspace import temporary_workspace

from zenith_utils.lsn import Lsn


@pytest.fixture(scope="module")
def cluster() -> Iterator[WalCluster]:
    with temporary_workspace() as directory, wal_cluster(directory, 1) as cluster:
        postgres, _ = cluster.start()
        postgres.sql("create table t (a int)")
        yield cluster


@pytest.fixture
def safekeeper(cluster: WalCluster) -> Safekeeper:
    return cluster.safekeepers[0]


def test_timeline_status(cluster: WalCluster, safekeeper: Safekeeper) -> None:
    status = cluster.status(safekeeper)
    assert list(status)[:8] == [
        *("tenant_id", "timeline_id", "acceptor_state", "commit_lsn", "s3_wal_lsn"),
        *("peer_horizon_lsn", "remote_consistent_lsn", "flush_lsn"),
    ]
    assert (status["tenant_id"], status["timeline_id"]) == (
        str(cluster.tenant),
        str(cluster.timeline),
    )
    for name, value in status.items():
        if name.endswith("_lsn"):
            assert str(Lsn.parse(value)) == value
    acceptor = status["acceptor_state"]
    assert list(acceptor) == ["term", "epoch", "term_history"]
    assert acceptor["term"] == acceptor["epoch"] == 1
    (switch,) = acceptor["term_history"]
    assert switch["term"] == 1
    assert isinstance(switch["lsn"], int)
    assert switch["lsn"] <= Lsn.parse(status["commit_lsn"]) <= Lsn.parse(status["flush_lsn"])


def test_damaged_timeline(cluster: WalCluster, safekeeper: Safekeeper) -> None:
    """A damaged control file is named by the tool; the service takes the timeline as recovering."""
    directory = safekeeper.directory / ("ab" * 16) / ("cd" * 16)
    directory.mkdir(parents=True)
    path = directory / "safekeeper.control"
    path.write_bytes(b"x" * 100)
    result = run("--dump-control-file", str(path))
    assert (result.returncode, result.stdout) == (1, "")
    assert "safekeeper control file checksum mismatch: expected" in result.stderr
    url = f"http://127.0.0.1:{safekeeper.http_port}/v1/timeline"
    response = requests.get(f"{url}/{'ab' * 16}/{'cd' * 16}", timeout=10)
    assert response.status_code == 200
    assert response.json()["recovering"]
    assert requests.get(f"{url}/{'ab' * 16}/zz", timeout=10).status_code == 400


def test_foreign_timeline(cluster: WalCluster, safekeeper: Safekeeper) -> None:
    """What cannot be loaded is an error of this timeline, with the file's name in it."""
    own = safekeeper.directory / str(cluster.tenant) / str(cluster.timeline)
    directory = safekeeper.directory / ("ab" * 16) / ("ce" * 16)
    directory.mkdir(parents=True)
    path = directory / "safekeeper.control"
    path.write_bytes((own / "safekeeper.control").read_bytes())
    url = f"http://127.0.0.1:{safekeeper.http_port}/v1/timeline"
    response = requests.get(f"{url}/{'ab' * 16}/{'ce' * 16}", timeout=10)
    assert response.status_code == 500
    assert f"{path} belongs to timeline" in response.json()["msg"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tenant_id": [1] * 15}, "tenant_id"),
        ({"tenant_id": [1] * 15 + [256]}, "tenant_id"),
        ({"tenant_id": [1] * 15 + [True]}, "tenant_id"),
        ({"timeline_id": "12" * 16}, "timeline_id"),
        ({"timeline_id": None}, "timeline_id"),
        ({"peer_ids": 1}, "peer_ids"),
        ({"peer_ids": [-1]}, "peer_ids"),
    ],
)
def test_creation_with_bad_values(
    safekeeper: Safekeeper, change: dict[str, Any], what: str
) -> None:
    url = f"http://127.0.0.1:{safekeeper.http_port}/v1/timeline"
    body = {"tenant_id": [1] * 16, "timeline_id": [2] * 16, "peer_ids": [], **change}
    response = requests.post(url, json=body, timeout=10)
    assert response.status_code == 400
    assert response.json()["msg"].startswith(f"Bad request: Failed to parse json request {what}: ")


def test_peers_are_kept(safekeeper: Safekeeper) -> None:
    url = f"http://127.0.0.1:{safekeeper.http_port}/v1/timeline"
    body = {"tenant_id": [5] * 16, "timeline_id": list(range(16)), "peer_ids": [2, 1 << 63]}
    assert requests.post(url, json=body, timeout=10).status_code == 201
    path = safekeeper.directory / ("05" * 16) / bytes(range(16)).hex() / "safekeeper.control"
    dump = json.loads(run("--dump-control-file", str(path)).stdout)
    nothing = {"s3_wal_lsn": 0, "term": 0, "flush_lsn": 0, "commit_lsn": 0}
    assert dump["peers"] == [[2, nothing], [1 << 63, nothing]]
    assert dump["acceptor_state"] == {"term": 0, "term_history": []}
    assert dump["commit_lsn"] == dump["server"]["system_id"] == 0


def test_metrics(cluster: WalCluster, safekeeper: Safekeeper) -> None:
    labels = f'tenant_id="{cluster.tenant}",timeline_id="{cluster.timeline}"'

    def flush_lsn(page: str) -> int:
        found = re.search(rf"^safekeeper_flush_lsn{{{labels}}} ([0-9]+)$", page, re.MULTILINE)
        assert found is not None
        return int(found[1])

    # Postgres writes WAL now and then by itself.
    wait_until(
        lambda: flush_lsn(safekeeper.metrics()) == cluster.flush_lsn(safekeeper),
        "the same LSN by both ways",
    )
    text = safekeeper.metrics()
    assert re.search(rf"^safekeeper_commit_lsn{{{labels}}} ([0-9]+)$", text, re.MULTILINE)
    for name in ("write_wal_bytes", "write_wal_seconds", "flush_wal_seconds"):
        count = histogram(text, f"safekeeper_{name}", labels)
        assert count > 0, name
    assert histogram(text, "safekeeper_persist_control_file_seconds", labels) > 0
    for line in (
        r'safekeeper_disk_io_bytes{io_operation="read"} [0-9]+',
        r'safekeeper_disk_io_bytes{io_operation="write"} [0-9]+',
        r"safekeeper_maxrss_kb [1-9][0-9]+",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    served = [
        int(match[1])
        for page in (text, safekeeper.metrics())
        if (match := re.search(r"^safekeeper_serve_metrics_count ([0-9]+)$", page, re.MULTILINE))
    ]
    assert served[1] == served[0] + 1


def histogram(text: str, name: str, labels: str) -> int:
    """Number of observations, after a look at how the buckets are cumulated."""
    buckets = [
        float(count)
        for count in re.findall(
            rf'^{name}_bucket{{le="[^"]+",{labels}}} (\S+)$', text, re.MULTILINE
        )
        or re.findall(rf'^{name}_bucket{{{labels},le="[^"]+"}} (\S+)$', text, re.MULTILINE)
    ]
    assert buckets, f"no buckets of {name}"
    assert buckets == sorted(buckets)
    (count,) = re.findall(rf"^{name}_count{{{labels}}} (\S+)$", text, re.MULTILINE)
    assert float(count) == buckets[-1]
    (total,) = re.findall(rf"^{name}_sum{{{labels}}} (\S+)$", text, re.MULTILINE)
    assert float(total) > 0
    return int(float(count))


def test_commit_is_never_above_flush(cluster: WalCluster, safekeeper: Safekeeper) -> None:
    """In any scrape, while both move."""
    assert cluster.postgres is not None
    postgres = cluster.postgres
    stop = threading.Event()

    def write() -> None:
        conn = postgres.connect()
        try:
            with conn.cursor() as cursor:
                while not stop.is_set():
                    cursor.execute("insert into t values (1)")
        finally:
            conn.close()

    writer = threading.Thread(target=write)
    writer.start()
    pattern = r"^safekeeper_(flush|commit)_lsn{\S+} (\S+)$"
    seen: set[tuple[tuple[str, int], ...]] = set()
    try:
        while len(seen) < 20:
            pairs = re.findall(pattern, safekeeper.metrics(), re.MULTILINE)
            half = len(pairs) // 2
            assert half
            values = [(kind, int(value)) for kind, value in pairs]
            for (_, commit), (kind, flush) in zip(values[:half], values[half:], strict=True):
                assert kind == "flush"
                assert commit <= flush
            seen.add(tuple(values))
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recall", "1 fortnight"), "unknown unit 'fortnight'"),
        (("--recall", "soon"), "invalid duration 'soon'"),
        (("--recall", "0 s"), "longer than nothing"),
        (("--id", "seven"), "invalid int value: 'seven'"),
        (("--listen", "127.0.0.1"), "expected host:port"),
        (("--id", "-1"), "safekeeper id -1 does not fit 64 bits"),
        (("--dir", "nonexistent"), "nonexistent does not exist"),
        (("--dump-control-file", "nonexistent"), "No such file or directory"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    result = run("-D", str(tmp_path), "--id", "1", *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_version() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert re.fullmatch(r"safekeeper \S+.*\n", result.stdout)
