"""What `--version` of a daemon prints, and what its log begins with."""

from __future__ import annotations

import os


def version_text(program: str) -> str:
    """Program and version: ``git-env:`` and GIT_VERSION of the environment, else the package's."""
    from importlib.metadata import PackageNotFoundError, version

    built_from = os.environ.get("GIT_VERSION")
    if built_from:
        return f"{program} git-env:{built_from}"
    try:
        return f"{program} {version('zenith')}"
    except PackageNotFoundError:
        return f"{program} (unpackaged)"
