"""Something done again and again beside the main thread: renewing a lease, calling a server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

_RETRY = 2.0


class Periodic:
    """Calls `action` every `interval` seconds from a thread until stopped.

    Where it fails it is tried again soon, whatever the failure: nothing of it ends the thread.
    """

    def __init__(self, name: str, interval: float, action: Callable[[], object]) -> None:
        self._name = name
        self._interval = interval
        self._action = action
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; the first call comes after one interval."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Stop calling; whether the last call returned within `timeout` seconds."""
        self._stop.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause, failing = self._interval, False
        while not self._stop.wait(pause):
            try:
                self._action()
                if failing:
                    log.info("%s works again", self._name)
                pause, failing = self._interval, False
            except Exception as e:
                if not failing:
                    log.warning("%s fails and is tried again: %s", self._name, str(e) or repr(e))
                pause, failing = min(_RETRY, self._interval), True
