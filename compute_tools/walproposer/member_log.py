"""What the log tells about a safekeeper: that it is lost, back, behind, caught up.

One line each, and few of a safekeeper that comes and goes for the same reason all the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from zenith_utils.lsn import lsn_text

logger = logging.getLogger(__name__)

# The same complaint again, and what follows from it, is passed over for so long, in seconds.
_REPEAT: Final = 60.0
# A session that has lasted so long is told of, even if it was passed over first.
_SETTLED: Final = 5.0
# Less than this is no recovery: bytes, unless it takes longer than so many seconds.
_BEHIND_BYTES: Final = 1 << 20
_BEHIND_SECONDS: Final = 1.0


class MemberLog:
    """The lines about one safekeeper. Calls come in the order of events."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._complaints: dict[str, float] = {}
        self._passed_over = False
        self._away_since: float | None = None
        self._followed: tuple[float, int] | None = None
        self._behind: tuple[float, int] | None = None
        self._source = ""

    # ---- sessions

    def cannot_connect(self, reason: str) -> None:
        """An attempt to connect has failed; there will be others."""
        if self._away_since is None:
            self._away_since = self._clock()
        self._complain(f"cannot connect to {self._name}, will keep trying: {reason}")

    def lost(self, reason: str) -> None:
        """A session has ended."""
        self._away_since = self._clock()
        self._followed = self._behind = None
        self._passed_over = not self._complain(f"session with {self._name} ends: {reason}")

    def connected(self) -> None:
        """A session has opened."""
        if not self._passed_over:
            logger.info("connected to %s%s", self._name, self._absence())

    def following(self, lsn: int) -> None:
        """The safekeeper follows us and gets WAL from `lsn` on."""
        self._followed = self._clock(), lsn
        if not self._passed_over:
            self._tell_followed(lsn)

    def tick(self) -> None:
        """To be called every now and then."""
        if self._followed is not None and self._clock() - self._followed[0] >= _SETTLED:
            if self._passed_over:
                self._tell_followed(self._followed[1])
            self._passed_over = False
            self._followed = None

    def _tell_followed(self, lsn: int) -> None:
        logger.info("streaming to %s from %s%s", self._name, lsn_text(lsn), self._absence())
        self._away_since = None

    def _complain(self, text: str) -> bool:
        """Log a warning; False if that was done a moment ago."""
        now = self._clock()
        self._complaints = {t: at for t, at in self._complaints.items() if now - at < _REPEAT}
        if text in self._complaints:
            return False
        self._complaints[text] = now
        logger.warning("%s", text)
        return True

    def _absence(self) -> str:
        if self._away_since is None:
            return ""
        return f", which was away for {self._clock() - self._away_since:.1f} s"

    # ---- recovery

    def behind(self, lsn: int, end_lsn: int, source: str, *, tell: bool = False) -> None:
        """It lacks [lsn, end_lsn), of which the next piece comes from `source`. Called per piece.

        Unless `tell`, only what is large or takes long is told of.
        """
        if self._behind is None:
            self._behind = self._clock(), lsn
            self._source = ""
        since, _ = self._behind
        large = end_lsn - lsn >= _BEHIND_BYTES or self._clock() - since >= _BEHIND_SECONDS
        tell = (tell or large or bool(self._source)) and not self._passed_over
        if tell and source != self._source:
            self._source = source
            logger.info(
                "recovery of %s: it lacks WAL from %s to %s, %d bytes; sending it from %s",
                self._name, lsn_text(lsn), lsn_text(end_lsn), end_lsn - lsn, source,
            )  # fmt: skip

    def recovery_failed(self, reason: str) -> None:
        """The source has failed; there will be another attempt."""
        self._complain(f"recovery of {self._name} breaks off: {reason}")

    def caught_up(self, lsn: int) -> None:
        """It has been sent everything below `lsn`."""
        if self._behind is None:
            return
        since, begin = self._behind
        self._behind = None
        if self._source:
            logger.info(
                "recovery of %s ends at %s: %d bytes in %.1f s",
                self._name, lsn_text(lsn), lsn - begin, self._clock() - since,
            )  # fmt: skip
