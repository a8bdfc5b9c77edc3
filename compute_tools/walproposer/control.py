"""The channel to the supervisor: one JSON object per line, commands on stdin, events on stdout.

Events (LSNs as text, ``X/X``):
- ``{"event": "campaign", "term": n}``: votes are about to be asked for.
- ``{"event": "won", "term": n}``: a quorum has voted for it; nobody has been told yet.
- ``{"event": "elected", "term": n, "epoch_start_lsn": "X/X", "bootstrap": bool}``: a quorum holds
  everything up to this LSN as committed. In a bootstrap it is ``0/0``: nothing was ever written.
- ``{"event": "waiting", "message": "..."}``: there is no leader yet, because of this.
- ``{"event": "streaming"}``: Postgres' WAL is flowing; commits are acknowledged from here on.
- ``{"event": "status", "commit_lsn": "X/X", "feedback": {...}}``: at most once a second, when
  something has changed. The feedback is the most advanced pageserver's.
- ``{"event": "finished", "commit_lsn": "X/X", "clean": bool}``, exit code 0: Postgres is gone and
  what it sent was pushed; clean means that it has said goodbye with everything acknowledged.
- ``{"event": "defeated", "term": n}``, exit code 3: another proposer was elected. Postgres must be
  stopped at once; none of its waiting commits will ever be acknowledged.
- ``{"event": "fatal", "message": "..."}``, exit code 1: Postgres cannot go on either.
- Any other end, exit code 4 included, is that of this process only: another one, told on its
  command line what terms were asked for and won so far, may take up the stream of the living
  Postgres.

Commands:
- ``{"cmd": "start", "host": "...", "port": n, "user": "...", "start_lsn": "X/X"}``: after
  "elected", when Postgres has been started on the state at this LSN, or has run all the time and
  its WAL is wanted from there on.
- ``{"cmd": "limits", "max_write_lag": n, "max_flush_lag": n, "max_apply_lag": n}``: acknowledge no
  further than this many bytes beyond what the pageserver has received, made durable, or uploaded;
  0 is no limit.

The end of stdin means that the supervisor is gone, and ends the process (once Postgres has ended,
it finishes its work first).
"""

from __future__ import annotations

import json
import os
from typing import Any

from zenith_utils.lsn import lsn_text
from zenith_utils.zenith_feedback import ZenithFeedback

_READ_SIZE = 65536


class ControlError(Exception):
    """A command that cannot be understood, or the end of the channel."""


class ControlChannel:
    """Lines of JSON in both directions."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._buffer = b""
        os.set_blocking(read_fd, False)

    def fileno(self) -> int:
        """Descriptor that becomes readable when a command arrives."""
        return self._read_fd

    def receive(self) -> list[dict[str, Any]]:
        """The commands that have arrived. Raises ControlError, also at the end of input."""
        try:
            data = os.read(self._read_fd, _READ_SIZE)
        except BlockingIOError:
            return []
        if not data:
            raise ControlError("the supervisor has closed the control channel")
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        commands = []
        for line in lines:
            try:
                command = json.loads(line)
            except ValueError as e:
                raise ControlError(f"malformed command: {e}") from e
            if not isinstance(command, dict):
                raise ControlError(f"malformed command: {command!r}")
            commands.append(command)
        return commands

    def campaign(self, term: int) -> None:
        """Votes are about to be asked for."""
        self._send(event="campaign", term=term)

    def won(self, term: int) -> None:
        """A quorum has voted."""
        self._send(event="won", term=term)

    def elected(self, term: int, epoch_start_lsn: int, bootstrap: bool) -> None:
        """A quorum is brought to the same state."""
        lsn = lsn_text(epoch_start_lsn)
        self._send(event="elected", term=term, epoch_start_lsn=lsn, bootstrap=bootstrap)

    def waiting(self, message: str) -> None:
        """What keeps this from being elected."""
        self._send(event="waiting", message=message)

    def streaming(self) -> None:
        """WAL is flowing."""
        self._send(event="streaming")

    def status(self, commit_lsn: int, feedback: ZenithFeedback) -> None:
        """How far commits and the pageserver are."""
        self._send(
            event="status",
            commit_lsn=lsn_text(commit_lsn),
            feedback={
                "current_timeline_size": feedback.current_timeline_size,
                "ps_writelsn": lsn_text(feedback.ps_writelsn),
                "ps_flushlsn": lsn_text(feedback.ps_flushlsn),
                "ps_applylsn": lsn_text(feedback.ps_applylsn),
                "ps_replytime": feedback.ps_replytime,
            },
        )

    def finished(self, commit_lsn: int, clean: bool) -> None:
        """Postgres is gone."""
        self._send(event="finished", commit_lsn=lsn_text(commit_lsn), clean=clean)

    def defeated(self, term: int) -> None:
        """A higher term was elected."""
        self._send(event="defeated", term=term)

    def fatal(self, message: str) -> None:
        """The end."""
        self._send(event="fatal", message=message)

    def _send(self, **event: Any) -> None:
        line = json.dumps(event).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._write_fd, line) :]
        except BrokenPipeError:
            pass  # nobody listens any more; the end of stdin says so, too
