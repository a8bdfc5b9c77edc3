"""The environment variables of the processes that the command line starts."""

from __future__ import annotations

import os
from typing import Final

_OBJECT_STORAGE: Final = ("AWS_", "AZURE_", "GOOGLE_", "S3_")


def daemon_environment() -> dict[str, str]:
    """What a daemon inherits: its log filter, Zenith's settings, credentials of object storage."""
    keep = ("RUST_LOG", "LLVM_PROFILE_FILE", "ZENITH_CACHE_DIR", "ZENITH_OS_USER")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment |= {n: value for n, value in os.environ.items() if n.startswith(_OBJECT_STORAGE)}
    environment["RUST_BACKTRACE"] = "1"
    # A normal user's cache of native modules lies below the home directory.
    for name in ("HOME", "XDG_CACHE_HOME"):
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment
