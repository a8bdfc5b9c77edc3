"""Where artefacts that can always be rebuilt are kept: built C modules, the initdb template."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache directory, made (mode 0755) if absent.

    ``$ZENITH_CACHE_DIR``; else /var/cache/zenith for root (the Postgres user must reach it too);
    else zenith below ``$XDG_CACHE_HOME`` or ~/.cache. Raises OSError if it cannot be made.
    """
    path = _location()
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        # mkdir's mode is subject to the umask, and other users must be able to read modules.
        path.chmod(0o755)
    return path


def _location() -> Path:
    explicit = os.environ.get("ZENITH_CACHE_DIR")
    if explicit:
        return Path(explicit).absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/zenith")
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "zenith"
    return Path.home() / ".cache" / "zenith"
