"""Whether this machine, and an environment on it, have what Zenith needs; each with its remedy."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from control_plane.local_env import LocalEnv, default_zenith_distrib_dir
from zenith_utils.os_user import OsUserError, postgres_user
from zenith_utils.size import format_size

_MIN_PYTHON = (3, 11)
_MIN_DESCRIPTORS = 1024
_LITTLE_SPACE = 2 << 30
_NO_SPACE = 128 << 20


class Result(StrEnum):
    """What a check has found: `fail` is what keeps something from working."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the answer; `remedy` is empty where there is nothing to do."""

    check: str
    result: Result
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, Result.OK, found)


def warn(check: str, found: str, remedy: str) -> Finding:
    """It works, but not as well as it should, or not for long."""
    return Finding(check, Result.WARN, found, remedy)


def fail(check: str, found: str, remedy: str) -> Finding:
    """Something cannot work."""
    return Finding(check, Result.FAIL, found, remedy)


def machine_checks(env: LocalEnv | None, place: Path) -> Iterator[Finding]:
    """What does not depend on an environment. `place` is where it is, or would be."""
    yield _python()
    yield _native_modules()
    yield from _postgres(env)
    yield _compiler()
    yield from _programs(env)
    yield from guarded("user", lambda: [_user()])
    yield from guarded("paths", lambda: _paths(place))
    yield from guarded("disk space", lambda: [_disk_space(place)])
    yield _descriptors()


def guarded(check: str, run: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; that it cannot look is a finding as well."""
    try:
        yield from run()
    except OSError as e:
        yield fail(check, f"cannot be checked: {e}", "run the doctor as the user that runs Zenith")


def _python() -> Finding:
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    text = f"{found} at {sys.executable}"
    if sys.version_info < _MIN_PYTHON:
        return fail("python", text, "Zenith takes Python 3.11 or newer: run ./scripts/bootstrap")
    return ok("python", text)


def _native_modules() -> Finding:
    try:
        import zenith_utils.crc32c  # noqa: F401
    except ImportError as e:
        return fail("native modules", str(e), "build them: ./scripts/bootstrap")
    return ok("native modules", "built")


def _postgres(env: LocalEnv | None) -> Iterator[Finding]:
    from postgres_ffi.distrib import DistribError, find_distrib

    try:
        distrib = find_distrib(None if env is None else env.pg_distrib_dir)
    except DistribError as e:
        yield fail(
            "postgres",
            str(e),
            "on Debian: apt-get install postgresql-15; elsewhere set pg_distrib_dir in the config,"
            " or POSTGRES_DISTRIB_DIR before zenith init",
        )
        return
    try:
        distrib.require_commits_wait()
    except DistribError as e:
        yield fail("postgres", str(e), "on Debian: apt-get install postgresql-15")
    else:
        yield ok("postgres", f"{distrib.release} in {distrib.bin_dir.parent}")
    package = f"postgresql-server-dev-{distrib.major}"
    if distrib.include_server_dir is None:
        yield fail(
            "server headers",
            f"those of {distrib.bin_dir.parent} are not installed",
            f"on Debian: apt-get install {package}",
        )
    else:
        yield ok("server headers", str(distrib.include_server_dir))
    try:
        distrib.binary("psql")
    except DistribError as e:
        yield warn("psql", str(e), f"on Debian: apt-get install postgresql-client-{distrib.major}")
    else:
        yield ok("psql", str(distrib.bin_dir / "psql"))


def _compiler() -> Finding:
    from pgxn.build import ModuleBuildError, find_compiler

    try:
        return ok("C compiler", find_compiler().version)
    except ModuleBuildError as e:
        return fail("C compiler", str(e), "on Debian: apt-get install gcc libc6-dev, or set CC")


def _programs(env: LocalEnv | None) -> Iterator[Finding]:
    directory = default_zenith_distrib_dir() if env is None else env.zenith_distrib_dir
    missing = [n for n in ("pageserver", "safekeeper") if not os.access(directory / n, os.X_OK)]
    if missing:
        remedy = "run ./scripts/bootstrap"
        if env is not None:
            remedy += f", or correct zenith_distrib_dir in {env.config_path}"
        yield fail("programs", f"no {' and no '.join(missing)} in {directory}", remedy)
    else:
        yield ok("programs", f"pageserver and safekeeper in {directory}")


def _user() -> Finding:
    try:
        account = postgres_user()
    except OsUserError as e:
        return fail("user", str(e), "useradd --system postgres, or set ZENITH_OS_USER")
    if account is None:
        return ok("user", f"Postgres runs as ourselves, uid {os.geteuid()}")
    return ok("user", f"we are root, Postgres runs as {account.pw_name}")


def _paths(place: Path) -> Iterator[Finding]:
    """The environment and the cache: ours to write, and where Postgres' user gets at them."""
    from pgxn.build import can_be_preloaded
    from zenith_utils.cache_dir import cache_dir

    yield from _path("environment", place)
    try:
        cache = cache_dir()
    except OSError as e:
        yield fail(
            "cache", f"cannot be made: {e}", "set ZENITH_CACHE_DIR to a directory of your own"
        )
        return
    if can_be_preloaded(cache):
        yield from _path("cache", cache)
    else:
        yield fail(
            "cache",
            f"modules cannot be loaded from {cache}, which has a blank or a colon in it",
            "set ZENITH_CACHE_DIR to a directory that has none",
        )


def _path(check: str, path: Path) -> Iterator[Finding]:
    from zenith_utils.reachable import closed_part

    there = existing(path)
    try:
        part = closed_part(there)
        account = postgres_user()
    except OsUserError:
        part = account = None  # told as such
    if part is not None and account is not None:
        yield fail(
            check,
            f"user {account.pw_name}, which runs Postgres, cannot reach {there}: {part} is closed",
            f"chmod o+x {part}, or use another place",
        )
    elif not os.access(there, os.W_OK | os.X_OK):
        yield fail(
            check,
            f"{there} is not ours to write (uid {os.geteuid()}, owner {there.stat().st_uid})",
            "run zenith as its owner"
            if there == path
            else "choose another place: a directory of your own, or ZENITH_REPO_DIR",
        )
    else:
        yield ok(check, str(path) if there == path else f"{path} can be made in {there}")


def _disk_space(place: Path) -> Finding:
    there = existing(place)
    usage = shutil.disk_usage(there)
    text = f"{format_size(usage.free)} free of {format_size(usage.total)} at {there}"
    remedy = "make room: a full disk stops commits, what is acknowledged stays"
    if usage.free < _NO_SPACE:
        return fail("disk space", text, remedy)
    if usage.free < _LITTLE_SPACE:
        return warn("disk space", text, remedy)
    return ok("disk space", text)


def _descriptors() -> Finding:
    # The daemons take as many as they may have.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return ok("open files", "unlimited")
    if hard < _MIN_DESCRIPTORS:
        remedy = f"raise the hard limit, {hard}, in /etc/security/limits.conf"
        return warn("open files", f"at most {hard}, few for many branches", remedy)
    return ok("open files", f"at most {hard}")


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next(part for part in [path, *path.parents] if part.exists())
