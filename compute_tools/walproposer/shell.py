"""The walproposer process: election, stream, acknowledgements, the end.

One thread does it all; others only connect and read recovery streams. The path of a commit is
native (_relay.pyx); what is here runs when something else happens, or in between.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Final

from compute_tools.feedback_file import FeedbackFile
from compute_tools.walproposer._xlog_stream import StreamError
from compute_tools.walproposer.backpressure import Backpressure, LagLimits
from compute_tools.walproposer.config import Config
from compute_tools.walproposer.control import ControlChannel, ControlError
from compute_tools.walproposer.core import (
    Action,
    CampaignFailed,
    Defeated,
    Identity,
    Outdated,
    Phase,
    Proposer,
    ProposerError,
)
from compute_tools.walproposer.loop import EventLoop
from compute_tools.walproposer.obstacles import describe, obstacle
from compute_tools.walproposer.postgres import PostgresStream
from compute_tools.walproposer.postgres_stream import PostgresAddress
from compute_tools.walproposer.safekeepers import SafekeeperPool
from zenith_utils.lsn import Lsn, LsnParseError, lsn_text

logger = logging.getLogger(__name__)

_TICK: Final = 1.0
_RETRY_POLL: Final = 0.05
_DRAIN_POLL: Final = 0.02
# Safekeepers pass a pageserver's report on with their answers: while commits wait for nothing else,
# there would be none without being asked.
_FEEDBACK_POLL: Final = 0.02
_DRAIN_QUIET: Final = 0.2
_GOODBYE: Final = 2.0
_RECOVERY_STUCK: Final = 5.0
_CAMPAIGN_PAUSE: Final = (0.02, 0.2)


class ExitCode(IntEnum):
    """How the process ends."""

    FINISHED = 0
    FATAL = 1
    DEFEATED = 3
    CRASHED = 4


class _Finished(Exception):
    def __init__(self, code: ExitCode) -> None:
        super().__init__(code)
        self.code = code


class Walproposer:
    """Runs one proposer from election to the end of its Postgres."""

    def __init__(self, config: Config, control: ControlChannel) -> None:
        self._config = config
        self._control = control
        self._loop = EventLoop()
        identity = Identity(
            config.tenant_id, config.timeline_id, secrets.token_bytes(16), config.pg_version
        )
        self._core = Proposer(
            identity,
            len(config.safekeepers),
            config.membership.for_proposer(),
            config.predecessors,
        )
        self._pool = SafekeeperPool(
            config, self._core, self._loop, self._on_actions, self._set_limit, self._tell_terms
        )
        self._relay = self._pool.relay
        self._postgres: PostgresStream | None = None
        self._told_campaign = self._told_won = 0
        self._told_elected = False
        file = config.feedback_file
        self._backpressure = Backpressure(None if file is None else FeedbackFile(file))
        self._obstacles = self._told_obstacles = ""
        self._status: object = None
        self._campaign_at: float | None = None
        self._progress: object = None
        self._progress_at = 0.0
        self._next_tick = 0.0
        self._ask_at = 0.0
        self._drain_deadline: float | None = None
        self._drain_clean = False
        self._goodbye_deadline: float | None = None

    def run(self) -> ExitCode:
        """Run to the end; the reason has been told to the supervisor."""
        self._loop.add(self._control.fileno(), self._on_control)
        timeout = 0.0
        try:
            while True:
                # Before the start and at the end every answer may be what is waited for.
                steady = self._core.phase is Phase.LEADER and self._drain_deadline is None
                busy = self._relay.run(timeout, once=not steady)
                timeout = self._after_events(busy)
        except _Finished as e:
            return e.code
        except (ProposerError, ControlError, StreamError) as e:
            logger.error("%s", e)
            self._control.fatal(str(e))
            return ExitCode.FATAL
        except Exception:
            logger.exception("the walproposer failed")
            return ExitCode.CRASHED

    def terminate(self) -> None:
        """Come to an end soon, as if Postgres had gone. From any thread or signal handler."""
        self._loop.post(lambda: self.on_postgres_gone(False))

    # ---- the loop

    def _after_events(self, busy: bool) -> float:
        """What follows from the events of a round; how long the next one may wait, in seconds."""
        core, pool, relay = self._core, self._pool, self._relay
        now = time.monotonic()
        away = pool.connect_missing(now)
        if core.phase is not Phase.LEADER:
            self._elect(now)
        if self._config.settle and self._told_elected and self._drain_deadline is None:
            self._settle(now)
        relay.report()
        more = False
        if core.phase is not Phase.CAMPAIGN:
            more = pool.pump(self._end_lsn(), now)
        if core.commit_lsn > relay.told_commit and (not busy or not self._told_elected):
            pool.heartbeat()
        held = core.commit_lsn > relay.limit_lsn
        if held and now >= self._ask_at:
            self._ask_at = now + _FEEDBACK_POLL
            pool.heartbeat()
        if now >= self._next_tick:
            self._next_tick = now + _TICK
            self._tick(now)
        if self._drain_deadline is not None:
            self._drain(now, self._drain_deadline)
        if more:
            return 0.0
        if self._drain_deadline is not None:
            return _DRAIN_POLL
        if away or not self._told_elected or self._pump_waits():
            return _RETRY_POLL
        return max(0.0, min(self._next_tick, self._ask_at if held else self._next_tick) - now)

    def _pump_waits(self) -> bool:
        end = self._end_lsn()
        return any(peer.next_lsn < end for peer in self._core.peers)

    def _end_lsn(self) -> int:
        """End of the WAL that exists: what safekeepers should get."""
        if self._postgres is not None:
            return self._postgres.received_lsn
        return self._core.epoch_start_lsn

    def _tick(self, now: float) -> None:
        core, pool = self._core, self._pool
        pool.drop_silent(now)
        pool.perform(core.tell_established())
        if not self._told_elected:
            self._tell_obstacles()
        if self._goodbye_deadline is None:
            pool.heartbeat()
        # Also tells the walsender that we live while it cannot send.
        self._relay.report(force=True)
        self._backpressure.tick(now, core.commit_lsn)
        self._relay.report_standbys()
        status = core.commit_lsn, core.feedback
        if self._told_elected and status != self._status:
            self._status = status
            self._control.status(*status)

    # ---- election

    def _tell_terms(self) -> None:
        """Before anything leaves: whoever takes up the stream must know which terms were ours."""
        core = self._core
        if core.term > self._told_campaign:
            self._told_campaign = core.term
            self._control.campaign(core.term)
        if core.phase is not Phase.CAMPAIGN and core.term > self._told_won:
            self._told_won = core.term
            self._control.won(core.term)

    def _tell_obstacles(self) -> None:
        """Say what keeps us from being elected. Raises ProposerError if waiting cannot help."""
        members = [(m, obstacle(m.peer, m.trouble)) for m in self._pool.members]
        message = describe([(str(m), found) for m, found in members])
        if message != self._obstacles:
            # Told when it has lasted for a tick: much is just being sorted out.
            self._obstacles = message
            return
        hopeful = {m.index for m, found in members if found is None or not found.lasting}
        if not self._core.could_win(hopeful):
            raise ProposerError(
                f"no majority of the safekeepers can ever vote for this compute ({message}): "
                "restore the lost files or disks; starting with less would lose what was "
                "acknowledged"
            )
        if message != self._told_obstacles and any(found is not None for _, found in members):
            self._told_obstacles = message
            logger.warning("not elected yet: %s", message)
            self._control.waiting(message)

    def _on_actions(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Defeated):
                logger.error(
                    "fenced: a newer compute took over in term %d, says %s",
                    action.term, self._pool.members[action.peer],
                )  # fmt: skip
                if self._postgres is not None:
                    self._postgres.stop()
                self._control.defeated(action.term)
                raise _Finished(ExitCode.DEFEATED)
            if isinstance(action, Outdated):
                if self._postgres is not None:
                    self._postgres.stop()
                raise ProposerError(
                    f"a newer configuration of safekeepers exists: "
                    f"{self._pool.members[action.peer]} has generation {action.generation}, "
                    f"this compute was started with {self._core.membership.generation}; "
                    "start it again"
                )
            if isinstance(action, CampaignFailed) and self._campaign_at is None:
                pause = random.uniform(*_CAMPAIGN_PAUSE)
                logger.info("campaign in term %d failed, trying again", self._core.term)
                self._campaign_at = time.monotonic() + pause

    def _elect(self, now: float) -> None:
        """Drive the campaign on; report the election once a quorum is synced."""
        core = self._core
        if self._campaign_at is not None and now >= self._campaign_at:
            self._campaign_at = None
            if core.phase is Phase.CAMPAIGN:
                self._pool.perform(core.campaign())
        if core.phase is not Phase.ELECTED or self._told_elected:
            return
        if core.synced:
            self._told_elected = True
            logger.info("%s", self._election())
            self._control.elected(core.term, core.epoch_start_lsn, core.bootstrap)
            return
        progress = core.term, [(p.state, p.next_lsn, p.flush_lsn) for p in core.peers]
        if progress != self._progress:
            self._progress, self._progress_at = progress, now
        elif now - self._progress_at > _RECOVERY_STUCK:
            logger.warning("recovery is stuck without its donor, starting another campaign")
            self._progress_at = now
            self._pool.perform(core.campaign())

    def _election(self) -> str:
        """An election that was won, in words."""
        core, members = self._core, self._pool.members
        voters = [str(m) for m in members if m.peer.vote is not None]
        text = f"elected in term {core.term} with the votes of {', '.join(voters)}"
        if core.donor is None:
            return f"{text}; nothing was written yet"
        start = lsn_text(core.epoch_start_lsn)
        return f"{text}; WAL starts at {start}, as {members[core.donor]} has it"

    def _settle(self, now: float) -> None:
        """There will be no Postgres: leave when all is established and whoever is here has it."""
        core = self._core
        if core.bootstrap:
            self._control.finished(0, True)
            raise _Finished(ExitCode.FINISHED)
        complete = all(
            m.link is None or m.peer.flush_lsn >= core.epoch_start_lsn for m in self._pool.members
        )
        if core.established and (complete or now - self._progress_at > _RECOVERY_STUCK):
            self._pool.perform(core.tell_established())
            self.on_postgres_gone(True)

    # ---- commands

    def _on_control(self, mask: int) -> None:
        del mask
        try:
            commands = self._control.receive()
        except ControlError:
            if self._drain_deadline is None:
                raise
            self._loop.remove(self._control.fileno())
            return
        for command in commands:
            name = command.get("cmd")
            if name == "start":
                self._start(command)
            elif name == "limits":
                self._backpressure.set_limits(_lag_limits(command))
                self._set_limit()
            else:
                raise ControlError(f"unknown command {command!r}")

    def _start(self, command: dict[str, Any]) -> None:
        if not self._told_elected or self._postgres is not None:
            raise ControlError("start comes once, after the election")
        try:
            address = PostgresAddress(command["host"], int(command["port"]), command["user"])
            start_lsn = Lsn.parse(command["start_lsn"])
        except (KeyError, TypeError, ValueError, LsnParseError) as e:
            raise ControlError(f"malformed command {command!r}: {e}") from e
        self._pool.perform(self._core.start(start_lsn))
        self._backpressure.start(start_lsn)
        self._set_limit()
        self._postgres = PostgresStream(
            self._loop, self._relay, address, self._core.epoch_start_lsn, self
        )

    # ---- Postgres

    def on_identified(self, system_id: int, pg_version: int) -> None:
        """Postgres has been reached."""
        self._pool.perform(self._core.identify(system_id, pg_version))

    def on_streaming(self) -> None:
        """The stream has begun, or begun again."""
        assert self._postgres is not None
        logger.info("streaming from Postgres at %s", lsn_text(self._postgres.received_lsn))
        self._relay.report(force=True)
        self._control.streaming()

    def on_postgres_gone(self, clean: bool) -> None:
        """Postgres has ended: push what it sent, then end, too."""
        if self._drain_deadline is None:
            logger.info("Postgres is gone (%s)", "clean" if clean else "not clean")
            self._drain_deadline = time.monotonic() + self._config.drain_timeout
            self._drain_clean = clean

    def on_postgres_failed(self, reason: str) -> None:
        """Postgres refuses to stream."""
        raise ProposerError(f"cannot stream WAL from Postgres: {reason}")

    def _set_limit(self) -> None:
        """Hold acknowledgements back while the pageserver is too far behind."""
        self._relay.limit_lsn = self._backpressure.update(self._core.feedback)

    # ---- the end

    def _drain(self, now: float, deadline: float) -> None:
        """After the end of Postgres: have its WAL committed, say goodbye, finish."""
        core, pool = self._core, self._pool
        if self._goodbye_deadline is not None:
            if pool.all_gone() or now >= self._goodbye_deadline:
                self._control.finished(core.commit_lsn, self._drain_clean)
                raise _Finished(ExitCode.FINISHED)
            return
        end = self._end_lsn()
        drained = core.commit_lsn >= end
        if not drained and pool.have_all(end) >= core.quorum:
            # The end may be in the middle of a record, which is never committed: wait until
            # nothing moves any more.
            progress = core.commit_lsn, [peer.flush_lsn for peer in core.peers]
            if progress != self._progress:
                self._progress, self._progress_at = progress, now
            drained = now - self._progress_at >= _DRAIN_QUIET
        if drained or now >= deadline:
            if not drained:
                logger.warning("gave up pushing the last WAL: no quorum of safekeepers")
            self._goodbye_deadline = now + _GOODBYE
            pool.say_goodbye()


def _lag_limits(command: dict[str, Any]) -> LagLimits:
    try:
        return LagLimits(
            int(command["max_write_lag"]),
            int(command["max_flush_lag"]),
            int(command["max_apply_lag"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ControlError(f"malformed command {command!r}: {e!r}") from e
