"""A walproposer as a child of the supervisor: its events and its end.

proposer_keeper.py replaces one that died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from compute_tools.spec import ComputeSpec, address_text
from compute_tools.walproposer.core import Predecessors
from zenith_utils.lsn import Lsn

log = logging.getLogger(__name__)

ELECTION_TIMEOUT = 60.0
STREAMING_TIMEOUT = 30.0
DRAIN_TIMEOUT = 15.0
END_TIMEOUT = 1.0
_POLL = 0.02


class ProposerError(Exception):
    """The walproposer cannot do its work; the message says why."""


class ProposerProcess:
    """A running walproposer. Events are read by a thread of their own."""

    def __init__(
        self, process: subprocess.Popen[bytes], safekeepers: str, on_event: Callable[[], None]
    ) -> None:
        self._process = process
        self._safekeepers = safekeepers
        self._on_event = on_event
        self._changed = threading.Condition()
        self._events: dict[str, dict[str, Any]] = {}
        self._won: set[int] = set()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="walproposer", daemon=True)
        self._reader.start()

    @classmethod
    def start(
        cls,
        spec: ComputeSpec,
        on_event: Callable[[], None],
        predecessors: Predecessors | None = None,
    ) -> ProposerProcess:
        """Start the process: it begins to campaign at once.

        `on_event` is called by another thread when it has said something. With `predecessors` it
        takes up the stream of the Postgres they served.
        """
        safekeepers = ",".join(address_text(*address) for address in spec.safekeepers)
        arguments = [
            f"--tenant={spec.tenant_id}",
            f"--timeline={spec.timeline_id}",
            f"--safekeepers={safekeepers}",
            f"--pageserver-connstr={spec.pageserver_connstr}",
            f"--pgdata={spec.pgdata}",
            f"--feedback-file={spec.feedback_file}",
            *_inheritance(predecessors),
        ]
        if spec.membership.members:
            arguments.append(f"--membership={json.dumps(spec.membership.to_json())}")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "compute_tools.walproposer", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The terminal's Ctrl-C is the supervisor's to handle.
            start_new_session=True,
        )
        return cls(process, safekeepers, on_event)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_elected(self) -> Lsn | None:
        """Wait for a majority; the LSN it agrees on, None if nothing was ever written.

        Raises ProposerError.
        """
        event = self._wait_for("elected", ELECTION_TIMEOUT)
        if event is None:
            with self._changed:
                waiting = self._events.get("waiting", {}).get("message", "are they running?")
            raise ProposerError(
                f"no majority of the safekeepers ({self._safekeepers}) answered within "
                f"{ELECTION_TIMEOUT:.0f} s: {waiting}"
            )
        return None if event["bootstrap"] else Lsn.parse(event["epoch_start_lsn"])

    def begin(self, start_lsn: Lsn, port: int, user: str) -> None:
        """Let it stream from `start_lsn` on, from the Postgres at `port`; raises ProposerError."""
        self._send(cmd="start", host="127.0.0.1", port=port, user=user, start_lsn=str(start_lsn))

    def wait_streaming(self) -> None:
        """Wait until it streams; raises ProposerError."""
        if self._wait_for("streaming", STREAMING_TIMEOUT) is None:
            raise ProposerError(
                f"the walproposer did not get WAL from Postgres within {STREAMING_TIMEOUT:.0f} s"
            )

    def set_limits(self, write_lag: int, flush_lag: int, apply_lag: int) -> None:
        """Hold commits back while the pageserver lags more than that, in bytes; 0 is no limit.

        Raises ProposerError.
        """
        self._send(
            cmd="limits",
            max_write_lag=write_lag,
            max_flush_lag=flush_lag,
            max_apply_lag=apply_lag,
        )

    def event(self, name: str) -> dict[str, Any] | None:
        """The last event of this name, if there was one."""
        with self._changed:
            return self._events.get(name)

    def why_ended(self) -> str | None:
        """None while it runs; else what it said, or its exit status."""
        if self._process.poll() is None:
            return None
        self._reader.join()
        if "defeated" in self._events:
            term = self._events["defeated"]["term"]
            return (
                f"a newer compute took over this timeline in term {term}: this one is fenced, "
                "none of its commits that still waited was acknowledged"
            )
        if "fatal" in self._events:
            return f"the walproposer failed: {self._events['fatal']['message']}"
        status = self._process.returncode
        if status < 0:
            return f"the walproposer was killed by signal {-status}"
        return f"the walproposer ended with status {status}"

    @property
    def may_be_followed(self) -> bool:
        """Of one that has ended: whether that was the end of this process only, not of the compute.

        A defeat, and what must not happen, end the compute.
        """
        return self._events.keys().isdisjoint(("defeated", "fatal"))

    @property
    def terms_won(self) -> frozenset[int]:
        """Of one that has ended: the terms it won."""
        self._reader.join()
        return frozenset(self._won)

    @property
    def last_term(self) -> int:
        """The highest term it has asked for votes in, 0 if there is none."""
        asked = self.event("campaign")
        return 0 if asked is None else int(asked["term"])

    @property
    def followed_postgres(self) -> bool:
        """Whether it has ended because its Postgres had, or seemed to have."""
        return self.why_ended() is not None and "finished" in self._events

    def drain(self, hurry: Callable[[], bool]) -> bool:
        """After a clean end of Postgres: whether all that it sent has reached the quorum.

        Waits for it until its deadline, or `hurry` is true.
        """
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline and not hurry():
            time.sleep(_POLL)
        if self._process.poll() is None:
            return False
        self._reader.join()
        return bool(self._events.get("finished", {}).get("clean"))

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def _send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise ProposerError(self.why_ended() or "the walproposer is gone") from None

    def _wait_for(self, name: str, timeout: float) -> dict[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: name in self._events or self._ended, timeout)
            if name in self._events:
                return self._events[name]
            if not self._ended:
                return None
        self._process.wait()
        raise ProposerError(self.why_ended())

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                event = json.loads(line)
                with self._changed:
                    self._events[event["event"]] = event
                    if event["event"] == "won":
                        self._won.add(event["term"])
                    self._changed.notify_all()
                self._on_event()
        except (ValueError, KeyError, TypeError) as e:
            log.error("the walproposer says what cannot be understood: %r", e)
            self._process.kill()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()


def _inheritance(predecessors: Predecessors | None) -> list[str]:
    if predecessors is None:
        return []
    terms = ",".join(str(term) for term in sorted(predecessors.terms))
    return [f"--own-terms={terms}", f"--last-term={predecessors.last_term}"]
