"""A word about a step that takes long, on a terminal only and never on stdout."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_DELAY = 1.0

_lock = threading.Lock()
_status: Any = None


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr what is going on, if it goes on for more than a second."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(_DELAY, _show, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        _hide()


@contextmanager
def hidden() -> Iterator[None]:
    """While a line is printed: the terminal's last line is free."""
    with _lock:
        if _status is not None:
            _status.stop()
        try:
            yield
        finally:
            if _status is not None:
                _status.start()


def _show(what: str) -> None:
    # Here and not above: a command that ends sooner does without the library.
    from rich.console import Console

    global _status
    with _lock:
        _status = Console(stderr=True).status(what)
        _status.start()


def _hide() -> None:
    global _status
    with _lock:
        if _status is not None:
            _status.stop()
            _status = None
