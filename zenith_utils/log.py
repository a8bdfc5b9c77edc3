"""Logging of daemons and tools: stdlib logging, filtered by the syntax of ``RUST_LOG``."""

from __future__ import annotations

import logging
import logging.handlers
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from zenith_utils.conninfo import redact

TRACE: Final = 5
_OFF: Final = logging.CRITICAL + 10
_LEVELS: Final = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "off": _OFF,
}
_LEVEL_NAMES: Final = {
    TRACE: "TRACE",
    logging.WARNING: "WARN",
    logging.CRITICAL: "FATAL",
}
# Loggers that a filter without a target means; those of libraries stay at warnings.
ZENITH_LOGGERS: Final = (
    "__main__",
    "compute_tools",
    "control_plane",
    "pageserver",
    "pgxn",
    "postgres_ffi",
    "safekeeper",
    "zenith_cli",
    "zenith_proxy",
    "zenith_utils",
)

logger = logging.getLogger(__name__)


def init_logging(target: Path | None = None, rust_log: str | None = None) -> None:
    """Log to a file (appending; it may be moved away by a log rotator) or to stdout.

    `rust_log` is a filter such as ``info``, ``debug,pageserver::walreceiver=trace`` or
    ``warn,safekeeper=off``; None or empty means ``info``. What cannot be understood in it is
    reported in the log and otherwise ignored. Uncaught exceptions of all threads are logged too.
    """
    handler: logging.Handler
    if target is None:
        handler = logging.StreamHandler(sys.stdout)
    else:
        handler = LogFileHandler(target, encoding="utf-8")
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    for text in apply_filter(rust_log or "info"):
        logger.warning("ignored %r in RUST_LOG: not a filter directive", text)


def apply_filter(rust_log: str) -> list[str]:
    """Set logger levels by a filter; the directives that could not be understood.

    A later directive for the same target wins; a more specific target wins anyway.
    """
    default, targets, invalid = parse_filter(rust_log)
    logging.getLogger().setLevel(max(default, logging.WARNING))
    for name in ZENITH_LOGGERS:
        logging.getLogger(name).setLevel(default)
    for name, level in targets.items():
        logging.getLogger(name).setLevel(level)
    return invalid


def parse_filter(rust_log: str) -> tuple[int, dict[str, int], list[str]]:
    """Default level, levels by logger name, and the invalid directives of a filter.

    Directives are separated by commas: ``level``, ``target`` (everything of it) or
    ``target=level``, targets with ``::`` or ``.`` between their parts. With targets only, nothing
    else is logged below errors.
    """
    default: int | None = None
    targets: dict[str, int] = {}
    invalid: list[str] = []
    for directive in rust_log.split(","):
        directive = directive.strip()
        if not directive:
            continue
        target, equals, level_name = (part.strip() for part in directive.partition("="))
        if not equals and target.lower() in _LEVELS:
            default = _LEVELS[target.lower()]
            continue
        level = _LEVELS.get(level_name.lower() or "trace")
        name = target.replace("::", ".")
        if level is None or not all(part.isidentifier() for part in name.split(".")):
            invalid.append(directive)
            continue
        targets[name] = level
    if default is None:
        default = logging.ERROR if targets else logging.INFO
    return default, targets, invalid


class LogFileHandler(logging.handlers.WatchedFileHandler):
    """A log file that follows rotation, and whose loss never fails the code that logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or report on stderr that this was impossible."""
        try:
            super().emit(record)
        except OSError:
            # The base class lets errors of reopening the file out.
            self.handleError(record)


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z  INFO thread logger: message``, in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """One line per record; a traceback follows on lines of its own."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        level = _LEVEL_NAMES.get(record.levelno, record.levelname)
        text = (
            f"{seconds}.{int(record.msecs):03d}Z {level:>5} {record.threadName} "
            f"{record.name}: {record.getMessage()}"
        )
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            text += "\n" + self.formatStack(record.stack_info)
        # Whatever a message quotes: what lets in stands in no log.
        return redact(text)


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logger.critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is None or issubclass(failure.exc_type, SystemExit):
        return
    name = failure.thread.name if failure.thread else "unknown"
    logger.critical(
        "thread %s failed",
        name,
        exc_info=(failure.exc_type, failure.exc_value, failure.exc_traceback),
    )
