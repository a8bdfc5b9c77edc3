"""The environment variables of the processes that the command line starts."""

from __future__ import annotations

import os
from typing import Final

_KEPT: Final = (
    *("RUST_LOG", "LLVM_PROFILE_FILE", "ZENITH_CACHE_DIR", "ZENITH_OS_USER"),
    # A normal user's cache of native modules lies below the home directory.
    *("HOME", "XDG_CACHE_HOME"),
    # They are built where they are missing, with the compiler that is found here.
    *("CC", "PATH"),
)
_OBJECT_STORAGE: Final = ("AWS_", "AZURE_", "GOOGLE_", "S3_")


def compute_environment() -> dict[str, str]:
    """What computes and their walproposers inherit: the log filter and Zenith's settings.

    No credentials: a superuser of the database sees the environment, and object storage is that
    of all tenants.
    """
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment["RUST_BACKTRACE"] = "1"
    return environment


def daemon_environment() -> dict[str, str]:
    """What pageserver and safekeepers inherit: the same, and credentials of object storage."""
    credentials = {n: value for n, value in os.environ.items() if n.startswith(_OBJECT_STORAGE)}
    return compute_environment() | credentials
