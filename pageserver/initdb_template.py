"""The cluster every new root timeline is imported from.

``initdb`` takes seconds, so its result is made once per Postgres version, superuser name and
set of options, kept in the cache directory and only read afterwards. What must differ between
clusters, the system identifier, is given to each timeline at import.

Locale: collation C, so that text sorts and compares with memcmp, and character classes of
C.UTF-8, so that upper() and regular expressions know more than ASCII. A host without C.UTF-8
gets C throughout. ``initdb_options`` come last on the command line and therefore win.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from postgres_ffi.distrib import PgDistrib
from zenith_utils.cache_dir import cache_dir
from zenith_utils.durable import fsync_dir
from zenith_utils.os_user import give, popen_kwargs
from zenith_utils.reachable import check_reachable

log = logging.getLogger(__name__)

INITDB_TIMEOUT = 120.0
_LOCALE_ARGS = ("--locale=C", "--lc-ctype=C.UTF-8")
_FALLBACK_LOCALE_ARGS = ("--locale=C",)

_identifier_lock = threading.Lock()
_last_identifier = 0


class InitdbError(Exception):
    """initdb failed; the message holds what it printed."""


def template_cluster(distrib: PgDistrib, superuser: str, options: Sequence[str] = ()) -> Path:
    """Data directory of a fresh, shut down cluster; made at the first call. Never modify it.

    Safe against concurrent callers in any process. Raises InitdbError, OSError, OsUserError.
    """
    folder = cache_dir() / "initdb"
    folder.mkdir(mode=0o755, exist_ok=True)
    wanted = "\0".join((superuser, *_LOCALE_ARGS, *options))
    name = f"{distrib.version_num}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}"
    final = folder / name
    if not final.is_dir():
        with _exclusive(folder / f"{name}.lock"):
            if not final.is_dir():
                _make(distrib, superuser, options, final)
    return final / "data"


def new_system_identifier() -> int:
    """A cluster identifier built like Postgres' own (BootStrapXLOG): time, then process bits.

    Strictly increasing within the process, so two timelines never share one.
    """
    global _last_identifier
    micros = time.time_ns() // 1000
    seconds, fraction = divmod(micros, 1_000_000)
    identifier = seconds << 32 | fraction << 12 | (os.getpid() & 0xFFF)
    with _identifier_lock:
        _last_identifier = max(identifier, _last_identifier + (1 << 12))
        return _last_identifier


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    fd = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _make(distrib: PgDistrib, superuser: str, options: Sequence[str], final: Path) -> None:
    """initdb into a temporary folder, then rename: a template is complete or absent.

    initdb itself syncs the files, so the renamed folder never leads to unwritten ones.
    """
    staging = final.with_name(f"{final.name}.{secrets.token_hex(4)}.temp")
    staging.mkdir(mode=0o755)
    try:
        give(staging)
        check_reachable(staging)
        started = time.monotonic()
        _run_initdb(distrib, superuser, options, staging / "data")
        staging.rename(final)
        fsync_dir(final.parent)
        log.info("initdb template %s made in %.1f s", final.name, time.monotonic() - started)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _run_initdb(distrib: PgDistrib, superuser: str, options: Sequence[str], datadir: Path) -> None:
    result = _initdb(distrib, superuser, (*_LOCALE_ARGS, *options), datadir)
    if result.returncode != 0 and "invalid locale name" in result.stderr:
        shutil.rmtree(datadir, ignore_errors=True)
        result = _initdb(distrib, superuser, (*_FALLBACK_LOCALE_ARGS, *options), datadir)
    if result.returncode != 0:
        raise InitdbError(f"initdb failed with status {result.returncode}: {result.stderr.strip()}")


def _initdb(
    distrib: PgDistrib, superuser: str, arguments: Sequence[str], datadir: Path
) -> subprocess.CompletedProcess[str]:
    command = [
        str(distrib.bin_dir / "initdb"),
        *("-D", str(datadir), "-U", superuser, "-E", "utf8"),
        *("--auth=trust", "--no-instructions"),
        *arguments,
    ]
    try:
        return subprocess.run(
            command,
            env={},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=INITDB_TIMEOUT,
            **popen_kwargs(),
        )
    except subprocess.TimeoutExpired as error:
        raise InitdbError(f"initdb did not end within {INITDB_TIMEOUT:.0f} s") from error
