"""Stopping a daemon: signals, requests from inside, and threads that fail."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from enum import Enum
from types import FrameType
from typing import Final

logger = logging.getLogger(__name__)

SECOND_SIGNAL_EXIT_CODE: Final = 1
IMMEDIATE_EXIT_CODE: Final = 111


class ShutdownMode(Enum):
    """How to stop: writing out what is in memory, or at once."""

    GRACEFUL = "graceful"
    IMMEDIATE = "immediate"


_MODES: Final = {
    signal.SIGTERM: ShutdownMode.GRACEFUL,
    signal.SIGINT: ShutdownMode.GRACEFUL,
    signal.SIGQUIT: ShutdownMode.IMMEDIATE,
}


class Shutdown:
    """Collects the reasons to stop; the main thread waits for the first.

    A second termination signal ends the process at once with exit code 1, whatever the main
    thread is doing: signals are taken by a thread of their own, fed by the C signal handler.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._lock = threading.Lock()
        self._mode = ShutdownMode.GRACEFUL
        self._signals_seen = 0
        self.failed = False
        """Whether it was a failure that asked for the stop; the daemon should exit with 1."""

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGQUIT. Main thread only; once per process."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(read_fd, True)
        thread = threading.Thread(
            target=self._watch_signals, args=(read_fd,), name="signals", daemon=True
        )
        thread.start()
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in _MODES:
            signal.signal(number, _ignore)

    def guard_threads(self) -> None:
        """Stop the daemon when any thread dies of an exception: nothing runs on half-alive."""
        previous = threading.excepthook

        def failed(failure: threading.ExceptHookArgs) -> None:
            previous(failure)
            if not issubclass(failure.exc_type, SystemExit):
                name = failure.thread.name if failure.thread else "unknown"
                self.fail(f"thread {name} failed: {failure.exc_value}")

        threading.excepthook = failed

    def request(self, mode: ShutdownMode, reason: str) -> None:
        """Ask for a stop. The first request decides the mode, save that immediate always wins."""
        with self._lock:
            if self._requested.is_set() and mode is not ShutdownMode.IMMEDIATE:
                return
            self._mode = mode
            self._requested.set()
        logger.info("%s shutdown requested: %s", mode.value, reason)

    def fail(self, reason: str) -> None:
        """Ask for a graceful stop because of a failure."""
        self.failed = True
        logger.error("shutting down: %s", reason)
        self.request(ShutdownMode.GRACEFUL, reason)

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._requested.is_set()

    def wait(self, timeout: float | None = None) -> ShutdownMode | None:
        """Wait until a stop is asked for; its mode, or None after `timeout` seconds."""
        return self._mode if self._requested.wait(timeout) else None

    def _watch_signals(self, read_fd: int) -> None:
        while data := os.read(read_fd, 64):
            for byte in data:
                self._signalled(byte)

    def _signalled(self, number: int) -> None:
        with contextlib.suppress(ValueError):
            received = signal.Signals(number)
            if received not in _MODES:
                return
            self._signals_seen += 1
            if self._signals_seen > 1:
                # Not through logging, whose locks and files may be what hangs.
                with contextlib.suppress(OSError):
                    os.write(2, b"second termination signal: exiting without cleaning up\n")
                os._exit(SECOND_SIGNAL_EXIT_CODE)
            self.request(_MODES[received], f"got {received.name}")


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python's part of the handler; the wake-up descriptor carries the news."""


def wait_for_shutdown() -> ShutdownMode:
    """Take over the signals and wait until one asks for a stop."""
    shutdown = Shutdown()
    shutdown.install()
    mode = shutdown.wait()
    assert mode is not None
    return mode
