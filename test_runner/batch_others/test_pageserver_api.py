"""Tenants and timelines over the pageserver's own interfaces, as tools other than ours use them."""

from __future__ import annotations

import uuid
from typing import Any

import psycopg2
import pytest
from fixtures.storage import Branch
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder
from fixtures.zenith_fixtures import ZenithPageserverApiException, ZenithPageserverHttpClient


def state(client: ZenithPageserverHttpClient, tenant: uuid.UUID) -> str | None:
    """The state of a tenant as it is listed."""
    found = [t["state"] for t in client.tenant_list() if t["id"] == tenant.hex]
    assert len(found) <= 1
    return found[0] if found else None


def test_tenants_and_timelines_over_http(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Tenant, timeline, branch: made, listed, described, used by a compute, there after a restart.

    Control planes of others drive a pageserver by this API alone. What an answer says must be so at
    once, and durable: a tenant or branch that its owner was told of may not be gone after a crash.
    """
    env = zenith_env_builder.init_start()
    client = env.pageserver.http_client()
    client.check_status()
    assert state(client, env.initial_tenant) == "Idle"
    tenant, named = client.tenant_create(), uuid.uuid4()
    assert client.tenant_create(named) == named
    assert {env.initial_tenant, tenant, named} == {uuid.UUID(t["id"]) for t in client.tenant_list()}
    assert client.timeline_list(tenant) == []

    root, branch_id = uuid.uuid4(), uuid.uuid4()
    created = client.timeline_create(tenant, root)
    local = created["local"]
    assert created["tenant_id"] == tenant.hex
    assert created["timeline_id"] == root.hex
    assert created["remote"] is None
    assert local["timeline_state"] == "Loaded"
    assert local["ancestor_timeline_id"] is local["ancestor_lsn"] is None
    assert lsn_from_hex(local["disk_consistent_lsn"]) > 0
    described = client.timeline_detail(tenant, root)["local"]
    assert described["current_logical_size"] == described["current_logical_size_non_incremental"]
    start = local["last_record_lsn"]
    branch = client.timeline_create(tenant, branch_id, root, start)["local"]
    assert branch["ancestor_timeline_id"] == root.hex
    assert branch["ancestor_lsn"] == branch["last_record_lsn"] == start
    newest = client.timeline_create(tenant, ancestor_timeline_id=root)
    timelines = {root.hex, branch_id.hex, newest["timeline_id"]}
    assert {t["timeline_id"] for t in client.timeline_list(tenant)} == timelines
    # None of it has a name yet, and the tree of the command shows it all the same.
    shown = env.zenith_cli.raw_cli(["timeline", "list", "--tenant-id", tenant.hex]).stdout
    assert shown.count("_no_name_") == 3

    check_refusals(client, tenant, root, named)
    env.pageserver.kill()
    env.pageserver.start()
    assert {t["timeline_id"] for t in client.timeline_list(tenant)} == timelines
    assert state(client, named) == "Idle"

    # The first WAL makes a tenant active.
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    lsn = Branch.of(main).wait_for(main)
    assert state(client, env.initial_tenant) == "Active"
    detail = client.timeline_detail(env.initial_tenant, Branch.of(main).timeline)["local"]
    assert lsn_from_hex(detail["last_record_lsn"]) >= lsn_from_hex(lsn)
    # A branch that was made behind the command's back is found by it.
    assert len(env.zenith_cli.list_timelines()) == 1
    client.timeline_create(env.initial_tenant, ancestor_timeline_id=Branch.of(main).timeline)
    wait_until(lambda: len(env.zenith_cli.list_timelines()) == 2, what="the branch to be listed")


def check_refusals(
    client: ZenithPageserverHttpClient, tenant: uuid.UUID, root: uuid.UUID, other: uuid.UUID
) -> None:
    """What exists is not made again, what does not exist is named, and nothing changes."""
    before = client.tenant_list(), client.timeline_list(tenant), client.timeline_list(other)
    base = f"http://localhost:{client.port}/v1/tenant"
    answer = client.post(base, json={"new_tenant_id": tenant.hex})
    assert answer.status_code == 409
    answer = client.post(f"{base}/{tenant.hex}/timeline", json={"new_timeline_id": root.hex})
    assert answer.status_code == 409
    unknown = uuid.uuid4()
    with pytest.raises(ZenithPageserverApiException, match=unknown.hex):
        client.timeline_list(unknown)
    with pytest.raises(ZenithPageserverApiException, match=unknown.hex):
        client.timeline_create(unknown)
    with pytest.raises(ZenithPageserverApiException, match="not found"):
        client.timeline_detail(tenant, unknown)
    with pytest.raises(ZenithPageserverApiException, match="not present locally"):
        client.timeline_create(tenant, ancestor_timeline_id=unknown)
    # One tenant's timeline is nobody else's ancestor.
    with pytest.raises(ZenithPageserverApiException, match="not present locally"):
        client.timeline_create(other, ancestor_timeline_id=root)
    bad: list[tuple[str, dict[str, Any]]] = [
        (base, {"new_tenant_id": "no id"}),
        (f"{base}/{tenant.hex}/timeline", {"ancestor_start_lsn": "yesterday"}),
        (f"{base}/no-id/timeline", {}),
    ]
    for url, body in bad:
        answer = client.post(url, json=body)
        assert answer.status_code == 400
        assert answer.json()["msg"].startswith("Bad request")
    assert before == (
        client.tenant_list(),
        client.timeline_list(tenant),
        client.timeline_list(other),
    )


def fails(env: ZenithEnv, command: str) -> str:
    """What the pageserver says to a bad command on a connection that goes on afterwards."""
    connection = env.pageserver.connect()
    try:
        with connection.cursor() as cursor:
            with pytest.raises(psycopg2.Error) as error:
                cursor.execute(command)
            cursor.execute("set FOO")
    finally:
        connection.close()
    return str(error.value)


def test_commands_over_libpq(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Bad commands get one clear error each, and the connection lives on; good ones go on working.

    The service is driven with psql by people at three in the morning: a connection that is cut
    without a word, or a daemon that dies of a typo, is the last that they need.
    """
    env = zenith_env_builder.init_start()
    timeline = dict(env.zenith_cli.list_timelines())["main"]
    tenant, unknown = env.initial_tenant.hex, uuid.uuid4().hex
    assert "unknown command" in fails(env, "SELECT 1")
    assert "unknown command" in fails(env, "basebackups")
    for command in ("do_gc", "checkpoint", "basebackup", "pagestream", "callmemaybe"):
        assert f"invalid param number for {command}" in fails(env, command)
        assert f"invalid param number for {command}" in fails(env, f"{command} {tenant}")
        suffix = " host=nowhere" if command == "callmemaybe" else ""
        for ids in (f"{unknown} {timeline}", f"{tenant} {unknown}", "no ids"):
            assert fails(env, f"{command} {ids}{suffix}")
    assert "invalid number of bytes 'x'" in fails(env, f"do_gc {tenant} {timeline} x")
    assert "invalid basebackup lsn" in fails(env, f"basebackup {tenant} {timeline} 0/42")
    assert env.pageserver.safe_psql(f"checkpoint {tenant} {timeline}") == []
    ((*counts, elapsed),) = env.pageserver.safe_psql(f"do_gc {tenant} {timeline} 0")
    assert counts[0] == sum(counts[1:])
    assert elapsed >= 0
