"""Requests for pages with LSNs of long ago, after garbage collection has passed these."""

from __future__ import annotations

import pytest
from fixtures.page_client import PageClient, PageRequestError, Relation
from fixtures.storage import FLUSH_LSN, Branch
from fixtures.utils import lsn_from_hex
from fixtures.zenith_env import ZenithEnvBuilder

SETTINGS = "checkpoint_distance=1048576;gc_horizon=0;pitr_interval='0 s'"
ROWS = 30_000
COUNT = "SELECT count(*), sum(id), count(DISTINCT t) FROM {}"


def test_old_request_lsn(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Pages that nobody touched for long are served by an old LSN as long as the newest is wanted.

    A compute knows of a page only when it was changed last. If that LSN were taken for the state it
    wants, every table that rests for longer than history is kept could be read no more.
    """
    zenith_env_builder.num_safekeepers = 1
    zenith_env_builder.pageserver_config_override = SETTINGS
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=["autovacuum=off"])
    for table in ("rests", "changes"):
        pg.safe_psql(
            f"CREATE TABLE {table} AS SELECT g AS id, 'value ' || g AS t"
            f" FROM generate_series(1, {ROWS}) g"
        )
        pg.safe_psql(f"VACUUM FREEZE {table}")
    whole = pg.safe_psql(COUNT.format("rests"))
    old = lsn_from_hex(pg.safe_psql(FLUSH_LSN)[0][0])
    branch = Branch.of(pg)
    # The node knows nothing of the pages from here on, and began at an LSN that grows old.
    pg.stop()
    pg.start()
    rests, changes = Relation.of(pg, "rests"), Relation.of(pg, "changes")
    blocks = pg.safe_psql("SELECT pg_relation_size('rests') / 8192")[0][0]
    for _ in range(3):
        pg.safe_psql("UPDATE changes SET t = t || '.' WHERE id <= 3000")
        branch.wait_for(pg)
        branch.do_gc(0)

    with PageClient(env.pageserver.service_port.pg, branch.tenant, branch.timeline) as client:
        for lsn in (0, old):
            assert client.exists(rests, lsn, latest=True)
            assert client.nblocks(rests, lsn, latest=True) == blocks
            for block in (0, blocks // 2, blocks - 1):
                assert b"value " in client.get_page(rests, block, lsn, latest=True)
            page = client.get_page(changes, 0, lsn, latest=True)
            # Its newest state, not that of the LSN: pd_lsn is where the page was changed last.
            high, low = (int.from_bytes(page[i : i + 4], "little") for i in (0, 4))
            assert (high << 32) + low > old
        with pytest.raises(PageRequestError, match="page version that was garbage collected"):
            client.get_page(rests, 0, old, latest=False)
        with pytest.raises(PageRequestError, match=r"invalid LSN\(0\) in request"):
            client.get_page(rests, 0, 0, latest=False)
        # A refusal costs the request, not the connection.
        newest = branch.last_record_lsn()
        assert b"value " in client.get_page(rests, 0, newest, latest=False)
    # The node itself, which has not read them since its start.
    assert pg.safe_psql(COUNT.format("rests")) == whole
    assert pg.safe_psql(COUNT.format("changes"))[0][0] == ROWS
