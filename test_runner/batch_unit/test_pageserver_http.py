"""The HTTP API: shapes, errors, leases, branches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from batch_unit.pageserver_support import (
    HttpError,
    PageClient,
    Root,
    running,
)

from postgres_ffi.relfile import RelTag
from zenith_utils.ids import TimelineId
from zenith_utils.lsn import Lsn

pytestmark = pytest.mark.timeout(120)
NOBODY = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    with running() as root:
        yield root


def test_http_shapes(root: Root) -> None:
    server = root.server
    assert {"id": str(root.tenant), "state": "Idle"} in server.http("GET", "tenant")
    empty = server.create_tenant()
    assert server.http("GET", f"tenant/{empty}/timeline") == []
    path = f"tenant/{root.tenant}/timeline/{root.timeline}?include-non-incremental-logical-size=1"
    info = server.http("GET", path)
    local = info.pop("local")
    assert info == {
        "tenant_id": str(root.tenant),
        "timeline_id": str(root.timeline),
        "remote": None,
    }
    assert local["timeline_state"] == "Loaded"
    assert local["ancestor_timeline_id"] is None and local["ancestor_lsn"] is None
    assert local["disk_consistent_lsn"] == local["last_record_lsn"] == str(root.lsn)
    size = local["current_logical_size"]
    assert size == local["current_logical_size_non_incremental"] > 20_000_000
    plain = server.local(root.tenant, root.timeline)
    assert plain["current_logical_size_non_incremental"] is None


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "answer"),
    [
        ("GET", "nothing", None, 404, {"msg": "page not found"}),
        ("DELETE", "tenant", None, 404, {"msg": "page not found"}),
        (
            "GET",
            "tenant/xyz/timeline",
            None,
            400,
            {"msg": "Bad request: failed to parse tenant_id"},
        ),
        (
            "GET",
            f"tenant/{NOBODY}/timeline/x",
            None,
            400,
            {"msg": "Bad request: failed to parse timeline_id"},
        ),
        (
            "GET",
            f"tenant/{NOBODY}/timeline",
            None,
            500,
            {"msg": f"Failed to get repo for tenant {NOBODY}"},
        ),
        (
            "GET",
            f"tenant/{NOBODY}/timeline/{NOBODY}",
            None,
            500,
            {"msg": f"Tenant {NOBODY} not found"},
        ),
    ],
)
def test_http_errors(
    root: Root, method: str, path: str, body: object, status: int, answer: object
) -> None:
    with pytest.raises(HttpError) as caught:
        root.server.http(method, path, body)
    assert (caught.value.status, caught.value.body) == (status, answer)


def test_http_conflicts_and_unknown_timelines(root: Root) -> None:
    server = root.server
    for path, body in (
        ("tenant", {"new_tenant_id": str(root.tenant)}),
        (f"tenant/{root.tenant}/timeline", {"new_timeline_id": str(root.timeline)}),
    ):
        with pytest.raises(HttpError) as caught:
            server.http("POST", path, body)
        assert (caught.value.status, caught.value.body) == (409, None)
    with pytest.raises(HttpError, match="not found neither locally nor remotely") as caught:
        server.http("GET", f"tenant/{root.tenant}/timeline/{NOBODY}")
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("action", "known", "status", "message"),
    [
        ("attach", True, 500, "Timeline is already present locally"),
        ("attach", False, 400, "Bad request: Unknown remote timeline"),
        ("detach", False, 500, "cannot detach timeline that is not available locally"),
        ("detach", True, 409, "has no copy in remote storage: detaching would destroy it"),
    ],
)
def test_attach_and_detach_without_remote_storage(
    root: Root, action: str, known: bool, status: int, message: str
) -> None:
    timeline = root.timeline if known else NOBODY
    with pytest.raises(HttpError, match=message) as caught:
        root.server.http("POST", f"tenant/{root.tenant}/timeline/{timeline}/{action}")
    assert caught.value.status == status
    assert root.server.local(root.tenant, root.timeline)


def test_lsn_by_timestamp(root: Root) -> None:
    server, timeline = root.server, f"tenant/{root.tenant}/timeline/{root.timeline}"
    path = timeline + "/get_lsn_by_timestamp"
    fresh = server.http("GET", path + "?timestamp=2026-11-22T10:00:00Z")
    assert fresh.pop("received_lsn") >= str(root.lsn)
    assert fresh == {
        "lsn": str(root.lsn),
        "kind": "nodata",
        "commit_time": None,
        "ancestor_timeline_id": None,
    }
    for query, message in (
        ("", "missing query parameter `timestamp`"),
        ("?timestamp=noon", "invalid timestamp 'noon'"),
        ("?timestamp=2026-11-22T10:00:00+00:00", "invalid timestamp '2026-11-22T10:00:00 00:00'"),
    ):
        with pytest.raises(HttpError, match=message) as caught:
            server.http("GET", path + query)
        assert caught.value.status == 400
    assert server.http("GET", path + "?timestamp=2026-11-22T10:00:00%2B00:00")["kind"] == "nodata"
    with pytest.raises(HttpError, match="not found neither locally nor remotely") as caught:
        server.http(
            "GET", path.replace(str(root.timeline), NOBODY) + "?timestamp=2026-11-22T10:00:00Z"
        )
    assert caught.value.status == 404


def test_lsn_leases(root: Root) -> None:
    server = root.server
    path = f"tenant/{root.tenant}/timeline/{root.timeline}/lsn_lease"
    lease = server.http("POST", path, {"lsn": str(root.lsn), "ttl": 60})
    assert lease["lsn"] == str(root.lsn)
    assert 0 < lease["expires_in"] <= 60
    one = f"{path}/{lease['lease_id']}"
    assert server.http("PUT", one, {"ttl": 600})["expires_in"] > 60
    assert server.http("DELETE", one) is None
    with pytest.raises(HttpError, match="unknown or has expired") as caught:
        server.http("PUT", one, {"ttl": 60})
    assert caught.value.status == 410
    again = server.http("PUT", one, {"ttl": 60, "lsn": str(root.lsn)})
    assert again["lease_id"] == lease["lease_id"]
    # What has not come yet is not gone.
    with pytest.raises(HttpError, match="Timed out while waiting") as caught:
        server.http("PUT", f"{path}/{'b' * 32}", {"ttl": 60, "lsn": "7/0"})
    assert caught.value.status == 409
    with pytest.raises(HttpError, match="garbage collected") as caught:
        server.http("PUT", f"{path}/{'b' * 32}", {"ttl": 60, "lsn": "0/8"})
    assert caught.value.status == 410
    for body in (
        {"lsn": str(root.lsn)},
        {"ttl": 5},
        {"ttl": -1, "lsn": "0/8"},
        {"ttl": 5, "lsn": "x"},
    ):
        with pytest.raises(HttpError) as caught:
            server.http("POST", path, body)
        assert caught.value.status == 400
    with pytest.raises(HttpError, match="garbage collected"):
        server.http("POST", path, {"lsn": "0/8", "ttl": 5})


@pytest.mark.parametrize(
    "ttl", ["NaN", "Infinity", "1e999", "9" * 400, "true", '"5"', "0", "86401"]
)
def test_times_that_no_lease_has(root: Root, ttl: str) -> None:
    url = f"http://127.0.0.1:{root.server.http_port}/v1/tenant/{root.tenant}/timeline"
    body = f'{{"lsn": "{root.lsn}", "ttl": {ttl}}}'
    response = requests.post(f"{url}/{root.timeline}/lsn_lease", data=body, timeout=30)
    assert response.status_code == 400
    assert "field `ttl` must be" in response.json()["msg"]


def test_ids_of_leases(root: Root) -> None:
    """Only what leases are called is remembered, however it is asked for."""
    path = f"tenant/{root.tenant}/timeline/{root.timeline}/lsn_lease"
    for lease_id in ("x", "A" * 32, "a" * 33, "%C3%A9" * 32):
        for method, body in (("PUT", {"ttl": 5, "lsn": str(root.lsn)}), ("DELETE", None)):
            with pytest.raises(HttpError, match="Bad request: failed to parse lease_id"):
                root.server.http(method, f"{path}/{lease_id}", body)
    with pytest.raises(HttpError, match=f"NotFound: Tenant {NOBODY} not found") as caught:
        root.server.http("DELETE", f"tenant/{NOBODY}/timeline/{NOBODY}/lsn_lease/{'a' * 32}")
    assert caught.value.status == 404


# ---- branches


def test_start_lsn_needs_an_ancestor(root: Root) -> None:
    """Whoever asks for a branch does not get an empty cluster."""
    before = root.server.http("GET", f"tenant/{root.tenant}/timeline")
    with pytest.raises(
        HttpError, match="ancestor_start_lsn needs an ancestor_timeline_id"
    ) as caught:
        root.server.create_timeline(root.tenant, lsn=root.lsn)
    assert caught.value.status == 400
    assert root.server.http("GET", f"tenant/{root.tenant}/timeline") == before


def test_unknown_keys_are_ignored(root: Root) -> None:
    """Newer clients may know more; what they ask of this server is still clear."""
    body = {"new_timeline_id": str(root.timeline), "no_such_key": 1}
    with pytest.raises(HttpError) as caught:
        root.server.http("POST", f"tenant/{root.tenant}/timeline", body)
    assert caught.value.status == 409


def test_branches_share_their_past(root: Root) -> None:
    server = root.server
    branch = server.create_timeline(root.tenant, ancestor=root.timeline)
    local = server.local(root.tenant, branch)
    assert local["ancestor_timeline_id"] == str(root.timeline)
    assert local["ancestor_lsn"] == local["last_record_lsn"] == str(root.lsn)
    assert local["disk_consistent_lsn"] == str(root.lsn)
    original = server.local(root.tenant, root.timeline)
    assert local["prev_record_lsn"] == original["prev_record_lsn"]
    assert local["current_logical_size"] == original["current_logical_size"]
    rel = RelTag(1663, 5, 1259, 0)
    with root.pages() as client:
        expected = client.page(rel, 0, root.lsn)
    client = PageClient(server, root.tenant, branch)
    assert client.page(rel, 0, root.lsn) == expected
    client.close()


@pytest.mark.parametrize(
    ("lsn", "text"),
    [
        (Lsn(8), "invalid branch start lsn"),
        (Lsn.parse("7/0"), "Timed out while waiting for WAL record at LSN 7/0 to arrive"),
    ],
)
def test_branch_points_out_of_range(root: Root, lsn: Lsn, text: str) -> None:
    with pytest.raises(HttpError, match=text) as caught:
        root.server.create_timeline(root.tenant, ancestor=root.timeline, lsn=lsn)
    assert caught.value.status == 500
    if lsn == 8:
        # What the client need not know is for the log.
        assert "LSN 0/8 is earlier than latest GC horizon" in root.server.log()


def test_branch_of_nothing(root: Root) -> None:
    with pytest.raises(HttpError, match="Cannot branch off the timeline that's not present"):
        root.server.create_timeline(root.tenant, ancestor=TimelineId.parse(NOBODY))
