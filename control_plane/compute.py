"""The compute nodes of a local environment: their settings, start, stop and status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from compute_tools import postgres_conf, state
from compute_tools.auth import AUTH_TOKEN_VARIABLE, password_placeholder
from compute_tools.safekeeper_membership import NOT_KNOWN
from compute_tools.spec import ComputeSpec, SpecError, address_text
from control_plane import auth, membership, node_safekeepers
from control_plane.addresses import parse_address
from control_plane.environment import compute_environment
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LAST_PORT, LocalEnv
from control_plane.processes import signal_holder
from zenith_utils.durable import write_file_durably
from zenith_utils.duration import parse_duration
from zenith_utils.ids import IdParseError, TenantId, TimelineId
from zenith_utils.lsn import Lsn
from zenith_utils.os_user import give

Say = Callable[[str], None]

FIRST_PORT = 55432
SUPERUSER = "zenith_admin"
STOP_TIMEOUT = 20.0
# Beyond the time that Postgres has for a fast stop: the last WAL is pushed, what is left ended.
_STOP_GRACE = 45.0
_SAFEKEEPER_PORT = 5454
_POLL = 0.01
# Of a new hot standby. The primary keeps what its queries need; the loss of a safekeeper is noticed
# soon, and the next one asked at once.
_STANDBY_SETTINGS = {
    "hot_standby_feedback": "on",
    "wal_receiver_status_interval": "1s",
    "wal_receiver_timeout": "10s",
    "wal_retrieve_retry_interval": "200ms",
}
_NODE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_NOT_IN_NODE_NAME = re.compile(r"[^A-Za-z0-9_.\-]")
_PLAIN_VALUE = re.compile(r"\d+(?:B|kB|MB|GB|TB|us|ms|s|min|h|d)?|[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Compute:
    """A node that has been created; `lsn` is set on one that stays at it, read-only.

    `hot_standby` is set on a read-only one that follows its branch.

    `safekeepers` are the addresses in its wal_acceptors setting.
    """

    env: LocalEnv
    name: str
    tenant_id: TenantId
    timeline_id: TimelineId
    port: int
    lsn: Lsn | None
    safekeepers: tuple[tuple[str, int], ...]
    hot_standby: bool = False
    stop_timeout: float = STOP_TIMEOUT

    @property
    def pgdata(self) -> Path:
        """The data directory."""
        return self.env.pgdata_dirs(self.tenant_id) / self.name

    @property
    def read_only(self) -> bool:
        """Whether it refuses writes: it stays at an LSN, or follows its branch."""
        return self.lsn is not None or self.hot_standby

    @property
    def kind(self) -> str:
        """What it can do: read-write, read-only (stays at its LSN) or hot standby."""
        if self.hot_standby:
            return "hot standby"
        return "read-write" if self.lsn is None else "read-only"

    @property
    def state_dir(self) -> Path:
        """The supervisor's directory."""
        return self.env.compute_state_dir(self.tenant_id, self.name)

    def status(self) -> str:
        """One word for the list: running, starting, stopping, stopped, crashed."""
        said = state.read(self.state_dir)
        return "crashed" if self._has_just_crashed(said) else str(said.phase)

    def _has_just_crashed(self, said: state.ComputeState) -> bool:
        """Whether Postgres has gone, and its supervisor is about to notice."""
        return said.phase is state.Phase.RUNNING and not _accepts(self.port)

    def why_crashed(self) -> str:
        """What a supervisor has left as the reason of a crash, empty if there was none."""
        said = state.read(self.state_dir)
        return said.reason if said.phase is state.Phase.CRASHED else ""

    def start(self, say: Say) -> None:
        """Start the node on the newest state of its timeline; raises ControlPlaneError.

        An interrupt from the keyboard stops the node again.
        """
        self._wait_for_earlier_end()
        if state.read(self.state_dir).supervisor_pid is not None:
            raise ControlPlaneError("The node is already running")
        environment = compute_environment()
        if auth.needs_token(self.env):
            environment[AUTH_TOKEN_VARIABLE] = auth.tenant_token(self.env, self.tenant_id)
        _make_directory(self.state_dir)
        spec_path = self.state_dir / state.SPEC_FILE
        write_file_durably(spec_path, self._spec().to_json().encode(), sync=False, mode=0o644)
        read_fd, write_fd = os.pipe()
        with os.fdopen(read_fd, "rb") as status, (self.state_dir / "compute.log").open("ab") as log:
            try:
                process = self._launch(spec_path, environment, write_fd, log)
            finally:
                os.close(write_fd)
            try:
                with _ended_by_interrupt(process):
                    self._follow_start(status, say)
            except ControlPlaneError:
                process.wait()
                raise

    def _launch(
        self, spec_path: Path, environment: dict[str, str], status_fd: int, log: BinaryIO
    ) -> subprocess.Popen[bytes]:
        """The supervisor, as soon as others see that there is one, or it has ended.

        Before that, branches are settled as if they had no compute: not while we are here.
        """
        command = [sys.executable, "-P", "-m", "compute_tools"]
        with self.env.starting_compute():
            process = subprocess.Popen(
                [*command, f"--spec={spec_path}", f"--status-fd={status_fd}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(status_fd,),
                start_new_session=True,
                env=environment,
                cwd=self.state_dir,
            )
            with _ended_by_interrupt(process):
                while process.poll() is None and state.read(self.state_dir).supervisor_pid is None:
                    time.sleep(_POLL)
        return process

    def stop(self, say: Say, *, destroy: bool) -> None:
        """Stop the node: cleanly, or at once and for good with `destroy`."""
        if not destroy and state.read(self.state_dir).supervisor_pid is None:
            phase = state.read(self.state_dir).phase
            raise ControlPlaneError(f"postgres {self.name} is not running ({phase})")
        stop_supervisor(self.name, self.state_dir, say, immediate=destroy)
        if destroy:
            say(f"Destroying postgres data directory '{self.pgdata}'")
            self._destroy()

    def _destroy(self) -> None:
        # Here and not above: most commands do without these modules, and start sooner.
        from compute_tools import datadir
        from compute_tools.postgres_process import PostgresError, end_leftovers

        _make_directory(self.state_dir)
        try:
            lock = state.lock(self.state_dir, to_destroy=True)
            try:
                end_leftovers(self.pgdata)
                datadir.destroy(self.pgdata, self.state_dir)
            finally:
                os.close(lock)
        except state.AlreadyRunning as e:
            raise ControlPlaneError(f"postgres {self.name} was started meanwhile") from e
        except (OSError, PostgresError) as e:
            raise ControlPlaneError(f"cannot destroy postgres {self.name}") from e

    def _wait_for_earlier_end(self) -> None:
        """The node has crashed or been stopped, and its supervisor is cleaning up after it."""
        deadline = time.monotonic() + self.stop_timeout + _STOP_GRACE
        while time.monotonic() < deadline:
            said = state.read(self.state_dir)
            if not said.ending and not self._has_just_crashed(said):
                return
            time.sleep(_POLL)

    def _follow_start(self, status: Iterator[bytes], say: Say) -> None:
        for line in status:
            message = json.loads(line)
            if "progress" in message:
                say(message["progress"])
            if "failed" in message:
                raise ControlPlaneError(message["failed"])
            if "ready" in message:
                return
        raise ControlPlaneError(
            f"postgres {self.name} ended while starting; see {self.state_dir}/compute.log"
        )

    def _spec(self) -> ComputeSpec:
        env, safekeepers = self.env, self.safekeepers
        own = node_safekeepers.were_own(env, safekeepers)
        if own:
            safekeepers = node_safekeepers.own_addresses(env)
            # A change of the configuration may have been broken off before it came here.
            if not node_safekeepers.are_own(env, self.safekeepers):
                node_safekeepers.follow(self.pgdata, safekeepers)
        return ComputeSpec(
            tenant_id=self.tenant_id,
            timeline_id=self.timeline_id,
            pgdata=self.pgdata,
            state_dir=self.state_dir,
            distrib_dir=self.env.pg_distrib_dir,
            pageserver_pg=parse_address(self.env.pageserver.listen_pg_addr),
            pageserver_http=parse_address(self.env.pageserver.listen_http_addr),
            port=self.port,
            safekeepers=safekeepers,
            membership=membership.membership(self.env) if own else NOT_KNOWN,
            lsn=self.lsn,
            hot_standby=self.hot_standby,
            superuser=SUPERUSER,
            stop_timeout=self.stop_timeout,
        )


def stop_supervisor(name: str, state_dir: Path, say: Say, *, immediate: bool) -> None:
    """Stop the node of a state directory if it lives, and wait for its end.

    A process that destroys the node is waited for, too. Raises ControlPlaneError.
    """

    def supervisor() -> int | None:
        said = state.read(state_dir)
        return None if said.destroying else said.supervisor_pid

    role = "supervised"
    pid = signal_holder(supervisor, signal.SIGQUIT if immediate else signal.SIGTERM)
    if pid is None:
        said = state.read(state_dir)
        if not said.destroying:
            return
        pid, role = said.supervisor_pid, "being destroyed"
    say("waiting for server to shut down....")
    try:
        timeout = ComputeSpec.load(state_dir / state.SPEC_FILE).stop_timeout
    except SpecError:
        timeout = STOP_TIMEOUT
    deadline = time.monotonic() + timeout + _STOP_GRACE
    while state.read(state_dir).supervisor_pid == pid:
        if time.monotonic() > deadline:
            raise ControlPlaneError(
                f"postgres {name}, {role} by process {pid}, does not stop; "
                f"see {state_dir}/compute.log"
            )
        time.sleep(_POLL)
    reason = state.read(state_dir).reason
    say("server stopped" + (f" ({reason})" if reason else ""))


@contextmanager
def _ended_by_interrupt(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """It leads a session of its own: an interrupt of the terminal does not reach it."""
    try:
        yield
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


class ComputeControlPlane:
    """All compute nodes of an environment."""

    def __init__(self, env: LocalEnv) -> None:
        self._env = env

    def nodes(
        self, tenant_id: TenantId, on_broken: Callable[[ControlPlaneError], None] | None = None
    ) -> list[Compute]:
        """The nodes of a tenant, by name.

        A node whose settings cannot be read is told to `on_broken` and left out; without it,
        ControlPlaneError is raised.
        """
        self._recover(tenant_id)
        found = []
        for path in sorted(self._env.pgdata_dirs(tenant_id).glob("*/postgresql.conf")):
            try:
                found.append(self._load(tenant_id, path.parent.name))
            except ControlPlaneError as e:
                if on_broken is None:
                    raise
                on_broken(e)
        return found

    def follow_safekeepers(
        self, before: node_safekeepers.Addresses, on_broken: Callable[[ControlPlaneError], None]
    ) -> list[Compute]:
        """Give the environment's safekeepers to all nodes that have those of before.

        Returns the nodes among them that run, and go on with those of before until they are
        started anew. A node at an LSN has no use for safekeepers. Nodes whose settings cannot be
        read are left out; of those whose settings cannot be written `on_broken` is told.
        """
        addresses = node_safekeepers.own_addresses(self._env)
        running = []
        for directory in sorted((self._env.repo_dir / "pgdatadirs" / "tenants").glob("*")):
            try:
                nodes = self.nodes(TenantId.parse(directory.name), lambda _: None)
            except IdParseError:
                continue
            for node in nodes:
                if sorted(node.safekeepers) == sorted(before) and before:
                    try:
                        node_safekeepers.follow(node.pgdata, addresses)
                    except OSError as e:
                        on_broken(_not_followed(node, e))
                    if node.lsn is None and state.read(node.state_dir).supervisor_pid is not None:
                        running.append(node)
        return running

    def living(self) -> list[tuple[str, Path]]:
        """Name and state directory of each node of any tenant that runs or is being destroyed."""
        directories = sorted((self._env.repo_dir / "computes").glob("*/*"))
        return [(d.name, d) for d in directories if state.read(d).supervisor_pid is not None]

    def get(self, tenant_id: TenantId, name: str) -> Compute | None:
        """A node by name."""
        if not _NODE_NAME.fullmatch(name):
            raise ControlPlaneError(
                f"invalid node name '{name}': use letters, digits, '_', '-' and '.'"
            )
        self._recover(tenant_id)
        if not (self._env.pgdata_dirs(tenant_id) / name / "postgresql.conf").is_file():
            return None
        return self._load(tenant_id, name)

    def create(
        self,
        tenant_id: TenantId,
        name: str,
        timeline_id: TimelineId,
        lsn: Lsn | None,
        port: int | None,
        *,
        hot_standby: bool = False,
    ) -> Compute:
        """Create a node: a directory with its postgresql.conf. Raises ControlPlaneError.

        Commands at once do not get the same port, nor the same name.
        """
        if hot_standby and not self._env.safekeepers:
            raise ControlPlaneError(
                "a hot standby gets its WAL from safekeepers, and this environment has none"
            )
        with self._env.locked():
            if self.get(tenant_id, name) is not None:
                raise ControlPlaneError(f"postgres {name} already exists")
            compute = Compute(
                env=self._env,
                name=name,
                tenant_id=tenant_id,
                timeline_id=timeline_id,
                port=self._free_port() if port is None else port,
                lsn=lsn,
                safekeepers=node_safekeepers.own_addresses(self._env),
                hot_standby=hot_standby,
            )
            _make_directory(compute.pgdata.parent)
            compute.pgdata.mkdir(mode=0o700, exist_ok=True)
            text = postgresql_conf(compute).encode()
            # A directory without it is no node: this is what creates one.
            write_file_durably(compute.pgdata / "postgresql.conf", text, sync=False)
            give(compute.pgdata, recursive=True)
        return compute

    def _free_port(self) -> int:
        """One above the highest port of all nodes, or the next that nobody listens on."""
        ports: list[int] = []
        for directory in (self._env.repo_dir / "pgdatadirs" / "tenants").glob("*"):
            try:
                nodes = self.nodes(TenantId.parse(directory.name), lambda _: None)
            except IdParseError:
                continue
            ports += [node.port for node in nodes]
        highest = max(ports, default=FIRST_PORT - 1)
        for port in range(highest + 1, LAST_PORT + 1):
            if not _accepts(port):
                return port
        raise ControlPlaneError(f"no port above {highest} is free: choose one with --port")

    def _recover(self, tenant_id: TenantId) -> None:
        """Bring back directories that killed starts left between two renames."""
        for old in (self._env.repo_dir / "computes" / str(tenant_id)).glob("*/pgdata.old"):
            state_dir, pgdata = old.parent, self._env.pgdata_dirs(tenant_id) / old.parent.name
            if not pgdata.exists() and state.read(state_dir).supervisor_pid is None:
                from compute_tools import datadir

                datadir.recover_swap(pgdata, state_dir)

    def _load(self, tenant_id: TenantId, name: str) -> Compute:
        path = self._env.pgdata_dirs(tenant_id) / name / "postgresql.conf"
        try:
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            settings = postgres_conf.parse(text.split("\n"))
            lsn = settings.get("recovery_target_lsn")
            return Compute(
                env=self._env,
                name=name,
                tenant_id=TenantId.parse(settings["zenith.zenith_tenant"]),
                timeline_id=TimelineId.parse(settings["zenith.zenith_timeline"]),
                port=_port(settings["port"]),
                lsn=None if lsn is None else Lsn.parse(lsn),
                safekeepers=_safekeepers(settings),
                hot_standby=settings.get("zenith.hot_standby") == "on",
                stop_timeout=parse_duration(settings.get("zenith.stop_timeout", "20s")),
            )
        except (OSError, KeyError, ValueError, ControlPlaneError) as e:
            raise ControlPlaneError(f"cannot read the settings of node {name} in {path}") from e


def node_name(branch: str) -> str:
    """A name of a node after its branch: what it must not hold is `_`, as in feature_x."""
    name = _NOT_IN_NODE_NAME.sub("_", branch)
    return name if _NODE_NAME.fullmatch(name) else f"_{name}"


def postgresql_conf(compute: Compute) -> str:
    """The postgresql.conf of a new node."""
    pageserver = address_text(*parse_address(compute.env.pageserver.listen_pg_addr))
    password = password_placeholder(needed=auth.needs_token(compute.env))
    settings: dict[str, object] = {
        "max_wal_senders": 10,
        "wal_log_hints": "off",
        "max_replication_slots": 10,
        "hot_standby": "on",
        "shared_buffers": "1MB",
        "fsync": "off",
        "max_connections": 100,
        "wal_level": "replica",
        "wal_sender_timeout": "5s",
        "listen_addresses": "127.0.0.1",
        "port": compute.port,
        "wal_keep_size": "10TB",
        "shared_preload_libraries": "zenith",
        "zenith.page_server_connstring": f"postgresql://no_user:{password}@{pageserver}",
        "zenith.zenith_tenant": compute.tenant_id,
        "zenith.zenith_timeline": compute.timeline_id,
    }
    if compute.lsn is not None:
        settings["recovery_target_lsn"] = compute.lsn
    if compute.hot_standby:
        settings["zenith.hot_standby"] = "on"
        settings |= _STANDBY_SETTINGS
    settings["max_replication_write_lag"] = "500MB"
    settings["max_replication_flush_lag"] = "10GB"
    if compute.safekeepers:
        settings["synchronous_standby_names"] = "walproposer"
        settings["wal_acceptors"] = node_safekeepers.setting(compute.safekeepers)
    else:
        settings["synchronous_commit"] = "remote_write"
        settings["synchronous_standby_names"] = "pageserver"
        settings["zenith.callmemaybe_connstring"] = (
            f"host=127.0.0.1 port={compute.port} user={SUPERUSER} dbname=postgres"
        )
    return "".join(f"{name}={_quoted(value)}\n" for name, value in settings.items())


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= LAST_PORT:
        raise ValueError(f"port {port} must be from 1 to {LAST_PORT}")
    return port


def _safekeepers(settings: dict[str, str]) -> tuple[tuple[str, int], ...]:
    """The addresses of wal_acceptors; a node without the setting does without safekeepers."""
    text = settings.get("wal_acceptors")
    if text is None:
        return ()
    addresses = [part.strip() for part in text.split(",") if part.strip()]
    if not addresses:
        raise ControlPlaneError("wal_acceptors names no safekeeper")
    return tuple(parse_address(address, _SAFEKEEPER_PORT) for address in addresses)


def _quoted(value: object) -> str:
    text = str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else "'" + text.replace("'", "''") + "'"


def _make_directory(path: Path) -> None:
    """Make a directory and its parents, whatever the umask: Postgres' user has to get through."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    path.chmod(0o755)


def _not_followed(node: Compute, cause: OSError) -> ControlPlaneError:
    error = ControlPlaneError(
        f"cannot write the new safekeepers into the settings of node {node.name}: "
        "that is tried again at its next start"
    )
    error.__cause__ = cause
    return error


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.3).close()
    except OSError:
        return False
    return True
