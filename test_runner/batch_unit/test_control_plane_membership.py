"""Generations of safekeepers: what a change needs, and what computes are told of it."""

from __future__ import annotations

import errno
import fcntl
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from zenith_cli import safekeepers as cli_safekeepers  # type: ignore[import-untyped]

from compute_tools import state
from compute_tools.safekeeper_membership import (
    NOT_KNOWN,
    SafekeeperMember,
    SafekeeperMembership,
)
from compute_tools.walproposer.membership import ANY_INSTANCE, Generation, Membership
from control_plane import daemons, node_safekeepers, safekeeper_changes, settling
from control_plane.compute import ComputeControlPlane
from control_plane.daemons import Daemon
from control_plane.errors import ControlPlaneError
from control_plane.local_env import (
    GenerationMember,
    LocalEnv,
    SafekeeperConf,
    SafekeeperGeneration,
)
from control_plane.membership import (
    Standings,
    TimelineStanding,
    begin_generation,
    check_disk,
    membership,
    record_instance,
    still_mattering,
)
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

TENANT = TenantId.parse("11" * 16)
MAIN = TimelineId.parse("22" * 16)
KEY = f"{TENANT}-{MAIN}"


def instance(node_id: int) -> str:
    return f"{node_id:02x}" * 16


def confs(ids: Iterable[int], *, started: bool = True) -> list[SafekeeperConf]:
    return [
        SafekeeperConf(i, 5450 + i, 7670 + i, instance=instance(i) if started else "") for i in ids
    ]


@pytest.fixture
def env(tmp_path: Path) -> LocalEnv:
    made = LocalEnv(
        repo_dir=tmp_path,
        pg_distrib_dir=Path("/pg"),
        zenith_distrib_dir=Path("/z"),
        default_tenant_id=TENANT,
        safekeepers=confs((1, 2, 3)),
        branches={"main": {TENANT: MAIN}},
    )
    made.save()
    return made


def standings(known: dict[int, tuple[bool, int]]) -> Standings:
    """What safekeepers say of the branch main: whether it has WAL, and what is established."""
    return {
        instance(node_id): {KEY: TimelineStanding("main", *standing)}
        for node_id, standing in known.items()
    }


def nobody() -> Standings:
    return {}


def test_config_keeps_generations(env: LocalEnv) -> None:
    begin_generation(env, confs((1, 3, 4)), nobody)
    env.safekeepers[2].instance = ""
    env.save()
    loaded = LocalEnv.load(env.repo_dir)
    assert loaded == env
    assert loaded.safekeeper_generation == 1
    assert loaded.earlier_generations == [
        SafekeeperGeneration(0, [GenerationMember(i, 5450 + i, instance(i)) for i in (1, 2, 3)])
    ]


def test_config_of_before_has_no_generations(env: LocalEnv) -> None:
    lines = [line for line in env.to_toml().splitlines() if not line.startswith("instance")]
    loaded = LocalEnv.parse("\n".join(lines), env.repo_dir)
    assert (loaded.safekeeper_generation, loaded.earlier_generations) == (0, [])
    assert membership(loaded).for_proposer() == Membership(0, (ANY_INSTANCE,) * 3)
    with pytest.raises(ControlPlaneError, match="out of order"):
        text = "[[earlier_safekeeper_generations]]\nnumber = 3\nmembers = []\n"
        LocalEnv.parse(text, env.repo_dir)


def test_computes_are_told_who_is_left(env: LocalEnv) -> None:
    begin_generation(env, confs((1, 3, 4)), nobody)
    told = membership(env)
    assert told.members == tuple(SafekeeperMember(i, instance(i)) for i in (1, 3, 4))
    assert told.earlier == (Generation(0, frozenset({0, 1}), 3),)
    assert SafekeeperMembership.from_json(told.to_json()) == told
    core = told.for_proposer()
    assert (core.generation, core.instance(2)) == (1, bytes.fromhex(instance(4)))
    assert NOT_KNOWN.for_proposer() == Membership()


def test_same_id_on_another_disk_is_another_safekeeper(env: LocalEnv) -> None:
    new = confs((1, 2, 3))
    new[1].instance = instance(9)
    begin_generation(env, new, nobody)
    assert membership(env).earlier == (Generation(0, frozenset({0, 2}), 3),)
    newer = confs((1, 2, 3))
    with pytest.raises(ControlPlaneError, match="leave 1 of the 3"):
        newer[0].instance = newer[1].instance = instance(8)
        begin_generation(env, newer, nobody)


@pytest.mark.parametrize(
    ("before", "after"), [((1, 2, 3), (3, 4, 5)), ((1,), (2,)), ((1, 2), (2,))]
)
def test_more_than_a_minority_at_once_is_refused(
    env: LocalEnv, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    env.safekeepers = confs(before)
    with pytest.raises(ControlPlaneError, match="needed to know everything that was committed"):
        begin_generation(env, confs(after), nobody)
    assert env.safekeepers == confs(before)


def test_unused_safekeepers_may_all_go(env: LocalEnv) -> None:
    env.safekeepers = confs((1, 2, 3), started=False)
    begin_generation(env, confs((7,), started=False), nobody)
    assert (env.safekeeper_generation, env.earlier_generations) == (0, [])


@pytest.mark.parametrize(
    ("known", "mattering"),
    [
        ({1: (True, 1)}, False),  # one that knows is enough
        ({1: (True, 0), 3: (True, 0), 4: (True, 0)}, True),
        ({1: (False, 0), 3: (False, 0)}, False),  # a majority of 1, 2 and 3 would show
        ({1: (False, 0), 4: (False, 0)}, True),  # 2 and 3 may have a commit
        ({}, True),
    ],
)
def test_earlier_generation_matters_until_a_later_one_is_established(
    env: LocalEnv, known: dict[int, tuple[bool, int]], mattering: bool
) -> None:
    begin_generation(env, confs((1, 3, 4)), nobody)
    left, waiting = still_mattering(env, standings(known))
    assert bool(left) == mattering
    assert waiting == (["main"] if mattering else [])
    if mattering:
        with pytest.raises(ControlPlaneError, match="Not established in a later generation yet"):
            begin_generation(env, confs((3, 4, 5)), lambda: standings(known))
        begin_generation(env, confs((3, 4, 5)), lambda: standings(known), accept_loss=True)
        assert [g.number for g in env.earlier_generations] == [1]
    else:
        begin_generation(env, confs((3, 4, 5)), lambda: standings(known))
        assert [g.number for g in env.earlier_generations] == [1]


def test_new_safekeepers_keep_wal_as_the_others_do(
    env: LocalEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in the place of another as that one, one more as all have it alike."""
    monkeypatch.setattr(safekeeper_changes, "_make_directory", lambda _, node_id: instance(node_id))
    for conf in env.safekeepers:
        conf.wal_offload = "file:///wal"
        conf.wal_keep_size = f"{16 * conf.id}MB"
    env.save()
    safekeeper_changes.add(env, 4, None, None)
    assert env.safekeepers[-1].wal_options == {"wal_offload": "file:///wal"}
    safekeeper_changes.replace(env, 3, 7, None, None)
    assert env.safekeepers[-1].wal_options == {
        "wal_keep_size": "48MB", "wal_offload": "file:///wal",
    }  # fmt: skip


def test_lost_disk_is_told(env: LocalEnv) -> None:
    directory = env.safekeeper_dir(2)
    directory.mkdir(parents=True)
    with pytest.raises(ControlPlaneError, match="safekeeper 2 has lost its disk") as error:
        check_disk(env, 2)
    assert "zenith safekeeper replace 2" in str(error.value)
    (directory / "safekeeper.instance").write_text(instance(9))
    with pytest.raises(ControlPlaneError, match=f"another disk's .instance {instance(9)}"):
        check_disk(env, 2)
    (directory / "safekeeper.instance").write_text(instance(2))
    check_disk(env, 2)


def test_instance_is_recorded_at_the_first_start(env: LocalEnv) -> None:
    env.safekeepers = confs((1, 2, 3), started=False)
    env.earlier_generations = [SafekeeperGeneration(0, [GenerationMember(2, 5452)])]
    env.safekeeper_generation = 1
    env.save()
    directory = env.safekeeper_dir(2)
    directory.mkdir(parents=True)
    with pytest.raises(ControlPlaneError, match="runs without"):
        record_instance(env, 2)
    (directory / "safekeeper.instance").write_text(instance(2))
    record_instance(env, 2)
    saved = LocalEnv.load(env.repo_dir)
    assert [conf.instance for conf in saved.safekeepers] == ["", instance(2), ""]
    assert saved.earlier_generations[0].members[0].instance == instance(2)


def test_nodes_follow_what_was_the_environments(env: LocalEnv, tmp_path: Path) -> None:
    own = node_safekeepers.own_addresses(env)
    assert node_safekeepers.are_own(env, (("127.0.0.1", 5453), *own[:2]))
    assert node_safekeepers.were_own(env, own)
    begin_generation(env, confs((1, 3, 4)), nobody)
    assert node_safekeepers.were_own(env, own)
    assert not node_safekeepers.are_own(env, own)
    for foreign in ((), own[:2], (*own[:2], ("elsewhere", 5453))):
        assert not node_safekeepers.were_own(env, foreign)
    conf = tmp_path / "postgresql.conf"
    conf.write_text(
        "a = 1\nwal_acceptors='localhost:1'\n# wal_acceptors = x\nb = 2 # \udce9\n",
        errors="surrogateescape",
    )
    node_safekeepers.follow(tmp_path, node_safekeepers.own_addresses(env))
    assert conf.read_text(errors="surrogateescape") == (
        "a = 1\nwal_acceptors='localhost:5451,localhost:5453,localhost:5454'\n"
        "# wal_acceptors = x\nb = 2 # \udce9\n"
    )


def test_settings_that_cannot_be_written_break_no_change_off(
    env: LocalEnv, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old safekeeper is stopped and the new one started all the same, and it is told of."""
    ComputeControlPlane(env).create(TENANT, "main", MAIN, None, 6000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node_safekeepers, "follow", full)
    change = safekeeper_changes.remove(env, 2)
    assert [daemon.title for daemon in change.removed] == ["Safekeeper 2"]
    monkeypatch.setattr(cli_safekeepers, "settle", lambda *_: None)
    cli_safekeepers._carry_out(env, change)
    captured = capsys.readouterr()
    assert "Safekeeper 2 is already stopped\n" in captured.out
    assert "cannot write the new safekeepers into the settings of node main" in captured.err
    assert "No space left on device" in captured.err


def test_a_removed_safekeeper_that_does_not_stop_puts_nothing_off(
    env: LocalEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def stop(self: Daemon, _say: object, *, immediate: bool) -> None:
        raise ControlPlaneError(f"Failed to stop {self.kind}")

    monkeypatch.setattr(Daemon, "stop", stop)
    monkeypatch.setattr(cli_safekeepers, "start_safekeeper", lambda _, i: done.append(f"start {i}"))
    monkeypatch.setattr(cli_safekeepers, "settle", lambda *_: done.append("settle"))
    change = safekeeper_changes.Change((daemons.safekeeper(env, 2),), 4, ())
    with pytest.raises(ControlPlaneError, match="Failed to stop safekeeper"):
        cli_safekeepers._carry_out(env, change)
    assert done == ["start 4", "settle"]


def test_an_environment_without_safekeepers_stays_so(env: LocalEnv) -> None:
    env.safekeepers = []
    env.save()
    with pytest.raises(ControlPlaneError, match="made without safekeepers"):
        safekeeper_changes.add(env, None, None, None)
    assert LocalEnv.load(env.repo_dir).safekeepers == []


OTHER = TimelineId.parse("44" * 16)


def try_lock(env: LocalEnv, operation: int) -> bool:
    """Whether the lock between starts of computes and settling is free for an operation."""
    with (env.repo_dir / "settling.lock").open("a") as file:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_compute_that_was_started_meanwhile_is_not_fenced(
    env: LocalEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settling looks anew before each branch, and nobody starts a compute on that one then."""
    env.safekeeper_generation = 1
    env.branches["z"] = {TENANT: OTHER}
    other = f"{TENANT}-{OTHER}"
    known = {
        instance(1): {
            KEY: TimelineStanding("main", True, 0),
            other: TimelineStanding("z", True, 0),
        }
    }
    busy: set[str] = set()
    settled: list[str] = []

    def establish(_: LocalEnv, _tenant: str, timeline: str) -> str:
        settled.append(timeline)
        assert not try_lock(env, fcntl.LOCK_SH)
        busy.add(other)  # waited for the lock
        return ""

    monkeypatch.setattr(settling, "_establish", establish)
    monkeypatch.setattr(settling, "_with_compute", lambda _: set(busy))
    monkeypatch.setattr("control_plane.membership.ask_standings", lambda _: known)
    said: list[str] = []
    settling.settle(env, said.append)
    assert settled == [str(MAIN)]
    assert said == ["branch main now has safekeepers of generation 1"]
    busy.clear()
    known[instance(1)][KEY] = TimelineStanding("main", True, 1)
    settling.settle(env, said.append)
    assert settled == [str(MAIN), str(OTHER)]


def test_branches_are_not_settled_until_a_started_compute_is_seen(
    env: LocalEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ComputeControlPlane(env).create(TENANT, "main", MAIN, None, 6000)
    free: list[bool] = []

    def read(_: object) -> state.ComputeState:
        free.append(try_lock(env, fcntl.LOCK_EX))
        seen = None if len(free) < 5 else 1
        return state.ComputeState(state.Phase.STARTING, seen, "")

    monkeypatch.setattr(state, "read", read)
    node.state_dir.mkdir(parents=True)
    log_file = node.state_dir / "compute.log"
    with log_file.open("wb") as log, subprocess.Popen("cat", stdin=subprocess.PIPE) as it:
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: it)
        assert node._launch(node.state_dir / "spec.json", {}, log.fileno(), log) is it
        it.kill()
    assert (free, try_lock(env, fcntl.LOCK_EX)) == ([False] * 5, True)


def test_only_nodes_that_need_safekeepers_are_to_be_started_anew(
    env: LocalEnv, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said of running nodes can be entered as it stands, whatever tenant they are of."""
    other = TenantId.parse("33" * 16)
    plane = ComputeControlPlane(env)
    plane.create(TENANT, "main", MAIN, None, 6000)
    plane.create(TENANT, "past", MAIN, Lsn.parse("0/16B9188"), 6001)
    plane.create(TENANT, "replica", MAIN, None, 6002, hot_standby=True)
    plane.create(other, "theirs", MAIN, None, 6003)
    before = node_safekeepers.own_addresses(env)
    env.safekeepers = confs((1, 2, 4))
    running = state.ComputeState(state.Phase.RUNNING, 1, "")
    monkeypatch.setattr(state, "read", lambda _: running)
    troubles: list[ControlPlaneError] = []
    nodes = plane.follow_safekeepers(before, troubles.append)
    assert not troubles
    assert [node.name for node in nodes] == ["main", "replica", "theirs"]
    past = plane.get(TENANT, "past")
    assert past is not None
    assert node_safekeepers.are_own(env, past.safekeepers)
    monkeypatch.setattr(cli_safekeepers, "settle", lambda *_: None)
    cli_safekeepers._carry_out(env, safekeeper_changes.Change((), None, tuple(nodes)))
    theirs = f"theirs --tenant-id {other}"
    assert capsys.readouterr().out.splitlines()[2:] == [
        "    zenith pg stop main; zenith pg start main",
        "    zenith pg stop replica; zenith pg start replica",
        f"    zenith pg stop {theirs}; zenith pg start {theirs}",
    ]
