"""The environment variables of the processes that the command line starts."""

from __future__ import annotations

import os


def daemon_environment() -> dict[str, str]:
    """What a daemon inherits: nothing but its log filter and Zenith's own settings."""
    keep = ("RUST_LOG", "LLVM_PROFILE_FILE", "ZENITH_CACHE_DIR", "ZENITH_OS_USER")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment["RUST_BACKTRACE"] = "1"
    # A normal user's cache of native modules lies below the home directory.
    for name in ("HOME", "XDG_CACHE_HOME"):
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment
