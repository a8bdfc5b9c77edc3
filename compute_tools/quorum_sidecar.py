"""The process beside a server of quorum_server.py: keeps its walproposer, and ends it when fenced.

It is started by the process that is about to become the server, and is not that one's child: a
postmaster takes the end of a child it does not know for the crash of a backend. First the
walproposer is elected; what the quorum has must be in the data directory, byte by byte where it
ends, or another server has written to this timeline since and this one must not go on. Then the
server may start. When its end comes, by whomever, the sidecar follows; without the sidecar no
commit returns.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compute_tools import feedback_file
from compute_tools.config_files import ConfigFiles
from compute_tools.postgres_process import pid_file_lines
from compute_tools.proposer_keeper import ProposerKeeper
from compute_tools.proposer_process import ProposerError
from compute_tools.quorum_settings import QuorumSettings
from compute_tools.spec import ComputeSpec
from compute_tools.standby_feed import connect_safekeeper
from compute_tools.walproposer.wal_source import PgWalReader
from postgres_ffi.control_file import parse_control_file
from postgres_ffi.wal_format import segment_start
from zenith_utils.lsn import Lsn
from zenith_utils.pq_client import PqError, connect

log = logging.getLogger(__name__)

_TICK = 1.0
_START_POLL = 0.01
_QUIT_TIMEOUT = 5.0
_READ_TIMEOUT = 10.0
_XLOG_DATA = struct.Struct(">cQQq")
_TAG_XLOG_DATA = ord("w")
_NO_SUCH_ROLE = "28000"
# Whom a cluster's superuser is by habit.
_USERS = ("zenith_admin", "postgres")


class SidecarError(Exception):
    """The server must not start; the message says why."""


@dataclass(frozen=True, slots=True)
class QuorumSpec(ComputeSpec):
    """The specification of a compute that is one to its walproposer only."""

    connstr: str = ""

    @property
    def pageserver_connstr(self) -> str:
        """As the configuration has it; empty if there is no pageserver."""
        return self.connstr


def make_spec(quorum: QuorumSettings, pgdata: Path, port: int) -> QuorumSpec:
    """What a walproposer is told of a server in `pgdata`."""
    return QuorumSpec(
        tenant_id=quorum.tenant_id,
        timeline_id=quorum.timeline_id,
        pgdata=pgdata,
        state_dir=pgdata,
        distrib_dir=pgdata,
        pageserver_pg=("", 0),
        pageserver_http=("", 0),
        port=port,
        safekeepers=quorum.safekeepers,
        connstr=quorum.pageserver_connstr,
    )


class Sidecar:
    """Runs in a process of its own, beside the server with the process id `pid`."""

    def __init__(self, spec: QuorumSpec, config: ConfigFiles, pid: int, pidfd: int) -> None:
        self._spec = spec
        self._config = config
        self._pid = pid
        self._pidfd = pidfd
        self._starting = True
        """Whether the server has still to be told that it may start."""
        self._wakeup, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @classmethod
    def start(cls, spec: QuorumSpec, config: ConfigFiles) -> None:
        """Start it beside this process, which may become the server when this returns.

        Raises SidecarError: then nothing is left running.
        """
        pid = os.getpid()
        pidfd = os.pidfd_open(pid)
        read, write = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0:
                os.close(read)
                cls(spec, config, pid, pidfd)._main(write)
            os._exit(0)
        os.waitpid(child, 0)
        os.close(pidfd)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = json.loads(pipe.read() or '{"failed": "the walproposer\'s keeper died"}')
        if "failed" in answer:
            raise SidecarError(answer["failed"])

    def _main(self, report: int) -> None:
        """The whole life of the process. `report` is told whether the server may start."""
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        logging.basicConfig(
            stream=sys.stderr,
            level=logging.INFO,
            format="%(asctime)s quorum %(levelname)s %(message)s",
        )
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            feedback_file.create(self._spec.feedback_file)
            keeper = ProposerKeeper(self._spec, self._wake)
            try:
                code = self._run(keeper, report)
            finally:
                keeper.stop()
        except (OSError, ProposerError, PqError, SidecarError) as e:
            log.error("%s", e)
            if self._starting:
                with contextlib.suppress(BrokenPipeError):
                    os.write(report, json.dumps({"failed": str(e)}).encode())
        except BaseException:
            log.exception("internal error")
        finally:
            os._exit(code)

    def _run(self, keeper: ProposerKeeper, report: int) -> int:
        lsn = keeper.wait_elected()
        if lsn is not None:
            check_wal(self._spec, lsn)
        os.write(report, b"{}")
        self._starting = False
        os.close(report)
        try:
            self._wait_ready()
            if lsn is None:
                control = (self._spec.pgdata / "global" / "pg_control").read_bytes()
                lsn = Lsn(parse_control_file(control).checkpoint.redo)
            keeper.begin(lsn, self._find_user())
            reason = self._watch(keeper)
        except (OSError, PqError, ProposerError, SidecarError) as e:
            reason = None if self._server_ended() else str(e)
        except BaseException as e:
            log.exception("internal error")
            reason = repr(e)
        if reason is not None:
            log.error("the server is ended: %s", reason)
            self._end_server()
            return 1
        # A fast stop has waited for the quorum; this is for the goodbye.
        keeper.drain(lambda: False)
        return 0

    def _wait_ready(self) -> None:
        """Until the server takes connections; line 8 of postmaster.pid is its own account."""
        while True:
            lines = pid_file_lines(self._spec.pgdata)
            ours = lines[:1] == [str(self._pid)]
            if ours and len(lines) >= 8 and lines[7].strip() == "ready":
                return
            if self._server_ended(_START_POLL):
                raise SidecarError("the server ended while starting")

    def _find_user(self) -> str:
        """A role that may replicate. Raises PqError if there is none by the usual names."""
        for user in _USERS:
            try:
                connect("127.0.0.1", self._spec.port, user=user, replication=True).close()
            except PqError as e:
                if e.sqlstate != _NO_SUCH_ROLE or user == _USERS[-1]:
                    raise
            else:
                return user
        raise AssertionError

    def _watch(self, keeper: ProposerKeeper) -> str | None:
        """Until the server ends (None), or must end (why)."""
        while True:
            if self._config.changed():
                self._follow_config()
            wait = max(0.0, min(_TICK, keeper.next_check - time.monotonic()))
            if self._server_ended(wait):
                return None
            ended = keeper.check()
            if ended is not None:
                followed = keeper.followed_postgres
                return None if self._server_ended(_TICK if followed else 0.0) else ended

    def _follow_config(self) -> None:
        """Write the configuration for the next reload, which the user asks for."""
        trouble = ""
        try:
            self._config.generate_plain()
        except OSError as e:
            trouble = str(e)
        # If it cannot be written, the server goes on with what it has.
        self._config.followed(trouble)

    def _server_ended(self, timeout: float = 0.0) -> bool:
        """Whether it has ended; waits `timeout` seconds, at most until the walproposer speaks."""
        ready, _, _ = select.select([self._pidfd, self._wakeup], [], [], timeout)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 512)
        return self._pidfd in ready

    def _end_server(self) -> None:
        for number in (signal.SIGQUIT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
            if select.select([self._pidfd], [], [], _QUIT_TIMEOUT)[0]:
                return

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wakeup_write, b"\0")


def check_wal(spec: QuorumSpec, end: Lsn) -> None:
    """Whether the WAL in the data directory is the safekeepers', in the segment where theirs ends.

    Two servers that both wrote to the timeline differ from where they parted. Raises SidecarError.
    """
    trouble = ""
    for address in spec.safekeepers:
        try:
            with connect_safekeeper(address, spec) as conn:
                command = f"START_REPLICATION {Lsn(segment_start(end - 1))} TIMELINE 1"
                conn.start_copy_both(command, timeout=_READ_TIMEOUT)
                position = 0
                reader = PgWalReader(spec.pgdata)
                while position < end:
                    message = conn.recv_copy_data(timeout=_READ_TIMEOUT)
                    if message is None or message[0] != _TAG_XLOG_DATA:
                        break
                    _, lsn, _, _ = _XLOG_DATA.unpack_from(message)
                    theirs = message[_XLOG_DATA.size :][: end - lsn]
                    if _read_wal(reader, lsn, len(theirs)) != theirs:
                        raise SidecarError(
                            f"{spec.pgdata} lacks WAL of timeline {spec.timeline_id} that the "
                            f"safekeepers have up to {end}: another server has written to it. "
                            "Start that one, or give this one a new zenith.zenith_timeline"
                        )
                    position = lsn + len(theirs)
                reader.close()
        except (OSError, PqError, TimeoutError) as e:
            trouble = str(e)
            continue
        if position >= end:
            return
    raise SidecarError(f"no safekeeper sends its WAL up to {end}: {trouble or 'it ends before'}")


def _read_wal(reader: PgWalReader, lsn: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = reader.read(lsn + len(data), size - len(data))
        if part is None:
            break
        data += part
    return data
