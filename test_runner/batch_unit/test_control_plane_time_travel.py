"""A time on the command line to an LSN: what is asked, waited for and said."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from control_plane import http_client, time_travel
from control_plane.errors import ControlPlaneError
from control_plane.local_env import GenerationMember, LocalEnv, SafekeeperGeneration
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

TENANT = TenantId.parse("11" * 16)
MAIN, CHILD = TimelineId.parse("22" * 16), TimelineId.parse("33" * 16)
AT = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
COMMIT_TIME = "2026-11-22T09:59:00Z"


@dataclass(frozen=True)
class Log:
    """A safekeeper's WAL of the timeline: one number stands for an LSN of that many 4096 bytes."""

    end: int
    epoch: int = 1
    begin: int = 0
    recovering: bool = False
    established: int = 0
    failed: bool = False

    def answer(self) -> http_client.Answer:
        """What the safekeeper says."""
        if self.failed:
            return http_client.Answer("", 500, {"msg": "its control file is damaged"})
        history = [{"term": self.epoch, "lsn": self.begin << 12}]
        document = {
            "acceptor_state": {"term": 9, "epoch": self.epoch, "term_history": history},
            "flush_lsn": str(Lsn(self.end << 12)),
            # Told late, persisted later.
            "commit_lsn": "0/1000",
            "established": self.established,
            "recovering": self.recovering,
        }
        return http_client.Answer("", 200, document)


EMPTY = "empty"
DOWN = None
SAFEKEEPERS: tuple[Log | str | None, ...] = (Log(2), Log(3), DOWN)


class Services:
    """Answers for the pageserver, one after the other and the last again, and the safekeepers."""

    def __init__(self) -> None:
        self.safekeepers = SAFEKEEPERS
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
        log = self.safekeepers[address[1] - 1]
        if log is DOWN:
            raise http_client.UnreachableError("it is down")
        if path == "/v1/timeline":
            ids = {"tenant_id": str(TENANT), "timeline_id": str(CHILD if log == EMPTY else MAIN)}
            return http_client.Answer(path, 200, [ids])
        if isinstance(log, Log):
            return log.answer()
        return http_client.Answer(path, 500, {"msg": "timeline is not on this safekeeper"})


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
    text += "".join(
        f"[[safekeepers]]\nid = {n}\nhttp_port = {n}\ninstance = '{n}'\n" for n in (1, 2, 3)
    )
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


def test_acknowledged_wal_is_waited_for(services: Services, env: LocalEnv) -> None:
    """Without a later commit the answer counts once all has been looked at that may hold one."""
    services.answers = [
        answer("nodata", "0/800", commit_time=None),
        answer("future", "0/2000"),
        answer("future", "0/2fff"),
        answer("future", "0/3000", lsn="0/2fe8"),
        answer("future", "0/4000"),
    ]
    assert time_travel.find_moment(env, TENANT, MAIN, AT).lsn == Lsn(0x2FE8)
    services.safekeepers = (EMPTY,) * 3
    services.answers = [answer("future", "0/1000")]
    assert time_travel.find_moment(env, TENANT, MAIN, AT).lsn == Lsn(0x1000)


def generation(number: int, *instances: str) -> SafekeeperGeneration:
    return SafekeeperGeneration(number, [GenerationMember(instance=i) for i in instances])


@pytest.mark.parametrize(
    ("safekeepers", "earlier", "waits_for"),
    [
        pytest.param((Log(5), Log(3), Log(4)), [], 4, id="on a majority"),
        pytest.param((Log(5), Log(3), DOWN), [], 5, id="one is down and may have all"),
        pytest.param((Log(5), Log(3, recovering=True), Log(2)), [], 5, id="one has lost some"),
        pytest.param((Log(5), Log(3, failed=True), Log(2)), [], 5, id="one has failed"),
        pytest.param((Log(5), EMPTY, Log(2)), [], 2, id="one is new"),
        pytest.param((Log(5), EMPTY, EMPTY), [], 0, id="nothing on a majority"),
        pytest.param(
            (Log(9), Log(6, epoch=2, begin=4), Log(5, epoch=2, begin=4)), [], 5, id="newer term"
        ),
        pytest.param(
            (Log(9), Log(6, epoch=2, begin=4), Log(3)), [], 4, id="newer term with little yet"
        ),
        pytest.param(
            (Log(5), Log(3), EMPTY), [generation(1, "1", "2", "9")], 5, id="one was replaced"
        ),
        pytest.param(
            (Log(5, established=2), Log(3), Log(3)),
            [generation(1, "1", "2", "9")],
            3,
            id="and its successor is established",
        ),
    ],
)
def test_what_may_be_acknowledged(
    services: Services,
    env: LocalEnv,
    safekeepers: tuple[Log | str | None, ...],
    earlier: list[SafekeeperGeneration],
    waits_for: int,
) -> None:
    """Everything that a majority may have on disk, whatever is known to be committed."""
    env.earlier_generations = earlier
    services.safekeepers = safekeepers
    services.answers = [
        answer("future", str(Lsn((n << 12) + offset)), lsn=str(Lsn((n << 12) + offset)))
        for n in range(7)
        for offset in (0, 0x800)
    ]
    assert time_travel.find_moment(env, TENANT, MAIN, AT).lsn == Lsn(waits_for << 12)


@pytest.mark.parametrize(
    ("safekeepers", "earlier", "said"),
    [
        ((DOWN, Log(1), DOWN), [], "only 1 of the 3 safekeepers answer"),
        ((DOWN, Log(1, recovering=True), Log(1)), [], "only 1 of the 3 safekeepers answer"),
        ((DOWN, DOWN, DOWN), [], "no safekeeper answers"),
        (
            (DOWN, Log(1), EMPTY),
            [generation(4, "1", "2", "9")],
            "only 1 of the 3 safekeepers of generation 4 answer",
        ),
    ],
)
def test_too_few_safekeepers(
    services: Services,
    env: LocalEnv,
    safekeepers: tuple[Log | str | None, ...],
    earlier: list[SafekeeperGeneration],
    said: str,
) -> None:
    """The others may have commits that nobody else knows, unless a later one is known already."""
    env.earlier_generations = earlier
    services.safekeepers = safekeepers
    services.answers = [answer("future", "0/9000")]
    with pytest.raises(ControlPlaneError, match=f"{said}, so the newest commits are not known"):
        time_travel.find_moment(env, TENANT, MAIN, AT)
    services.answers = [answer("present", "0/1000")]
    assert time_travel.find_moment(env, TENANT, MAIN, AT).lsn == Lsn(0x1000)


def test_pageserver_that_falls_behind(
    services: Services, env: LocalEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_travel, "_STALLED_AFTER", 0)
    services.answers = [answer("future", "0/1000"), answer("future", "0/2000")]
    with pytest.raises(ControlPlaneError, match=r"has WAL up to 0/2000 only .* up to 0/3000"):
        time_travel.find_moment(env, TENANT, MAIN, AT)


def test_newest_state(services: Services, env: LocalEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is acknowledged is waited for, and it is said if that cannot be had."""
    services.answers = [
        answer("nodata", "0/800", commit_time=None),
        answer("future", "0/2fff"),
        answer("future", "0/3000"),
        answer("future", "0/4000"),
    ]
    time_travel.wait_for_newest(env, TENANT, MAIN)
    assert services.answers == [answer("future", "0/4000")]
    monkeypatch.setattr(time_travel, "_STALLED_NOW_AFTER", 0)
    services.answers = [answer("future", "0/2fff")]
    with pytest.raises(time_travel.NewestUnknownError, match=r"has WAL up to 0/2FFF only"):
        time_travel.wait_for_newest(env, TENANT, MAIN)
    services.safekeepers = (DOWN, Log(1), DOWN)
    with pytest.raises(time_travel.NewestUnknownError, match="only 1 of the 3 safekeepers answer"):
        time_travel.wait_for_newest(env, TENANT, MAIN)
    services.asked.clear()
    env.safekeepers.clear()
    time_travel.wait_for_newest(env, TENANT, MAIN)
    assert services.asked == []


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
