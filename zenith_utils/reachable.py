"""Whether the unprivileged user that runs Postgres can get at a path."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from zenith_utils.os_user import OsUserError, postgres_user


def closed_part(path: Path) -> Path | None:
    """The first part of `path` that keeps the Postgres user out; None if nothing does.

    Directories must be searchable and the file itself, if it is one, readable. Always None when we
    are not root: Postgres then runs as ourselves.
    """
    user = postgres_user()
    if user is None:
        return None
    groups = set(os.getgrouplist(user.pw_name, user.pw_gid))
    for part in [*reversed(path.parents), path]:
        status = part.stat()
        needed = stat.S_IXOTH if stat.S_ISDIR(status.st_mode) else stat.S_IROTH
        if not _permits(status, user, groups, needed):
            return part
    return None


def check_reachable(path: Path) -> None:
    """Raise OsUserError, with the remedy, if the Postgres user cannot get at `path`."""
    part = closed_part(path)
    user = postgres_user()
    if part is not None and user is not None:
        raise OsUserError(
            f"user {user.pw_name!r}, which runs Postgres, cannot reach {path}: {part} is closed to "
            f"it. Use another place, or open it: chmod o+x {part}"
        )


def _permits(
    status: os.stat_result, user: pwd.struct_passwd, groups: set[int], needed: int
) -> bool:
    """Whether a mode grants the user a permission, given as its bit for others."""
    if status.st_uid == user.pw_uid:
        needed <<= 6
    elif status.st_gid in groups:
        needed <<= 3
    return bool(status.st_mode & needed)
