"""Several tenants on the same servers: nothing of one shows or matters in another."""

from __future__ import annotations

import re
import uuid

import pytest
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.utils import lsn_from_hex, wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder
from fixtures.zenith_fixtures import ZenithPageserverApiException


def labelled(metrics: str) -> set[tuple[str, str]]:
    """The (tenant, timeline) pairs that a metrics page has numbers of."""
    pattern = r'tenant_id="([0-9a-f]{32})",timeline_id="([0-9a-f]{32})"'
    return set(re.findall(pattern, metrics))


def check_metrics(env: ZenithEnv, branches: list[Branch], lsns: list[str]) -> None:
    """Each server tells the tenants' numbers apart."""
    pairs = {(branch.tenant.hex, branch.timeline.hex) for branch in branches}
    assert pairs <= labelled(env.pageserver.http_client().get_metrics())
    for safekeeper in env.safekeepers:

        def caught_up(s: object = safekeeper) -> bool:
            metrics = s.http_client().get_metrics()  # type: ignore[attr-defined]
            return all(
                metrics.flush_lsn_inexact[branch.tenant.hex, branch.timeline.hex]
                >= metrics.commit_lsn_inexact[branch.tenant.hex, branch.timeline.hex]
                >= lsn_from_hex(lsn)
                for branch, lsn in zip(branches, lsns, strict=True)
            )

        wait_until(caught_up, what=f"safekeeper {safekeeper.id} to show both tenants' LSNs")


@pytest.mark.parametrize("num_safekeepers", [0, 3])
def test_tenants_normal_work(zenith_env_builder: ZenithEnvBuilder, num_safekeepers: int) -> None:
    """Two tenants with branches of the same names work side by side, over restarts, each alone.

    Tenants are strangers to one another: a row, a branch or a node of one that shows up in the
    other's hands is the worst that a shared service can do.
    """
    zenith_env_builder.num_safekeepers = num_safekeepers
    env = zenith_env_builder.init_start()
    tenants = [env.initial_tenant, env.zenith_cli.create_tenant()]
    env.zenith_cli.create_timeline("main", tenants[1])
    listed = [line.split() for line in env.zenith_cli.list_tenants().stdout.splitlines()]
    assert {tenant for tenant, _ in listed} == {tenant.hex for tenant in tenants}
    nodes = []
    for number, tenant in enumerate(tenants):
        env.zenith_cli.create_branch("work", "main", tenant_id=tenant)
        # Nodes of the same name as well.
        node = env.postgres.create_start("work", node_name="node", tenant_id=tenant)
        assert node.safe_psql("SHOW zenith.zenith_tenant") == [(tenant.hex,)]
        node.safe_psql("CREATE TABLE t (i int, tenant int)")
        node.safe_psql(f"CREATE TABLE of_{number} ()")
        nodes.append(node)
    for round_ in range(3):
        for number, node in enumerate(nodes):
            node.safe_psql(
                f"INSERT INTO t SELECT g, {number} FROM generate_series(1, {1000 + number}) g"
            )
        if round_ == 0:
            env.pageserver.kill()
            env.pageserver.start()
        elif round_ == 1:
            nodes[0].kill()
            nodes[0].start()
    for number, node in enumerate(nodes):
        rows = 3 * (1000 + number)
        assert node.safe_psql("SELECT count(*), min(tenant), max(tenant) FROM t") == [
            (rows, number, number)
        ]
        assert node.safe_psql("SELECT tablename FROM pg_tables WHERE tablename ~ '^of_'") == [
            (f"of_{number}",)
        ]
    check_metrics(
        env, [Branch.of(node) for node in nodes], [n.safe_psql(FLUSH_LSN)[0][0] for n in nodes]
    )

    # One that stops, or goes as far as to have its history collected, is not noticed by the other.
    nodes[0].stop()
    Branch.of(nodes[0]).do_gc(0)
    assert nodes[1].safe_psql("SELECT count(*) FROM t") == [(3003,)]
    client = env.pageserver.http_client()
    timelines = [{t["timeline_id"] for t in client.timeline_list(tenant)} for tenant in tenants]
    assert len(timelines[0]) == len(timelines[1]) == 2
    assert not timelines[0] & timelines[1]
    # The other one's timeline is not to be had by its id either.
    foreign = uuid.UUID(min(timelines[0]))
    with pytest.raises(ZenithPageserverApiException, match="not found"):
        client.timeline_detail(tenants[1], foreign)
    with pytest.raises(ZenithPageserverApiException, match="Cannot branch off the timeline"):
        client.timeline_create(tenants[1], ancestor_timeline_id=foreign)
