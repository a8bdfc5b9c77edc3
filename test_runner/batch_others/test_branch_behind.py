"""Branches at past LSNs while history is being collected: which can be made, and which live on."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder
from fixtures.zenith_fixtures import ZenithPageserverApiException

# History goes only when the test says so, in many small layers.
MANUAL = (
    "gc_horizon=0;compaction_period='0 s';pitr_interval='0 s'"
    ";checkpoint_distance=2097152;compaction_threshold=2;image_creation_threshold=1"
)
BELOW_CUTOFF = "invalid branch start lsn"
BELOW_ANCESTOR = "less than timeline ancestor lsn"


def refused(env: ZenithEnv, ancestor: tuple[str, uuid.UUID], lsn: str, text: str) -> None:
    """Neither the command nor the HTTP API makes the branch; both say why; nothing is left."""
    name, timeline = ancestor
    client = env.pageserver.http_client()
    before = client.timeline_list(env.initial_tenant)
    ask: list[Callable[[], object]] = [
        lambda: env.zenith_cli.create_branch("refused", name, ancestor_start_lsn=lsn),
        lambda: client.timeline_create(
            env.initial_tenant, ancestor_timeline_id=timeline, ancestor_start_lsn=lsn
        ),
    ]
    for create in ask:
        with pytest.raises(Exception, match=text):
            create()
    assert len(client.timeline_list(env.initial_tenant)) == len(before)


def test_branches_behind_and_garbage_collection(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Branches at two past points; the ancestor drops what they hold, and its history goes.

    People branch off the state before an accident: what they saved so must outlive everything that
    happens to the ancestor, and a branch that cannot have all its pages any more must be refused
    when it is made, not fail when it is read.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = MANUAL
    env = zenith_env_builder.init_start()
    main = env.postgres.create_start("main")
    main.safe_psql("CREATE TABLE foo (t text)")
    insert = "INSERT INTO foo SELECT 'long string to consume some space' || g FROM generate_series"
    main.safe_psql(f"{insert}(1, 100) g")
    lsn_hundred: str = main.safe_psql(FLUSH_LSN)[0][0]
    main.safe_psql(f"{insert}(1, 20000) g")
    lsn_more: str = main.safe_psql(FLUSH_LSN)[0][0]
    main.safe_psql(f"{insert}(1, 20000) g")
    hundred = env.zenith_cli.create_branch("hundred", "main", ancestor_start_lsn=lsn_hundred)
    env.zenith_cli.create_branch("more", "main", ancestor_start_lsn=lsn_more)
    env.zenith_cli.create_branch("grandchild", "hundred")

    storage = Branch.of(main)
    ancestor = "main", storage.timeline
    # Before the first state of the cluster, and before the branch's own first state.
    refused(env, ancestor, "0/42", BELOW_CUTOFF)
    refused(env, ("hundred", hundred), "0/42", BELOW_ANCESTOR)
    with pytest.raises(
        ZenithPageserverApiException,
        match="Cannot branch off the timeline that's not present locally",
    ):
        env.pageserver.http_client().timeline_create(
            env.initial_tenant, ancestor_timeline_id=uuid.uuid4()
        )

    count = "SELECT count(*) FROM foo"
    assert main.safe_psql(count) == [(40100,)]
    main.safe_psql("DROP TABLE foo")
    storage.wait_for(main)
    assert storage.do_gc(0)["layers_needed_by_branches"] > 0
    # The cutoff is no less strict after a crash.
    for restart in (False, True):
        if restart:
            env.pageserver.kill()
            env.pageserver.start()
        refused(env, ancestor, lsn_hundred, BELOW_CUTOFF)
        refused(env, ancestor, lsn_more, BELOW_CUTOFF)
        storage.do_gc(0)

    # Nothing of these has ever been read by a compute.
    for name, rows in (("hundred", 100), ("more", 20100), ("grandchild", 100)):
        branch = env.postgres.create_start(name)
        assert branch.safe_psql(count) == [(rows,)]
        branch.safe_psql("UPDATE foo SET t = t || t")
        Branch.of(branch).wait_for(branch)
        Branch.of(branch).do_gc(0)
        if name == "grandchild":
            branch.kill()
            assert branch.start().safe_psql(f"{count} WHERE t LIKE '%1%1%'") == [(20,)]
