"""Whether the files and ports of a local environment are what they should be."""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Iterator

from compute_tools import state
from compute_tools.spec import address_text
from control_plane import auth, daemons, membership
from control_plane.addresses import is_taken, listen_error
from control_plane.checks import Finding, fail, ok, warn
from control_plane.compute import Compute, ComputeControlPlane
from control_plane.daemons import Daemon
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv, PageserverConf, SafekeeperConf, unknown_keys
from zenith_utils.ids import IdParseError, TenantId
from zenith_utils.pid_file import is_alive, read_pid_file


def environment_checks(env: LocalEnv) -> Iterator[Finding]:
    """All findings about an environment whose configuration can be read."""
    yield from _config(env)
    yield from _keys(env)
    yield from _disks(env)
    servers = [daemons.safekeeper(env, conf.id) for conf in env.safekeepers]
    try:
        servers.insert(0, daemons.pageserver(env))
    except ControlPlaneError as e:
        yield fail("ports of pageserver", str(e), f"correct it in {env.config_path}")
    for server in servers:
        yield from _ports(server)
    yield _pid_files(servers)
    yield from _nodes(env)


def default_port_checks() -> Iterator[Finding]:
    """Whether `zenith init` without a configuration would find its ports free."""
    pageserver, safekeeper = PageserverConf(), SafekeeperConf()
    addresses = [pageserver.listen_pg_addr, pageserver.listen_http_addr]
    ports = [int(address.rpartition(":")[2]) for address in addresses]
    ports += [safekeeper.pg_port, safekeeper.http_port]
    taken = [str(port) for port in ports if listen_error("127.0.0.1", port) is not None]
    if taken:
        yield warn(
            "ports",
            f"somebody listens on {', '.join(taken)}",
            "give `zenith init --config` a file with other ports",
        )
    else:
        yield ok("ports", f"{', '.join(map(str, ports))} are free")


def _config(env: LocalEnv) -> Iterator[Finding]:
    path = env.config_path
    strange = unknown_keys(tomllib.loads(path.read_text(encoding="utf-8")))
    mode = stat.S_IMODE(path.stat().st_mode)
    if strange:
        yield warn(
            "config",
            f"{path} has keys that mean nothing: {', '.join(strange)}",
            "correct or remove them: the next command that rewrites the file drops them",
        )
    elif mode & 0o077 and env.pageserver.auth_token:
        yield warn("config", f"{path} holds a token and is open to others", f"chmod 600 {path}")
    else:
        yield ok("config", str(path))


def _keys(env: LocalEnv) -> Iterator[Finding]:
    private = env.private_key_file
    needed = auth.needs_token(env)
    if private.is_file():
        if stat.S_IMODE(private.stat().st_mode) & 0o077:
            yield warn("keys", f"{private} is open to others", f"chmod 600 {private}")
        else:
            yield ok("keys", str(private))
    elif needed:
        yield fail(
            "keys",
            f"auth_type is {env.pageserver.auth_type}, and there is no {private}",
            "restore it from a copy, or correct private_key_path in the config",
        )
    else:
        yield ok("keys", "none, and auth_type Trust needs none")


def _disks(env: LocalEnv) -> Iterator[Finding]:
    for conf in env.safekeepers:
        try:
            membership.check_disk(env, conf.id)
        except ControlPlaneError as e:
            yield fail(
                f"safekeeper {conf.id}",
                str(e).partition(". ")[0],
                f"restore the directory, or: zenith safekeeper replace {conf.id}",
            )


def _ports(server: Daemon) -> Iterator[Finding]:
    """Ports are the daemon's own while it runs, and free while it does not."""
    check = f"ports of {server.title.lower()}"
    pid = server.running_pid()
    addresses = [server.pg_address, server.http_address]
    text = ", ".join(str(port) for _, port in addresses)
    if pid is not None:
        if server.is_running():
            yield ok(check, f"{text}, its own: process {pid}")
        else:
            yield fail(
                check,
                f"process {pid} runs and takes no connections on {server.pg_address[1]}",
                f"see {server.log_file}; zenith stop -m immediate, then zenith start",
            )
        return
    errors = [(address, listen_error(*address)) for address in addresses]
    taken = [str(port) for (_, port), error in errors if error is not None and is_taken(error)]
    refused = [
        f"{address_text(*address)} ({error.strerror})"
        for address, error in errors
        if error is not None and not is_taken(error)
    ]
    if refused:
        yield fail(
            check,
            f"it could not listen on {', '.join(refused)}",
            "change the address in the config, or run zenith as a user that may",
        )
    if taken:
        yield fail(
            check,
            f"it does not run, and somebody else listens on {', '.join(taken)}",
            "find out who with `ss -ltnp` and stop it, or change the port in the config",
        )
    if not taken and not refused:
        yield ok(check, f"{text} are free; it does not run")


def _pid_files(servers: list[Daemon]) -> Finding:
    """A pid file is known by its lock, so one left behind does no harm but to those who kill."""
    stale = 0
    for server in servers:
        pid = read_pid_file(server.pid_file)
        if pid is None or server.running_pid() is not None:
            continue
        if is_alive(pid):
            return warn(
                "pid files",
                f"{server.pid_file} is left from before, and {pid} is another process now",
                f"rm {server.pid_file}",
            )
        stale += 1
    return ok("pid files", f"{stale} left by daemons that have ended" if stale else "in order")


def _nodes(env: LocalEnv) -> Iterator[Finding]:
    """Nodes can be read, and their ports are theirs."""
    broken: list[ControlPlaneError] = []
    plane = ComputeControlPlane(env)
    for directory in sorted((env.repo_dir / "pgdatadirs" / "tenants").glob("*")):
        try:
            nodes = plane.nodes(TenantId.parse(directory.name), broken.append)
        except IdParseError:
            continue
        for node in nodes:
            said = state.read(node.state_dir)
            if said.phase is state.Phase.CRASHED:
                yield warn(
                    f"postgres {node.name}",
                    f"has crashed: {(said.reason or 'no reason known').splitlines()[0]}",
                    f"zenith pg start {node.name}",
                )
            elif said.supervisor_pid is None:
                yield from _node_port(node)
    for error in broken:
        yield fail(
            "nodes", f"{error}: {error.__cause__}", "correct the file, or remove its directory"
        )


def _node_port(node: Compute) -> Iterator[Finding]:
    error = listen_error("127.0.0.1", node.port)
    if error is None:
        return
    why = f"it could not listen on its port {node.port} ({error.strerror})"
    if is_taken(error):
        why = f"somebody else listens on its port {node.port}"
    yield fail(
        f"postgres {node.name}",
        f"is stopped, and {why}",
        f"change port in {node.pgdata}/postgresql.conf",
    )
