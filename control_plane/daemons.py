"""Starting, stopping and watching the pageserver and the safekeepers of a local environment."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from control_plane import http_client
from control_plane.addresses import parse_address
from control_plane.environment import daemon_environment
from control_plane.errors import ControlPlaneError
from control_plane.local_env import LocalEnv
from control_plane.processes import signal_holder
from zenith_utils.pid_file import is_alive, read_pid_file, running_pid

Say = Callable[[str], None]

START_TIMEOUT = 15.0
STOP_TIMEOUT = 100.0
STATUS_TIMEOUT = 5.0
_POLL_START = 0.01
_POLL_MAX = 0.25


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """One server process as far as its directory tells: whether it runs, and how it is stopped."""

    title: str  # in messages that tell safekeepers apart: Pageserver, Safekeeper 1
    kind: str  # in messages: pageserver, safekeeper
    work_dir: Path

    @property
    def pid_file(self) -> Path:
        """Where the daemon writes its process id."""
        return self.work_dir / f"{self.kind}.pid"

    @property
    def log_file(self) -> Path:
        """Where the daemon logs."""
        return self.work_dir / f"{self.kind}.log"

    def running_pid(self) -> int | None:
        """Process id of the daemon if it lives: the lock of its pid file says so."""
        return running_pid(self.pid_file)

    def stop(self, say: Say, *, immediate: bool) -> None:
        """Stop the daemon and wait until it is gone; one that does not run is no error.

        Raises ControlPlaneError.
        """
        word = self.kind.capitalize()
        if self.running_pid() is None:
            stale = read_pid_file(self.pid_file)
            if stale is None:
                say(f"{self.title} is already stopped")
            else:
                say(f"{word} with pid {stale} does not exist, but a PID file was found")
            return
        say(f"Stop {self.kind} {'immediately' if immediate else 'gracefully'}")
        number = signal.SIGQUIT if immediate else signal.SIGTERM
        pid = signal_holder(self.running_pid, number)
        deadline = time.monotonic() + STOP_TIMEOUT
        next_word = time.monotonic() + 1.0
        while pid is not None and is_alive(pid):
            if time.monotonic() > deadline:
                raise ControlPlaneError(f"Failed to stop {self.kind} with pid {pid}")
            if time.monotonic() > next_word:
                next_word += 1.0
                say(f"{word} still receives connections")
            time.sleep(_POLL_START)
        say(f"{word} stopped receiving connections")
        self._tell_of_address(say)

    def _tell_of_address(self, say: Say) -> None:
        """Say whether the address of what has been stopped is free; here it is not known."""


@dataclass(frozen=True, slots=True)
class Daemon(ServerProcess):
    """A server of the configuration, as the command line deals with it."""

    command: tuple[str, ...]
    pg_address: tuple[str, int]
    http_address: tuple[str, int]
    shown_address: str

    def start(self, say: Say) -> None:
        """Start the daemon, unless it runs already, and wait until it answers.

        An interrupt from the keyboard stops it again if it was started here. Raises
        ControlPlaneError.
        """
        pid = self.running_pid()
        if pid is not None:
            say(f"{self.title} is already running with pid {pid}")
            self._wait_for_answer()
            return
        say(f"Starting {self.kind} at '{self.shown_address}' in '{self.work_dir}'")
        word = self.kind.capitalize()
        # In a session of its own: the terminal's interrupt is for us, who know what to undo.
        process = subprocess.Popen(
            self.command,
            env=daemon_environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            if process.wait() != 0:
                raise ControlPlaneError(
                    f"{word} failed to start. See '{self.log_file}' for details."
                )
            self._wait_for_answer()
        except KeyboardInterrupt:
            # Before it has gone to the background, there is nobody to find yet.
            if process.wait() == 0:
                self.stop(say, immediate=False)
            raise
        say(f"{word} started")

    def _wait_for_answer(self) -> None:
        word = self.kind.capitalize()
        deadline = time.monotonic() + START_TIMEOUT
        pause = _POLL_START
        while not self._answers():
            if self.running_pid() is None:
                raise ControlPlaneError(
                    f"{word} ended while starting. See '{self.log_file}' for details."
                )
            if time.monotonic() > deadline:
                raise ControlPlaneError(
                    f"{self.kind} failed to start in {START_TIMEOUT:.0f} seconds. "
                    f"See '{self.log_file}' for details."
                )
            time.sleep(pause)
            pause = min(2 * pause, _POLL_MAX)

    def is_running(self) -> bool:
        """Whether the process of the pid file lives and takes connections."""
        if self.running_pid() is None:
            return False
        try:
            socket.create_connection(self.pg_address, timeout=1).close()
        except OSError:
            return False
        return True

    def _answers(self) -> bool:
        """Whether the HTTP service is up; an error status fails the start at once."""
        try:
            answer = self._status()
        except http_client.UnreachableError:
            return False
        if not answer.ok:
            raise ControlPlaneError(f"{self.kind} failed to start: {answer.error}")
        return True

    def _tell_of_address(self, say: Say) -> None:
        word = self.kind.capitalize()
        try:
            status = self._status().status
            say(f"{word} status is: somebody else answers at its address ({status})")
        except http_client.UnreachableError as e:
            say(f"{word} status is: {e}")

    def _status(self) -> http_client.Answer:
        return http_client.request(self.http_address, "GET", "/v1/status", timeout=STATUS_TIMEOUT)


def pageserver(env: LocalEnv, overrides: Sequence[str] = ()) -> Daemon:
    """The pageserver; `overrides` are TOML texts for its configuration."""
    conf = env.pageserver
    arguments = ["-D", str(env.repo_dir)]
    for text in overrides:
        arguments += ["-c", text]
    return Daemon(
        title="Pageserver",
        kind="pageserver",
        work_dir=env.repo_dir,
        command=(str(env.zenith_distrib_dir / "pageserver"), *arguments, "--daemonize"),
        pg_address=parse_address(conf.listen_pg_addr),
        http_address=parse_address(conf.listen_http_addr),
        shown_address=conf.listen_pg_addr,
    )


def safekeeper(env: LocalEnv, node_id: int) -> Daemon:
    """One safekeeper."""
    conf = env.safekeeper(node_id)
    work_dir = env.safekeeper_dir(node_id)
    arguments = ["-D", str(work_dir), "--id", str(node_id)]
    arguments += ["--listen-pg", f"127.0.0.1:{conf.pg_port}"]
    arguments += ["--listen-http", f"127.0.0.1:{conf.http_port}"]
    arguments += ["--recall", "1 second", "--daemonize"]
    if not conf.sync:
        arguments.append("--no-sync")
    for name, value in conf.wal_options.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    return Daemon(
        title=f"Safekeeper {node_id}",
        kind="safekeeper",
        work_dir=work_dir,
        command=(str(env.zenith_distrib_dir / "safekeeper"), *arguments),
        pg_address=("127.0.0.1", conf.pg_port),
        http_address=("127.0.0.1", conf.http_port),
        shown_address=f"127.0.0.1:{conf.pg_port}",
    )


def removed_safekeepers(env: LocalEnv) -> dict[int, ServerProcess]:
    """Safekeepers by id that run though the configuration does not name them (any more).

    A change of the safekeepers that is broken off leaves the one it has removed so.
    """
    named = {conf.id for conf in env.safekeepers}
    found = {
        node_id: ServerProcess(f"Safekeeper {node_id}", "safekeeper", env.safekeeper_dir(node_id))
        for node_id in env.safekeeper_ids_on_disk()
        if node_id not in named
    }
    return {node_id: p for node_id, p in found.items() if p.running_pid() is not None}
