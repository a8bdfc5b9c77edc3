"""A compute over safekeepers whose logs differ: which of them it continues."""

from __future__ import annotations

import uuid
from typing import Any

from fixtures.page_verifier import verify_pages
from fixtures.utils import lsn_from_hex, lsn_to_hex, wait_until
from fixtures.zenith_env import Safekeeper, ZenithEnv, ZenithEnvBuilder

SEGMENT = 16 << 20


class Timeline:
    """The environment's first timeline, whose WAL is made by hand."""

    def __init__(self, env: ZenithEnv) -> None:
        self.env = env
        self.id = uuid.UUID(dict(env.zenith_cli.list_timelines())["main"])
        detail = env.pageserver.http_client().timeline_detail(env.initial_tenant, self.id)
        self.start = lsn_from_hex(detail["local"]["last_record_lsn"])
        self._prev = lsn_from_hex(detail["local"]["prev_record_lsn"])

    def append(self, safekeeper: Safekeeper, begin: int, message: str, **fields: Any) -> int:
        """Have a safekeeper append a record; where it ends."""
        request = {
            "lm_prefix": "prefix",
            "lm_message": message,
            "set_commit_lsn": False,
            "send_proposer_elected": False,
            "begin_lsn": begin,
            "epoch_start_lsn": begin,
            "truncate_lsn": self.start,
            **fields,
        }
        if begin == self.start:
            request["prev_lsn"] = self._prev
        answer = safekeeper.append_logical_message(self.env.initial_tenant, self.id, request)
        return int(answer["inserted_wal"]["end_lsn"])

    def wal(self, safekeeper: Safekeeper, end: int) -> bytes:
        """WAL of a safekeeper from the start on, out of its file."""
        directory = safekeeper.data_dir / self.env.initial_tenant.hex / self.id.hex
        segno = self.start // SEGMENT
        assert segno == end // SEGMENT
        path = directory / f"0000000100000000{segno:08X}.partial"
        return path.read_bytes()[self.start % SEGMENT : end % SEGMENT]

    def flush_lsn(self, safekeeper: Safekeeper) -> int:
        """Its flush LSN."""
        status = safekeeper.http_client().timeline_status(self.env.initial_tenant.hex, self.id.hex)
        return lsn_from_hex(status.flush_lsn)


def test_longer_log_of_an_older_term(zenith_env_builder: ZenithEnvBuilder) -> None:
    """It loses against a shorter one of a newer term, whose WAL may have been acknowledged.

    The safekeeper with the long one is in the quorum that elects the compute.
    """
    zenith_env_builder.num_safekeepers = 3
    env = zenith_env_builder.init_start()
    timeline = Timeline(env)
    one, two, three = env.safekeepers
    for safekeeper in (one, two, three):
        fork = timeline.append(
            safekeeper, timeline.start, "common", term=2, send_proposer_elected=True
        )
    end = fork
    for number in range(20):
        end = timeline.append(one, end, f"lost {number}", term=2)
    for safekeeper in (two, three):
        epoch_end = timeline.append(safekeeper, fork, "kept", term=3, send_proposer_elected=True)
    assert end > epoch_end
    three.stop()
    pg = env.postgres.create_start("main")
    history = env.safekeepers[0].http_client().term_history(env.initial_tenant.hex, timeline.id.hex)
    assert history[:2] == [(2, timeline.start), (3, fork)]
    # Once more for each campaign that the compute had to begin again.
    assert history[2] == (4, epoch_end) and {lsn for _, lsn in history[2:]} == {epoch_end}
    pg.safe_psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    three.start()
    lsn = lsn_from_hex(pg.safe_psql("SELECT pg_current_wal_flush_lsn()::text")[0][0])
    for safekeeper in (one, two, three):
        wait_until(
            lambda s=safekeeper: timeline.flush_lsn(s) >= lsn,  # type: ignore[misc]
            what=f"safekeeper {safekeeper.id} at {lsn_to_hex(lsn)}",
        )
    logs = [timeline.wal(safekeeper, lsn) for safekeeper in (one, two, three)]
    assert logs[0] == logs[1] == logs[2]
    assert b"prefix\0kept" in logs[0]
    assert b"lost" not in logs[0]
    # The pageserver has taken the same WAL.
    assert pg.safe_psql("SELECT sum(i) FROM t") == [(500500,)]
    verify_pages(pg)
