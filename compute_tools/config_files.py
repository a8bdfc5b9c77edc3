"""Reading a node's configuration files, and writing the one its Postgres reads.

The files belong to the user that runs Postgres: they are read with the rights of that user, so
that neither a link nor an include line of theirs shows them what only root may read.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from compute_tools import postgres_conf
from zenith_utils.os_user import give, postgres_user

log = logging.getLogger(__name__)

_MAX_DEPTH = 10  # CONF_FILE_MAX_DEPTH in utils/conffiles.h
_EVENTS = 0x8 | 0x40 | 0x80 | 0x200  # IN_CLOSE_WRITE, MOVED_FROM, MOVED_TO, DELETE: inotify(7)
_libc = ctypes.CDLL(None, use_errno=True)

_Stamp = tuple[int, int, int] | None


class ConfigFiles:
    """The configuration of one node: what the user wrote, and `generated` made of it."""

    def __init__(self, pgdata: Path, generated: Path) -> None:
        self._pgdata = pgdata
        self._generated = generated
        self._stamps: dict[Path, _Stamp] = {}
        self._written = False
        self._trouble = ""
        self.complete = True
        """Whether Postgres finds all files of the configuration that was read last."""

    def generate(self, own: Mapping[str, str] | None = None) -> dict[str, str]:
        """Write the file Postgres reads; returns the user's settings, ALTER SYSTEM's included.

        `own` settings of ours stand last in it.

        The file is replaced in one step: Postgres may be told to read it at any time. Raises
        OSError: then it stays as it was, and changed() until this succeeds.
        """
        self._written = False
        with _as_postgres_user():
            lines, automatic = self.read()
        _replace(self._generated, postgres_conf.generate(lines, own))
        self._written = True
        return postgres_conf.parse([*lines, *automatic])

    def generate_plain(self) -> None:
        """Write the file with nothing but the user's lines, as stock Postgres accepts them.

        Raises OSError, as generate() does.
        """
        self._written = False
        lines, _ = self.read()
        _replace(self._generated, "\n".join(map(postgres_conf.translate_line, lines)) + "\n")
        self._written = True

    def read(self) -> tuple[list[str], list[str]]:
        """The lines of postgresql.conf, files it includes in place, and of postgresql.auto.conf.

        Without rights other than the caller's own. Raises OSError if the first cannot be read;
        Postgres does without the other one.
        """
        self._stamps = {}
        self.complete = True
        lines = self._read(self._pgdata / "postgresql.conf")
        try:
            return lines, self._read(self._pgdata / "postgresql.auto.conf")
        except OSError:
            return lines, []

    def changed(self) -> bool:
        """Whether a file that generate() has read, or looked for, is another one now."""
        return not self._written or any(
            _stamp(path) != stamp for path, stamp in self._stamps.items()
        )

    def followed(self, trouble: str) -> None:
        """Tell why a change could not be followed, "" if it was.

        What is tried again every time is told of once.
        """
        if trouble and trouble != self._trouble:
            log.error("cannot follow the change of the configuration: %s", trouble)
        self._trouble = trouble

    def directories(self) -> set[Path]:
        """Where those files are."""
        return {path.parent for path in self._stamps}

    def _read(self, path: Path, depth: int = 0) -> list[str]:
        """The lines of a file with the files it includes in place. Raises OSError."""
        self._stamps[path] = _stamp(path)
        # No byte of a file that Postgres takes as it is may stop us.
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        lines: list[str] = []
        for line in text.split("\n"):
            include = postgres_conf.parse_include(line)
            if include is None:
                lines.append(line)
            else:
                lines += self._included(include, path.parent, depth)
        return lines

    def _included(self, include: postgres_conf.Include, directory: Path, depth: int) -> list[str]:
        target = directory / include.path
        if depth < _MAX_DEPTH:
            with contextlib.suppress(OSError):
                if include.kind == "include_dir":
                    found = self._read_directory(target, depth)
                else:
                    found = self._read(target, depth + 1)
                return [f"# From {target}", *found, "# End of it"]
        # Postgres finds the same and says so, or ignores it.
        self.complete &= include.kind == "include_if_exists"
        return [f"{include.kind} '{str(target).replace(chr(39), 2 * chr(39))}'"]

    def _read_directory(self, directory: Path, depth: int) -> list[str]:
        self._stamps[directory] = _stamp(directory)
        lines = []
        for path in sorted(directory.iterdir()):
            if path.name.endswith(".conf") and not path.name.startswith("."):
                include = postgres_conf.Include("include", str(path))
                lines += self._included(include, directory, depth)
        return lines


class DirectoryWatch:
    """Tells when a file is written, replaced or removed in some directories (inotify(7))."""

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def watch(self, directories: set[Path]) -> None:
        """Watch these directories, too. Where the kernel refuses, the caller's polling is left."""
        for directory in directories:
            _libc.inotify_add_watch(self._fd, os.fsencode(directory), _EVENTS)

    def filenos(self) -> list[int]:
        """Descriptors that become readable when something happens."""
        return [self._fd] if self._fd >= 0 else []

    def drain(self) -> None:
        """Forget what has happened."""
        with contextlib.suppress(OSError):
            while self._fd >= 0 and os.read(self._fd, 65536):
                pass


@contextlib.contextmanager
def _as_postgres_user() -> Iterator[None]:
    """Access files as the user that runs Postgres; of this thread alone (setfsuid(2))."""
    user = postgres_user()
    if user is None:
        yield
        return
    try:
        _libc.setfsgid(user.pw_gid)
        _libc.setfsuid(user.pw_uid)
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


def _replace(path: Path, text: str) -> None:
    temp = path.with_name(path.name + ".new")
    temp.unlink(missing_ok=True)
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as f:
        f.write(text)
    # Passwords may stand in it: readable by Postgres alone, and from the first moment on.
    give(temp)
    temp.replace(path)


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
