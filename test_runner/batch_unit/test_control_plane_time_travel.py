"""A time on the command line to an LSN: what is asked, waited for and said."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from control_plane import http_client, time_travel
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

TENANT = TenantId.parse("11" * 16)
MAIN, CHILD = TimelineId.parse("22" * 16), TimelineId.parse("33" * 16)
AT = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
COMMIT_TIME = "2026-11-22T09:59:00Z"
SAFEKEEPERS = {1: "0/2000", 2: "0/3000", 3: None}


class Services:
    """Answers for the pageserver, one after the other and the last again, and the safekeepers."""

    def __init__(self) -> None:
        self.safekeepers: dict[int, str | None] = dict(SAFEKEEPERS)
        """Commit LSN by HTTP port; None: does not answer, empty: knows no such timeline."""
        self.answers: list[dict[str, Any]] = []
        self.asked: list[str] = []

    def request(
        self, address: tuple[str, int], method: str, path: str, body: object = None, **_: Any
    ) -> http_client.Answer:
        """What `http_client.request` does."""
        self.asked.append(path)
        if address[1] == 9:
            document = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            return http_client.Answer(path, 200, document)
        commit_lsn = self.safekeepers[address[1]]
        if commit_lsn is None:
            raise http_client.UnreachableError("it is down")
        return http_client.Answer(path, 200 if commit_lsn else 500, {"commit_lsn": commit_lsn})


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Services:
    made = Services()
    monkeypatch.setattr(http_client, "request", made.request)
    monkeypatch.setattr(time_travel, "_POLL", 0)
    return made


@pytest.fixture
def env() -> LocalEnv:
    text = "pg_distrib_dir = '/p'\nzenith_distrib_dir = '/z'\n[pageserver]\n"
    text += "listen_http_addr = '127.0.0.1:9'\n"
    text += "".join(f"[[safekeepers]]\nid = {n}\nhttp_port = {n}\n" for n in SAFEKEEPERS)
    env = LocalEnv.parse(text, Path("/nowhere"))
    env.branches = {"main": {TENANT: MAIN}, "child": {TENANT: CHILD}}
    return env


def answer(kind: str, received: str, **more: str | None) -> dict[str, Any]:
    return {
        "lsn": "0/1000",
        "kind": kind,
        "commit_time": COMMIT_TIME,
        "ancestor_timeline_id": None,
        "received_lsn": received,
        **more,
    }


def test_later_commit_makes_the_answer_sure(services: Services, env: LocalEnv) -> None:
    services.answers = [answer("present", "0/1000")]
    found = time_travel.find_moment(env, TENANT, MAIN, AT)
    assert found == time_travel.Moment(Lsn(0x1000), AT - timedelta(minutes=1))
    path = f"/v1/tenant/{TENANT}/timeline/{MAIN}/get_lsn_by_timestamp"
    assert services.asked[-1] == f"{path}?timestamp=2026-11-22T10:00:00Z"


def test_committed_wal_is_waited_for(services: Services, env: LocalEnv) -> None:
    """Without a later commit the answer counts once all that is committed has been looked at."""
    services.answers = [
        answer("nodata", "0/800", commit_time=None),
        answer("future", "0/2000"),
        answer("future", "0/2fff"),
        answer("future", "0/3000", lsn="0/2fe8"),
        answer("future", "0/4000"),
    ]
    assert time_travel.find_moment(env, TENANT, MAIN, AT).lsn == Lsn(0x2FE8)
    services.safekeepers = dict.fromkeys(SAFEKEEPERS, "")
    services.answers = [answer("future", "0/1000")]
    assert time_travel.find_moment(env, TENANT, MAIN, AT).lsn == Lsn(0x1000)


def test_pageserver_that_falls_behind(
    services: Services, env: LocalEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_travel, "_STALLED_AFTER", 0)
    services.answers = [answer("future", "0/1000"), answer("future", "0/2000")]
    with pytest.raises(ControlPlaneError, match=r"has WAL up to 0/2000 only .* up to 0/3000"):
        time_travel.find_moment(env, TENANT, MAIN, AT)
    services.safekeepers = dict.fromkeys(SAFEKEEPERS)
    with pytest.raises(ControlPlaneError, match="no safekeeper answers"):
        time_travel.find_moment(env, TENANT, MAIN, AT)


def test_refusals(services: Services, env: LocalEnv) -> None:
    services.answers = [answer("past", "0/1000")]
    oldest = "the oldest time that can be had.* is 2026-11-22 09:59:00\\+00:00"
    with pytest.raises(ControlPlaneError, match=f"before the history of branch 'main': {oldest}"):
        time_travel.find_moment(env, TENANT, MAIN, AT)
    services.answers = [answer("past", "0/1000", ancestor_timeline_id=str(MAIN))]
    with pytest.raises(ControlPlaneError, match=f"{oldest}, .* of its ancestor, branch 'main'"):
        time_travel.find_moment(env, TENANT, CHILD, AT)
    services.answers = [answer("nodata", "0/3000", commit_time=None)]
    with pytest.raises(ControlPlaneError, match="branch 'main' has no commits yet"):
        time_travel.find_moment(env, TENANT, MAIN, AT)
    services.asked.clear()
    with pytest.raises(ControlPlaneError, match="is in the future"):
        time_travel.find_moment(env, TENANT, MAIN, datetime.now(UTC) + timedelta(hours=1))
    assert services.asked == []
