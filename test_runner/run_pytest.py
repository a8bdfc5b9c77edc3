"""What scripts/pytest runs: pytest in this checkout, with arguments as its caller means them.

Paths are those of the directory it is called from, else of the checkout; the name of a test file
alone is found in whatever batch has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Options whose value, behind a blank, is no path: it is not to be taken for a test's.
_WITH_VALUE = frozenset(
    [
        "-k",
        "-m",
        "-n",
        "-p",
        "-o",
        "-r",
        "-W",
        "--deselect",
        "--durations",
        "--keep-output",
        "--log-cli-level",
        "--log-level",
        "--maxfail",
        "--numprocesses",
        "--dist",
        "--timeout",
        "--tb",
        "--scale",
    ]
)
# Options whose value is a path.
_WITH_PATH = frozenset(
    [
        "-c",
        "--config-file",
        "--basetemp",
        "--confcutdir",
        "--ignore",
        "--junit-xml",
        "--junitxml",
        "--log-file",
        "--out-dir",
        "--rootdir",
    ]
)
_DIRECTORIES = ("ZENITH_BIN", "POSTGRES_DISTRIB_DIR", "TEST_OUTPUT", "ZENITH_CACHE_DIR")


def resolve(arguments: Sequence[str], cwd: Path, root: Path = ROOT) -> list[str]:
    """The arguments for a pytest that runs in `root`, of a caller in `cwd`."""
    resolved: list[str] = []
    option = ""
    for argument in arguments:
        if option in _WITH_VALUE:
            resolved.append(argument)
        elif option in _WITH_PATH:
            resolved.append(str(cwd / argument))
        elif argument.startswith("-"):
            name, equals, value = argument.partition("=")
            is_path = equals and name in _WITH_PATH
            resolved.append(f"{name}={cwd / value}" if is_path else argument)
        else:
            resolved += _tests(argument, cwd, root)
        option = argument if argument in _WITH_VALUE | _WITH_PATH and not option else ""
    return resolved


def _tests(argument: str, cwd: Path, root: Path) -> list[str]:
    """The test files, or tests of them, that an argument means."""
    path, colons, test = argument.partition("::")
    if (cwd / path).exists():
        found = [cwd / path]
    elif (root / path).exists() or "/" in path:
        return [argument]
    else:
        found = sorted((root / "test_runner").rglob(path))
    return [f"{file}{colons}{test}" for file in found] or [argument]


def main() -> int:
    """Run pytest."""
    arguments = resolve(sys.argv[1:], Path.cwd())
    for variable in _DIRECTORIES:
        if value := os.environ.get(variable):
            os.environ[variable] = str(Path(value).absolute())
    os.chdir(ROOT)
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
