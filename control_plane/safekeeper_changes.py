"""Changes of who the safekeepers of an environment are; each begins a new generation.

In this order: the new one's directory gets its instance, so that it is pinned from the start; the
configuration is replaced in one step; then the nodes' settings follow, and the caller stops the old
one and starts the new one. A crash leaves at most a directory that nobody knows, nodes that follow
at their next start, a new one that is yet to be started, and a removed one that still runs: it is
found by its directory (daemons.removed_safekeepers), and computes that are started do not ask it.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from dataclasses import replace as copy
from functools import partial

from control_plane import daemons, membership, node_safekeepers
from control_plane.addresses import is_taken, listen_error, parse_address
from control_plane.compute import Compute, ComputeControlPlane
from control_plane.daemons import Daemon
from control_plane.environment import daemon_environment
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LAST_PORT, LocalEnv, SafekeeperConf

_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Change:
    """A change that is saved: what is to be stopped, started, and started anew."""

    removed: tuple[Daemon, ...]
    added: int | None
    running_nodes: tuple[Compute, ...]
    troubles: tuple[ControlPlaneError, ...] = ()
    """What went wrong after it was saved, and does not undo it."""


def add(env: LocalEnv, node_id: int | None, pg_port: int | None, http_port: int | None) -> Change:
    """Add an empty safekeeper; None for what is to be chosen here. Raises ControlPlaneError."""
    with env.locked():
        env.refresh()
        _pin(env)
        present = list(env.safekeepers)
        if not present:
            raise ControlPlaneError(
                "this environment was made without safekeepers: its nodes write to the pageserver "
                "and would not be held back by a node that writes to safekeepers. Make another "
                "environment: zenith init"
            )
        conf = _new_safekeeper(env, present, present, node_id, pg_port, http_port)
        return _change(env, [copy(c) for c in env.safekeepers], conf, None)


def remove(env: LocalEnv, node_id: int, *, accept_loss: bool = False) -> Change:
    """Take a safekeeper out of the configuration; raises ControlPlaneError."""
    with env.locked():
        env.refresh()
        _pin(env)
        env.safekeeper(node_id)
        if len(env.safekeepers) == 1:
            raise ControlPlaneError(
                f"safekeeper {node_id} is the last one: what is committed is nowhere else. To move "
                "to another one, first add two: zenith safekeeper add"
            )
        rest = membership.without(env, node_id)
        return _change(env, rest, None, node_id, accept_loss=accept_loss)


def replace(
    env: LocalEnv,
    old_id: int,
    node_id: int | None,
    pg_port: int | None,
    http_port: int | None,
    *,
    accept_loss: bool = False,
) -> Change:
    """Remove a safekeeper and add an empty one in one change; raises ControlPlaneError.

    With its own id, and by default its ports, it takes the place of one that lost its disk.
    """
    with env.locked():
        env.refresh()
        _pin(env)
        old = env.safekeeper(old_id)
        rest = membership.without(env, old_id)
        if node_id == old_id:
            _check_lost(env, old)
            pg_port, http_port = pg_port or old.pg_port, http_port or old.http_port
            others = rest
        else:
            others = list(env.safekeepers)
        conf = _new_safekeeper(env, others, [old], node_id, pg_port, http_port)
        return _change(env, rest, conf, old_id, accept_loss=accept_loss)


def _change(
    env: LocalEnv,
    rest: list[SafekeeperConf],
    new: SafekeeperConf | None,
    old_id: int | None,
    *,
    accept_loss: bool = False,
) -> Change:
    """Save the generation of `rest` and `new`; with the lock held."""
    before = node_safekeepers.own_addresses(env)
    removed = () if old_id is None else (daemons.safekeeper(env, old_id),)
    if new is not None and new.id == old_id:
        removed = ()
    # First with a copy: a refusal leaves no directory behind.
    wanted = rest if new is None else [*rest, new]
    ask = partial(membership.ask_standings, env)
    membership.begin_generation(env, wanted, ask, accept_loss=accept_loss)
    if new is not None:
        new.instance = _make_directory(env, new.id)
    env.safekeepers.sort(key=lambda conf: conf.id)
    env.save()
    troubles: list[ControlPlaneError] = []
    running = ComputeControlPlane(env).follow_safekeepers(before, troubles.append)
    return Change(removed, None if new is None else new.id, tuple(running), tuple(troubles))


def _pin(env: LocalEnv) -> None:
    """Make sure that what has been used is known by its instance; raises ControlPlaneError."""
    for conf in env.safekeepers:
        directory = env.safekeeper_dir(conf.id)
        conf.instance = conf.instance or membership.read_instance(directory) or ""
        if not conf.instance and (directory / "safekeeper.id").exists():
            raise ControlPlaneError(
                f"safekeeper {conf.id} has no instance yet: start it first, which gives it one"
            )


def _new_safekeeper(
    env: LocalEnv,
    others: list[SafekeeperConf],
    models: list[SafekeeperConf],
    node_id: int | None,
    pg_port: int | None,
    http_port: int | None,
) -> SafekeeperConf:
    """A safekeeper beside `others`; its WAL goes where that of all `models` goes."""
    if node_id is None:
        node_id = 1 + max(_known_ids(env), default=0)
    elif any(conf.id == node_id for conf in others):
        raise ControlPlaneError(f"there is a safekeeper {node_id} already: choose another --id")
    elif node_id in daemons.removed_safekeepers(env):
        raise ControlPlaneError(
            f"safekeeper {node_id}, which was removed, still runs: zenith safekeeper stop {node_id}"
        )
    taken = {port for conf in others for port in (conf.pg_port, conf.http_port)}
    pageserver = env.pageserver
    taken |= {parse_address(a)[1] for a in (pageserver.listen_pg_addr, pageserver.listen_http_addr)}
    defaults = SafekeeperConf()
    pg_port = _port("--pg-port", pg_port, taken, [c.pg_port for c in others], defaults.pg_port)
    taken.add(pg_port)
    http_ports = [c.http_port for c in others]
    http_port = _port("--http-port", http_port, taken, http_ports, defaults.http_port)
    sync = all(conf.sync for conf in env.safekeepers)
    return SafekeeperConf(node_id, pg_port, http_port, sync, **_common_wal_options(models))


def _common_wal_options(confs: list[SafekeeperConf]) -> dict[str, str]:
    """The options about WAL that all have alike."""
    return dict(set.intersection(*(set(conf.wal_options.items()) for conf in confs)))


def _known_ids(env: LocalEnv) -> set[int]:
    """Ids in use, now or in an earlier generation, and those that have a directory."""
    ids = {conf.id for conf in env.safekeepers}
    ids |= {member.id for g in env.earlier_generations for member in g.members}
    return ids | set(env.safekeeper_ids_on_disk())


def _port(name: str, given: int | None, taken: set[int], others: list[int], first: int) -> int:
    """A port that was given, if nobody has it; else the next free one above the others."""
    if given is not None:
        if given in taken:
            raise ControlPlaneError(f"{name} {given} belongs to another server of this environment")
        error = listen_error(_HOST, given)
        if error is not None:
            why = "is in use: somebody listens there"
            if not is_taken(error):
                why = f"cannot be listened on: {error.strerror}"
            raise ControlPlaneError(f"{name} {given} {why}")
        return given
    start = max(others, default=first - 1) + 1
    for port in range(start, LAST_PORT + 1):
        if port not in taken and listen_error(_HOST, port) is None:
            return port
    raise ControlPlaneError(f"no port above {start} is free: choose one with {name}")


def _check_lost(env: LocalEnv, conf: SafekeeperConf) -> None:
    """Refuse to begin anew where the old disk still is; raises ControlPlaneError."""
    directory = env.safekeeper_dir(conf.id)
    if daemons.safekeeper(env, conf.id).running_pid() is not None:
        raise ControlPlaneError(f"safekeeper {conf.id} is running: stop it, or choose another --id")
    if conf.instance and membership.read_instance(directory) == conf.instance:
        raise ControlPlaneError(
            f"safekeeper {conf.id} still has its disk, {directory}: start it, or choose another "
            "--id for a new one"
        )


def _make_directory(env: LocalEnv, node_id: int) -> str:
    """The instance of a new safekeeper, whose directory is made; raises ControlPlaneError."""
    directory = env.safekeeper_dir(node_id)
    if any(directory.glob("*/*/safekeeper.control")):
        raise ControlPlaneError(
            f"{directory} holds timelines of a safekeeper of before: move it away, or choose "
            "another --id"
        )
    directory.mkdir(parents=True, exist_ok=True)
    # What an unfinished change left, or the identity of another disk.
    for path in directory.glob("safekeeper.*"):
        path.unlink()
    command = [str(env.zenith_distrib_dir / "safekeeper"), "--init"]
    done = subprocess.run(
        [*command, "-D", str(directory), "--id", str(node_id)],
        env=daemon_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    instance = membership.read_instance(directory)
    if done.returncode != 0 or instance is None:
        raise ControlPlaneError(f"cannot initialize safekeeper {node_id}: {done.stderr.strip()}")
    return instance
