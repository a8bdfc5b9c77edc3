"""The unprivileged user that runs Postgres programs when Zenith itself runs as root.

Postgres refuses to run as root. Started as root, Zenith runs initdb, postgres and the redo
processes as the user named by ``ZENITH_OS_USER`` (default ``postgres``) and gives it the
directories they write. As a normal user it changes nothing.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import TypedDict

DEFAULT_USER = "postgres"


class OsUserError(Exception):
    """No usable unprivileged user."""


class PopenUser(TypedDict, total=False):
    """The user-related keyword arguments of subprocess.Popen; empty when nothing changes."""

    user: int
    group: int
    extra_groups: list[int]


def postgres_user() -> pwd.struct_passwd | None:
    """Account that runs Postgres programs, or None if we are not root and run them ourselves.

    Raises OsUserError if the account does not exist or is root itself.
    """
    if os.geteuid() != 0:
        return None
    name = os.environ.get("ZENITH_OS_USER") or DEFAULT_USER
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise OsUserError(
            f"Postgres cannot run as root and there is no user {name!r} to run it as: "
            "create it (useradd --system postgres) or name another one in ZENITH_OS_USER"
        ) from None
    if entry.pw_uid == 0:
        raise OsUserError(f"Postgres cannot run as {name!r} (uid 0): set ZENITH_OS_USER")
    return entry


def popen_kwargs() -> PopenUser:
    """Arguments that make subprocess.Popen/run start a Postgres program as the right user."""
    entry = postgres_user()
    if entry is None:
        return {}
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}


def give(path: Path, *, recursive: bool = False) -> None:
    """Make the Postgres user own a file or directory (symlinks themselves, never their targets).

    Does nothing when we are not root. With `recursive` the whole tree below is given too.
    """
    entry = postgres_user()
    if entry is None:
        return
    uid, gid = entry.pw_uid, entry.pw_gid
    os.chown(path, uid, gid, follow_symlinks=False)
    if not recursive:
        return
    for _, directories, files, fd in os.fwalk(path, follow_symlinks=False):
        for name in directories + files:
            os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)
