"""What `--version` of a daemon prints, and what its log begins with."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[1]


def version_text(program: str) -> str:
    """Program and version.

    ``git-env:`` and GIT_VERSION of the environment, else ``git:`` and the commit of the checkout
    that the program runs from, else the version of the package.
    """
    built_from = os.environ.get("GIT_VERSION")
    if built_from:
        return f"{program} git-env:{built_from}"
    commit = commit_of(_CHECKOUT)
    return f"{program} git:{commit}" if commit else f"{program} {_package_version()}"


class VersionAction(argparse.Action):
    """Of ``--version``: prints the text, which is put together only then, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit"
        )

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Print and exit."""
        print(version_text(parser.prog))
        parser.exit()


def commit_of(checkout: Path) -> str | None:
    """The commit that a git checkout stands at, read without git; None if it is no checkout.

    Files of gitrepository-layout(5): HEAD, loose refs, packed-refs.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        git = checkout / ".git"
        if git.is_file():  # a worktree: "gitdir: <path>"
            git = checkout / git.read_text().partition(":")[2].strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head or None
        return _resolve(git, head.removeprefix("ref: "))
    return None


def _resolve(git: Path, ref: str) -> str | None:
    common = git
    with contextlib.suppress(OSError):
        common = git / (git / "commondir").read_text().strip()
    with contextlib.suppress(OSError):
        return (common / ref).read_text().strip()
    for line in (common / "packed-refs").read_text().splitlines():
        commit, _, name = line.partition(" ")
        if name == ref:
            return commit
    return None


def _package_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("zenith")
    except PackageNotFoundError:
        return "(unpackaged)"
