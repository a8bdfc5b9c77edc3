"""The life of one compute: choose its LSN, make its directory, run Postgres, end it cleanly.

The supervisor is Postgres' parent and keeps beside it the walproposer (with safekeepers) and the
lease on its base LSN. A walproposer that dies is replaced. Else whatever ends first ends all: a
compute is disposable, storage is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial

from compute_tools import datadir, feedback_file, postgres_conf, state
from compute_tools.auth import auth_token
from compute_tools.config_files import ConfigFiles, DirectoryWatch
from compute_tools.feedback_file import FeedbackFile
from compute_tools.lazy_map import LazyMapError, lazyfiles_environment
from compute_tools.pageserver_client import (
    LEASE_RENEWAL,
    GoneError,
    Lease,
    PageserverClient,
    PageserverError,
)
from compute_tools.periodic import Periodic
from compute_tools.postgres_process import (
    PostgresError,
    PostgresProcess,
    become_subreaper,
    end_leftovers,
    reap_strangers,
)
from compute_tools.proposer_keeper import ProposerKeeper
from compute_tools.proposer_process import ProposerError
from compute_tools.spec import ComputeSpec
from compute_tools.standby_feed import CHECK_INTERVAL, StandbyFeed
from compute_tools.standby_start import StandbyStartError, find_standby_start
from pgxn.build import ModuleBuildError, PgModules, build_modules
from postgres_ffi.control_file import ControlFileError, parse_control_file
from postgres_ffi.distrib import DistribError, find_distrib
from zenith_utils.lsn import Lsn
from zenith_utils.os_user import OsUserError
from zenith_utils.reachable import check_reachable

log = logging.getLogger(__name__)

_IMMEDIATE_TIMEOUT = 5.0
_THREAD_TIMEOUT = 2.0
_TICK = 1.0
# How long a clean stop waits for a walproposer that is being replaced.
_TAKEOVER_TIMEOUT = 5.0

Progress = Callable[[str], None]

# What can go wrong in a start, and says by itself what it is.
_START_ERRORS = (
    OSError,
    DistribError,
    LazyMapError,
    ModuleBuildError,
    OsUserError,
    PageserverError,
    PostgresError,
    ProposerError,
    StandbyStartError,
    datadir.DatadirError,
)


class ComputeError(Exception):
    """The compute cannot start; the message says why."""


class StopMode(Enum):
    """How Postgres is asked to stop."""

    FAST = signal.SIGINT
    IMMEDIATE = signal.SIGQUIT


class _StopRequested(Exception):
    """A signal asked for the end while the compute was starting."""


@dataclass(slots=True)
class _Parts:
    """What runs, in the order it was started."""

    proposer: ProposerKeeper | None = None
    lease: Lease | None = None
    renewal: Periodic | None = None
    postgres: PostgresProcess | None = None
    calls: Periodic | None = None


class Supervisor:
    """Runs one compute from start to end. Use from the main thread of its process."""

    def __init__(self, spec: ComputeSpec) -> None:
        self._spec = spec
        self._pageserver = PageserverClient(spec)
        self._config = ConfigFiles(spec.pgdata, spec.state_dir / "postgresql.conf")
        self._watch = DirectoryWatch()
        self._parts = _Parts()
        self._lag_limits = dict.fromkeys(postgres_conf.LAG_LIMITS, 0)
        self._limits: dict[str, int] = {}
        self._lease_lost = ""
        """Why the pages at the base LSN cannot be had any more, if that is so."""
        self._feed = StandbyFeed(spec, self._ask_for_reload) if spec.hot_standby else None
        self._stop: StopMode | None = None
        self._stop_asked_at = 0.0
        self._reload = False
        self._may_interrupt = False
        self._wakeup, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        for number, mode in (
            (signal.SIGTERM, StopMode.FAST),
            (signal.SIGINT, StopMode.FAST),
            (signal.SIGQUIT, StopMode.IMMEDIATE),
        ):
            signal.signal(number, partial(self._on_stop_signal, mode))
        signal.signal(signal.SIGHUP, self._on_reload_signal)
        signal.signal(signal.SIGCHLD, lambda _n, _f: None)
        become_subreaper()

    def start(self, progress: Progress) -> None:
        """Bring the compute up until it takes connections; raises ComputeError.

        `progress` is told what is being done, a line a step. On a failure, or when a signal asks
        for the end, nothing is left running.
        """
        state_dir = self._spec.state_dir
        state.write(state_dir, state.Phase.STARTING)
        try:
            self._start(progress)
        except Exception as e:
            reason = _why_not_started(e)
            self._stop_all(StopMode.IMMEDIATE)
            state.write(state_dir, state.Phase.STOPPED, reason)
            raise ComputeError(reason) from e
        state.write(state_dir, state.Phase.RUNNING)

    def run(self) -> int:
        """Wait for the end, whoever brings it; the process's exit status."""
        state_dir = self._spec.state_dir
        # The directory that was swapped out: removing a large one would have delayed the start.
        threading.Thread(
            target=datadir.remove_leftovers, args=(state_dir,), name="cleanup", daemon=True
        ).start()
        reason = self._wait_for_end()
        if reason is None:
            state.write(state_dir, state.Phase.STOPPING)
            trouble = self._stop_all(self._stop or StopMode.FAST)
            state.write(state_dir, state.Phase.STOPPED, trouble)
            log.info("compute stopped%s", f": {trouble}" if trouble else "")
            return 0
        log.error("compute ends: %s", reason)
        if self._parts.postgres is not None and self._parts.postgres.poll() is None:
            self._parts.postgres.note(reason)
        state.write(state_dir, state.Phase.CRASHED, reason)
        self._stop_all(StopMode.IMMEDIATE)
        return 1

    # Start

    def _start(self, progress: Progress) -> None:
        spec, parts = self._spec, self._parts
        feedback_file.create(spec.feedback_file)
        if spec.safekeepers and not spec.read_only:
            # First of all: its election goes on while we look for our own things.
            parts.proposer = ProposerKeeper(spec, self._wake)
        with self._interruptible():
            state.remove_temp_files(spec.state_dir)
            check_reachable(spec.state_dir)
            end_leftovers(spec.pgdata)
            datadir.recover_swap(spec.pgdata, spec.state_dir)
            distrib = find_distrib(spec.distrib_dir)
            if not spec.read_only:
                distrib.require_commits_wait()
            modules = build_modules(distrib)
            replay = None
            if self._feed is not None:
                replay = find_standby_start(spec, distrib.version)
                self._feed.begin_at(replay.lsn)
            base_lsn = self._choose_lsn(progress) if replay is None else replay.lsn
            progress(
                "Extracting base backup to create postgres instance: "
                f"path={spec.pgdata} port={spec.port}"
            )
            backup = self._pageserver.basebackup(base_lsn)
            parts.lease = Lease(state.lease_id(spec.state_dir), base_lsn)
            self._pageserver.renew_lease(parts.lease)
        parts.renewal = Periodic(
            "renewing the lease", LEASE_RENEWAL, partial(self._renew_lease, parts.lease)
        )
        parts.renewal.start()
        with self._interruptible():
            prepared = datadir.prepare(
                backup, spec.pgdata, spec.state_dir, standby=spec.read_only, replay=replay
            )
            del backup
            datadir.swap_in(prepared, spec.pgdata, spec.state_dir)
            progress(
                f"Starting postgres node at 'host=127.0.0.1 port={spec.port} "
                f"user={spec.superuser} dbname=postgres'"
            )
            settings = self._generate_config()
            arguments = self._postgres_arguments(settings, modules)
        parts.postgres = PostgresProcess.start(
            distrib.bin_dir / "postgres", spec.pgdata, arguments, self._environment(modules)
        )
        with self._interruptible():
            parts.postgres.wait_ready()
            if parts.proposer is not None:
                self._set_limits(settings)
                # The first record of this life of the server lies at the base LSN.
                parts.proposer.begin(base_lsn)
            elif not spec.read_only:
                self._pageserver.callmemaybe()
        if parts.proposer is None and not spec.read_only:
            # A pageserver that was restarted does not know of us until it is called.
            # And it cannot tell us by the replication protocol all that it reports to safekeepers.
            parts.calls = Periodic(
                "calling the pageserver",
                _TICK,
                partial(self._call_pageserver, FeedbackFile(spec.feedback_file)),
            )
            parts.calls.start()

        if self._feed is not None:
            parts.calls = Periodic("asking the safekeepers", CHECK_INTERVAL, self._feed.check)
            parts.calls.start()

    def _renew_lease(self, lease: Lease) -> None:
        try:
            self._pageserver.renew_lease(lease)
        except GoneError as e:
            # Blocks that are not here yet will never be: better no node than one with such holes.
            self._lease_lost = (
                f"the pageserver has no pages at {lease.lsn} for it any more ({e}): start it again"
            )
            self._wake()

    def _call_pageserver(self, file: FeedbackFile) -> None:
        self._pageserver.callmemaybe()
        feedback = self._pageserver.feedback()
        # A size that is not known lifts no limit: the last one counts until there is another.
        if feedback is not None:
            file.write(feedback, feedback_file.NO_LIMIT)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Steps that a stop signal may break off anywhere: they own nothing yet that must be ended.

        Between them a signal is only remembered, so that no process is started and forgotten.
        """
        self._may_interrupt = True
        try:
            if self._stop is not None:
                raise _StopRequested
            yield
        finally:
            self._may_interrupt = False

    def _choose_lsn(self, progress: Progress) -> Lsn:
        """The LSN this compute starts at."""
        spec, proposer = self._spec, self._parts.proposer
        if spec.lsn is not None:
            return spec.lsn
        if proposer is None:
            return self._pageserver.last_record_lsn()
        synced = proposer.wait_elected()
        if synced is None:
            return self._bootstrap_lsn()
        progress(f"Safekeepers synced on {synced}")
        return synced

    def _bootstrap_lsn(self) -> Lsn:
        """No safekeeper ever had WAL: the timeline's own LSN is where its WAL begins.

        Unless there is some in the pageserver: then they have lost theirs, and beginning again at
        what the pageserver happens to have could drop what was acknowledged. Raises ProposerError.
        """
        begin, end = self._pageserver.positions()
        if end > begin:
            raise ProposerError(
                f"the safekeepers have no WAL of timeline {self._spec.timeline_id}, but the "
                f"pageserver has it up to {end}, from {begin} on: they have lost it, or are not "
                "those that it was written with. Start the right ones, or restore their disks. If "
                "what the pageserver has is all there is (also if there were no safekeepers "
                "before), go on from there on a new branch:\n"
                f"    zenith timeline branch --branch-name NEW --ancestor-branch-name OLD\n"
                "    zenith pg start NODE --branch-name NEW"
            )
        return end

    def _generate_config(self) -> dict[str, str]:
        own = {} if self._feed is None else {"primary_conninfo": self._feed.conninfo()}
        settings = self._config.generate(own)
        self._watch.watch(self._config.directories())
        return settings

    def _postgres_arguments(self, settings: dict[str, str], modules: PgModules) -> list[str]:
        """The command line that goes with the settings file."""
        spec = self._spec
        control = parse_control_file((spec.pgdata / "global" / "pg_control").read_bytes())
        standby_name = "walproposer" if spec.safekeepers else "pageserver"
        node = postgres_conf.Node(
            pgdata=spec.pgdata,
            port=spec.port,
            standby_name=None if spec.read_only else standby_name,
            safekeepers=bool(spec.safekeepers),
            tracked={
                name: control.field(field) for name, field in postgres_conf.TRACKED_LIMITS.items()
            },
            prepared=len(list((spec.pgdata / "pg_twophase").iterdir())),
            library=modules.zenith,
            feedback_file=spec.feedback_file,
            hot_standby=spec.hot_standby,
        )
        arguments = ["-c", f"config_file={spec.state_dir / 'postgresql.conf'}"]
        forced = postgres_conf.command_line(settings, node)
        self._limits = postgres_conf.limits_in_use(settings, forced)
        for name, value in forced.items():
            arguments += ["-c", f"{name}={value}"]
        return arguments

    def _environment(self, modules: PgModules) -> dict[str, str]:
        spec = self._spec
        return {
            **_clean_environment(),
            **lazyfiles_environment(
                modules.lazyfiles,
                spec.state_dir / "blocks.map",
                pageserver=spec.pageserver_pg,
                tenant_id=spec.tenant_id,
                timeline_id=spec.timeline_id,
                auth_token=auth_token(),
                extensions=(modules.zenith, modules.zenith_test_utils),
            ),
        }

    def _set_limits(self, settings: dict[str, str]) -> None:
        """Tell the walproposer the limits; a value that Postgres refuses changes nothing."""
        assert self._parts.proposer is not None
        for name in self._lag_limits:
            limit = postgres_conf.size_limit(settings, name)
            if limit is not None:
                self._lag_limits[name] = limit
        self._parts.proposer.set_limits(*self._lag_limits.values())

    # While it runs

    def _wait_for_end(self) -> str | None:
        """Wait until a stop is asked for (None) or something ends by itself (the reason)."""
        while not self._is_to_stop():
            ended = self._what_ended()
            if ended is not None:
                return ended
            reap_strangers(self._own_children())
            if self._reload or self._config.changed():
                self._follow_config()
            select.select([self._wakeup, *self._watch.filenos()], [], [], self._longest_wait())
            self._drain_wakeup()
            self._watch.drain()
        return None

    def _is_to_stop(self) -> bool:
        """Whether a stop was asked for and can begin.

        A clean one waits a while for a walproposer that is being replaced: none could connect to
        a server that shuts down, and its last WAL would stay here.
        """
        proposer = self._parts.proposer
        if self._stop is not StopMode.FAST or proposer is None or proposer.streaming:
            return self._stop is not None
        return time.monotonic() >= self._stop_asked_at + _TAKEOVER_TIMEOUT

    def _longest_wait(self) -> float:
        proposer = self._parts.proposer
        if proposer is None:
            return _TICK
        return min(_TICK, max(0.0, proposer.next_check - time.monotonic()))

    def _follow_config(self) -> None:
        """Postgres' reload reads the generated file, so it follows the user's at once."""
        # Before the file is written: what is asked for from now on comes with the next one.
        reload, self._reload = self._reload, False
        trouble = ""
        try:
            settings = self._generate_config()
            # What Postgres refuses, it refuses as a whole.
            if self._parts.proposer is not None and self._config.complete:
                self._set_limits(settings)
        except (OSError, ProposerError) as e:
            trouble = str(e)
        self._config.followed(trouble)
        if reload and self._parts.postgres is not None:
            self._parts.postgres.signal(signal.SIGHUP)

    def _what_ended(self) -> str | None:
        postgres, proposer = self._parts.postgres, self._parts.proposer
        assert postgres is not None
        status = postgres.poll()
        if status is None and proposer is not None and proposer.followed_postgres:
            # It has seen the end of Postgres before there is one for us: that is the reason.
            postgres.wait(_TICK)
            status = postgres.poll()
        if status is not None:
            return f"Postgres ended unexpectedly with status {status}:\n{postgres.log_tail()}"
        if proposer is not None:
            ended = proposer.check()
            if ended is not None:
                return ended
        if self._lease_lost:
            return self._lease_lost
        if self._spec.read_only and not (self._spec.pgdata / "standby.signal").exists():
            return "the read-only node was promoted: it would diverge from its timeline"
        return None if self._feed is None else self._why_standby_waits(self._feed)

    def _why_standby_waits(self, feed: StandbyFeed) -> str | None:
        """Replay waits for ever where the primary's settings allow more than the standby's.

        pg_control has the primary's as of the last record replayed. And where WAL is missing.
        """
        if feed.lost:
            return feed.lost
        try:
            data = (self._spec.pgdata / "global/pg_control").read_bytes()
            control = parse_control_file(data)
        except ControlFileError:
            return None  # read while it was written
        for name, field in postgres_conf.TRACKED_LIMITS.items():
            if control.field(field) > self._limits[name]:
                return (
                    f"the read-write node now has {name} = {control.field(field)}, this hot "
                    f"standby {self._limits[name]}: start it again, it takes the setting over"
                )
        return None

    def _own_children(self) -> set[int]:
        parts = (self._parts.postgres, self._parts.proposer)
        return {part.pid for part in parts if part is not None}

    def _on_stop_signal(self, mode: StopMode, _number: int, _frame: object) -> None:
        # A second, stronger request wins over the first.
        if self._stop is None:
            self._stop_asked_at = time.monotonic()
        if self._stop is not StopMode.IMMEDIATE:
            self._stop = mode
        if self._may_interrupt:
            self._may_interrupt = False
            raise _StopRequested

    def _on_reload_signal(self, _number: int, _frame: object) -> None:
        self._ask_for_reload()

    def _ask_for_reload(self) -> None:
        """Have the configuration written again and Postgres read it, within a second."""
        self._reload = True

    def _wake(self) -> None:
        """Have the main thread look around. From any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wakeup_write, b"\0")

    def _drain_wakeup(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wakeup, 512):
                pass

    # End

    def _stop_all(self, mode: StopMode) -> str:
        """End everything; what did not go as it should, empty after a clean stop."""
        parts, self._parts = self._parts, _Parts()
        trouble = ""
        if parts.calls is not None:
            parts.calls.stop(_THREAD_TIMEOUT)
        if parts.proposer is not None and mode is StopMode.FAST:
            # A walsender does not end before all it has sent is acknowledged.
            with contextlib.suppress(ProposerError):
                parts.proposer.set_limits(0, 0, 0)
        if parts.postgres is not None:
            trouble = self._stop_postgres(parts.postgres, mode)
            spare = [] if parts.proposer is None else [parts.proposer.pid]
            parts.postgres.clean_up(spare=spare)
        if parts.proposer is not None:
            # After a clean end it first brings the shutdown checkpoint to the quorum.
            if (
                mode is StopMode.FAST
                and not trouble
                and not parts.proposer.drain(lambda: self._stop is StopMode.IMMEDIATE)
            ):
                trouble = "its last WAL, nothing acknowledged, did not reach the safekeepers"
            parts.proposer.stop()
        renewing = parts.renewal is not None and not parts.renewal.stop(_THREAD_TIMEOUT)
        # Also where a start was broken off before it had the answer.
        if parts.lease is not None and not renewing:
            self._release(parts.lease)
        return trouble

    def _release(self, lease: Lease) -> None:
        try:
            self._pageserver.release_lease(lease)
        except PageserverError as e:
            log.info("lease on %s was not given back and will expire: %s", lease.lsn, e)

    def _stop_postgres(self, postgres: PostgresProcess, mode: StopMode) -> str:
        """Stop the server by its deadline: without a quorum a fast stop would wait for ever.

        Returns what went wrong with a fast stop; an immediate one is as it was asked for.
        """
        if mode is StopMode.IMMEDIATE:
            self._quit_postgres(postgres)
            return ""
        if postgres.poll() is not None:
            return f"Postgres had ended before with status {postgres.poll()}"
        postgres.signal(signal.SIGINT)
        deadline = time.monotonic() + self._spec.stop_timeout
        while time.monotonic() < deadline and self._stop is not StopMode.IMMEDIATE:
            if postgres.wait(0.05):
                status = postgres.poll()
                return f"Postgres ended with status {status}" if status else ""
        if self._stop is StopMode.IMMEDIATE:
            trouble = "it was ended immediately before a fast stop was over"
        else:
            trouble = (
                f"it did not stop within {self._spec.stop_timeout:g} s (is the quorum away?) and "
                "was ended immediately; nothing acknowledged is lost"
            )
        log.warning("%s", trouble)
        self._quit_postgres(postgres)
        return trouble

    def _quit_postgres(self, postgres: PostgresProcess) -> None:
        for number in (signal.SIGQUIT, signal.SIGKILL):
            postgres.signal(number)
            if postgres.wait(_IMMEDIATE_TIMEOUT):
                return
        log.error("Postgres, process %d, cannot be ended", postgres.pid)


def _why_not_started(error: Exception) -> str:
    if isinstance(error, _StopRequested):
        return "it was stopped while starting"
    if isinstance(error, _START_ERRORS):
        return str(error)
    log.error("the start failed", exc_info=error)
    return f"internal error: {error!r}"


def _clean_environment() -> dict[str, str]:
    """Our environment without what would steer libpq or the server behind the settings' back."""
    keep = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PG") and name not in ("LD_PRELOAD", "NOTIFY_SOCKET")
    }
    keep.setdefault("PATH", "/usr/bin:/bin")
    return keep
