"""Which safekeepers an environment has, and had: pinned instances and generations.

The configuration pins the instance of each safekeeper's data directory, so that an empty disk is
not taken for the one that made promises. Each change of the set begins a new generation. A leader
of it needs majorities of the earlier ones, too, until it is known that a later one was established:
until a majority of it has everything that was ever committed. That is known timeline by timeline,
and the safekeepers are asked for it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compute_tools.safekeeper_membership import SafekeeperMember, SafekeeperMembership
from compute_tools.walproposer.membership import Generation
from control_plane import http_client
from control_plane.errors import ControlPlaneError
from control_plane.local_env import (
    GenerationMember,
    LocalEnv,
    SafekeeperConf,
    SafekeeperGeneration,
)
from zenith_utils.lsn import Lsn

_INSTANCE_FILE = "safekeeper.instance"
_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class TimelineStanding:
    """A timeline as one safekeeper knows it."""

    name: str
    """Its branch, or `<tenant>-<timeline>`."""
    has_wal: bool
    established: int


Standings = dict[str, dict[str, TimelineStanding]]
"""By instance of the safekeeper that was asked, then by `<tenant>-<timeline>`."""


def read_instance(directory: Path) -> str | None:
    """The instance of a safekeeper's data directory, in hex; None if it has none."""
    try:
        return (directory / _INSTANCE_FILE).read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise ControlPlaneError(f"cannot read the instance of {directory}") from e


def check_disk(env: LocalEnv, node_id: int) -> None:
    """Refuse to start a safekeeper whose directory is not the one it had; ControlPlaneError."""
    conf = env.safekeeper(node_id)
    directory = env.safekeeper_dir(node_id)
    found = read_instance(directory)
    if not conf.instance or found == conf.instance:
        return
    what = (
        "is empty or lost its identity"
        if found is None
        else f"is another disk's (instance {found})"
    )
    raise ControlPlaneError(
        f"safekeeper {node_id} has lost its disk: {directory} {what}, it was instance "
        f"{conf.instance}. What it promised and acknowledged is gone, so it cannot take part again "
        f"as if nothing had happened. Restore the directory, or replace the safekeeper by a new "
        f"one, which is brought up from the others:\n"
        f"    zenith safekeeper replace {node_id}\n"
        f"    zenith pg stop NODE; zenith pg start NODE    # each node"
    )


def record_instance(env: LocalEnv, node_id: int) -> None:
    """Pin the instance of a safekeeper that has been started, if it is not yet.

    Raises ControlPlaneError, OSError.
    """
    if env.safekeeper(node_id).instance:
        return
    instance = read_instance(env.safekeeper_dir(node_id))
    if instance is None:
        raise ControlPlaneError(
            f"safekeeper {node_id} runs without {_INSTANCE_FILE} in {env.safekeeper_dir(node_id)}"
        )
    with env.locked():
        env.refresh()
        conf = env.safekeeper(node_id)
        if conf.instance:
            return
        conf.instance = instance
        # Not started before: in earlier generations it is the same one.
        for generation in env.earlier_generations:
            for member in generation.members:
                if (member.id, member.pg_port, member.instance) == (node_id, conf.pg_port, ""):
                    member.instance = instance
        env.save()


def membership(env: LocalEnv) -> SafekeeperMembership:
    """What a compute is told about the safekeepers of the configuration."""
    return SafekeeperMembership(
        generation=env.safekeeper_generation,
        members=tuple(SafekeeperMember(c.id, c.instance) for c in env.safekeepers),
        earlier=tuple(
            Generation(g.number, _survivors(g, env.safekeepers), len(g.members))
            for g in env.earlier_generations
        ),
    )


def _survivors(
    generation: SafekeeperGeneration, safekeepers: Sequence[SafekeeperConf]
) -> frozenset[int]:
    """Which of the safekeepers, by index, were members of a generation."""
    then = {(m.id, m.instance) for m in generation.members}
    return frozenset(i for i, c in enumerate(safekeepers) if (c.id, c.instance) in then)


def was_safekeepers(env: LocalEnv, ports: set[int]) -> bool:
    """Whether ports of the WAL services are all those of the current or an earlier generation."""
    sets = [{c.pg_port for c in env.safekeepers}]
    sets += [{m.pg_port for m in g.members} for g in env.earlier_generations]
    return ports in sets


# ---- changes


def begin_generation(
    env: LocalEnv,
    safekeepers: list[SafekeeperConf],
    standings: Callable[[], Standings],
    *,
    accept_loss: bool = False,
) -> None:
    """Make `safekeepers` the members of a new generation; with the lock held, not saved.

    `standings` asks the present ones. Raises ControlPlaneError if a leader of the new generation
    could not know everything that was committed; with `accept_loss` that is not asked of earlier
    generations than the present one.
    """
    present = SafekeeperGeneration(
        env.safekeeper_generation,
        [GenerationMember(c.id, c.pg_port, c.instance) for c in env.safekeepers],
    )
    if not any(c.instance for c in env.safekeepers):
        # None was ever started: nothing depends on them.
        env.safekeepers, env.earlier_generations = safekeepers, []
        return
    _check_overlap(present, safekeepers, [])
    earlier, waiting = list(env.earlier_generations), list[str]()
    if earlier:
        earlier, waiting = still_mattering(env, standings())
    for generation in list(earlier):
        try:
            _check_overlap(generation, safekeepers, waiting)
        except ControlPlaneError:
            if not accept_loss:
                raise
            earlier.remove(generation)
    env.earlier_generations = [*earlier, present]
    env.safekeepers = safekeepers
    env.safekeeper_generation += 1


def _check_overlap(
    generation: SafekeeperGeneration, safekeepers: list[SafekeeperConf], waiting: list[str]
) -> None:
    size = len(generation.members)
    quorum = size // 2 + 1
    left = len(_survivors(generation, safekeepers))
    if size == 0 or left >= quorum:
        return
    ids = ", ".join(str(m.id) for m in generation.members)
    text = (
        f"this would leave {left} of the {size} safekeepers ({ids}) of generation "
        f"{generation.number}, and {quorum} are needed to know everything that was committed"
    )
    if waiting:
        text += (
            f". Not established in a later generation yet: {', '.join(waiting)}. Start a compute "
            "on each, with all safekeepers running, and try again. If too many are lost for that, "
            "--accept-loss goes on without: these branches may then lack commits, or not start"
        )
    else:
        text += ": add others first, start a compute on each branch, then go on"
    raise ControlPlaneError(text)


def still_mattering(
    env: LocalEnv, standings: Standings
) -> tuple[list[SafekeeperGeneration], list[str]]:
    """The earlier generations that new leaders need majorities of, and because of what timelines.

    A generation does not matter any more if each timeline was established in a later one, or never
    had a commit: which is known if as many members were asked as have one in common with each of
    the generation's majorities.
    """
    names = timeline_names(env, standings.values())
    mattering: list[SafekeeperGeneration] = []
    waiting: set[str] = set()
    for generation in env.earlier_generations:
        members = {m.instance for m in generation.members}
        size = len(members)
        enough = len(members & standings.keys()) > size - (size // 2 + 1)
        late = {
            name
            for key, name in names.items()
            if not _settled(generation.number, [s[key] for s in standings.values() if key in s])
            and not (enough and not any(s[key].has_wal for s in standings.values() if key in s))
        }
        if late:
            mattering.append(generation)
            waiting |= late
    return mattering, sorted(waiting)


def _settled(number: int, known: list[TimelineStanding]) -> bool:
    """Whether a timeline was established in a later generation."""
    return any(standing.established > number for standing in known)


def timeline_names(
    env: LocalEnv, standings: Iterable[dict[str, TimelineStanding]]
) -> dict[str, str]:
    """Names of all timelines that the environment or a safekeeper knows, by their keys."""
    return _branch_names(env) | {k: s.name for known in standings for k, s in known.items()}


def _branch_names(env: LocalEnv) -> dict[str, str]:
    """Names of the environment's timelines, by `<tenant>-<timeline>`."""
    return {
        f"{tenant}-{timeline}": name
        for name, timelines in env.branches.items()
        for tenant, timeline in timelines.items()
    }


def ask_standings(env: LocalEnv) -> Standings:
    """What each safekeeper that answers says about its timelines."""
    names = _branch_names(env)
    standings: Standings = {}
    for conf in env.safekeepers:
        try:
            status = _get(conf, "/v1/status")
            timelines = _get(conf, "/v1/timeline")
            if conf.instance and status["instance"] == conf.instance:
                standings[conf.instance] = {
                    key: TimelineStanding(
                        names.get(key, key),
                        bool(Lsn.parse(t["commit_lsn"])) or bool(t["recovering"]),
                        int(t["established"]),
                    )
                    for t in timelines
                    for key in [f"{t['tenant_id']}-{t['timeline_id']}"]
                }
        except (http_client.UnreachableError, KeyError, TypeError, ValueError):
            continue
    return standings


def _get(conf: SafekeeperConf, path: str) -> Any:
    address = ("127.0.0.1", conf.http_port)
    return http_client.request(address, "GET", path, timeout=_TIMEOUT).document


def without(env: LocalEnv, node_id: int) -> list[SafekeeperConf]:
    """Copies of all safekeepers but one."""
    return [replace(c) for c in env.safekeepers if c.id != node_id]
