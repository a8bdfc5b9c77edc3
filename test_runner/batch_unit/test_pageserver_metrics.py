"""The pageserver's metrics: names, types and labels that dashboards and scripts rely on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from batch_unit.pageserver_support import Root, running
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from postgres_ffi.relfile import RelTag
from zenith_utils.pq_client import PqError

pytestmark = pytest.mark.timeout(120)
TIMELINE = ("tenant_id", "timeline_id")
PG_CLASS = RelTag(1663, 5, 1259, 0)

EXPECTED = {
    "pageserver_serve_metrics_count": ("counter", ()),
    "pageserver_disk_io_bytes": ("gauge", ("io_operation",)),
    "pageserver_maxrss_kb": ("gauge", ()),
    "pageserver_live_connections_count": ("gauge", ("pageserver_connection_kind",)),
    "pageserver_smgr_query_time": ("histogram", ("smgr_query_type", *TIMELINE)),
    "pageserver_getpage_reconstruct_time": ("histogram", TIMELINE),
    "pageserver_storage_time": ("histogram", ("operation", *TIMELINE)),
    "pageserver_io_time": ("histogram", ("operation", *TIMELINE)),
    "pageserver_io_size": ("counter", ("operation", *TIMELINE)),
    "pageserver_ondisk_layers": ("gauge", ()),
    "pageserver_wal_redo_time": ("histogram", ()),
    "pageserver_wal_redo_wait_time": ("histogram", ()),
    "pageserver_wal_records_replayed": ("counter", ()),
    "pageserver_remote_storage_remaining_sync_items": ("gauge", ()),
    "pageserver_remote_storage_fatal_task_failures": ("counter", ()),
    "pageserver_remote_storage_image_sync_time": ("histogram", ("operation_kind", "status")),
    "pageserver_http_requests_count": ("counter", ("method", "path", "status")),
    "pageserver_open_layers_bytes": ("gauge", ()),
    "pageserver_open_layer_files": ("gauge", ()),
    "pageserver_layer_index_bytes": ("gauge", ()),
    "pageserver_page_cache_bytes": ("gauge", ()),
    "pageserver_page_cache_hits": ("counter", ()),
    "pageserver_page_cache_misses": ("counter", ()),
    "pageserver_block_cache_bytes": ("gauge", ()),
    "pageserver_block_cache_hits": ("counter", ()),
    "pageserver_block_cache_misses": ("counter", ()),
}


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    """A pageserver that has done a bit of everything."""
    with running() as root:
        names = f"{root.tenant} {root.timeline}"
        root.server.query(f"checkpoint {names}")
        root.server.query(f"do_gc {names} 0")
        with root.pages() as client:
            client.exists(PG_CLASS, root.lsn)
            client.nblocks(PG_CLASS, root.lsn)
            client.page(PG_CLASS, 0, root.lsn)
        yield root


def scrape(root: Root) -> dict[str, Metric]:
    """All families of a page, read as Prometheus does."""
    return {family.name: family for family in text_string_to_metric_families(root.server.metrics())}


def values(family: Metric, suffix: str, label: str) -> dict[str, float]:
    """Sum of the samples with that end of their name, by the value of a label.

    The parser adds ``_total`` to the names of counters.
    """
    found: dict[str, float] = {}
    for sample in family.samples:
        if sample.name == family.name + suffix:
            key = sample.labels[label]
            found[key] = found.get(key, 0) + sample.value
    return found


def test_names_types_and_labels(root: Root) -> None:
    families = scrape(root)
    assert {name: family.type for name, family in families.items()} == {
        name: kind for name, (kind, _) in EXPECTED.items()
    }
    for name, (_, labels) in EXPECTED.items():
        assert families[name].documentation
        assert families[name].samples, name
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == set(labels), sample


def test_label_values(root: Root) -> None:
    families = scrape(root)
    queries = values(families["pageserver_smgr_query_time"], "_count", "smgr_query_type")
    assert set(queries) == {"get_rel_exists", "get_rel_size", "get_page_at_lsn"}
    assert all(count >= 1 for count in queries.values())
    assert "gc" in values(families["pageserver_storage_time"], "_count", "operation")
    connections = values(
        families["pageserver_live_connections_count"], "", "pageserver_connection_kind"
    )
    assert set(connections) == {"page_service", "wal_receiver"}
    timelines = values(families["pageserver_io_size"], "_total", "timeline_id")
    assert set(timelines) == {str(root.timeline)}
    sync = families["pageserver_remote_storage_image_sync_time"]
    assert values(sync, "_count", "operation_kind") == {"upload": 0, "download": 0}


def test_reads_and_writes_of_layers_are_counted(root: Root) -> None:
    families = scrape(root)
    calls = values(families["pageserver_io_time"], "_count", "operation")
    assert set(calls) == {"open", "read", "write", "fsync"}
    assert all(count >= 1 for count in calls.values()), calls
    sizes = values(families["pageserver_io_size"], "_total", "operation")
    layers = root.server.workdir / f"tenants/{root.tenant}/timelines/{root.timeline}"
    stored = sum(path.stat().st_size for path in layers.iterdir() if "__" in path.name)
    assert sizes["write"] >= stored > 1 << 20
    assert sizes["read"] > 0
    assert 0 < values(families["pageserver_io_time"], "_sum", "operation")["read"] < 60


def test_branches_without_layers_take_no_lines(root: Root) -> None:
    """The page stays short however many there are."""
    branch = root.server.create_timeline(root.tenant, ancestor=root.timeline)
    root.server.local(root.tenant, branch)
    assert str(branch) not in root.server.metrics()


def test_lines_that_scripts_look_for(root: Root) -> None:
    """By regular expressions, so blanks and the order of labels count."""
    text = root.server.metrics()
    for pattern in (
        r'^pageserver_disk_io_bytes{io_operation="write"} (\S+)$',
        r'^pageserver_disk_io_bytes{io_operation="read"} (\S+)$',
        r"^pageserver_maxrss_kb (\S+)$",
    ):
        (value,) = re.findall(pattern, text, re.MULTILINE)
        assert float(value) >= 0
    served = re.compile(r"^pageserver_serve_metrics_count (\d+)$", re.MULTILINE)
    first, second = (int(served.findall(root.server.metrics())[0]) for _ in range(2))
    assert second == first + 1


def test_requests_that_fail_are_not_counted(root: Root) -> None:
    def count() -> float:
        family = scrape(root)["pageserver_smgr_query_time"]
        return sum(values(family, "_count", "smgr_query_type").values())

    before = count()
    with pytest.raises(PqError):
        root.server.query(f"pagestream {root.tenant} {'0' * 32}")
    with root.pages() as client:
        client.ask(bytes(23))
    assert count() == before
