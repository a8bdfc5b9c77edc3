"""The documentation is true to the tree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("*.py", "*.pyx", "*.c", "*.h")
FOLDERS = (
    "cli",
    "control_plane",
    "compute_tools",
    "pageserver",
    "safekeeper",
    "proxy",
    "postgres_ffi",
    "pgxn",
    "zenith_utils",
    "test_runner",
)


def documented() -> set[str]:
    """Paths that docs/sourcetree.md names: the folder of the heading and the file of the row."""
    paths, folder = set(), ""
    for line in (ROOT / "docs" / "sourcetree.md").read_text().splitlines():
        if match := re.match(r"## (\S+?)/ ", line):
            folder = match[1]
        elif match := re.match(r"\| `([^`]+)` \|", line):
            paths.add(f"{folder}/{match[1]}")
    return paths


def test_sourcetree_names_every_file() -> None:
    """No file is missing from docs/sourcetree.md, and it names none that is gone."""
    generated = {p.with_suffix(".c") for f in FOLDERS for p in (ROOT / f).rglob("*.pyx")}
    actual = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for pattern in SOURCES
        for path in (ROOT / folder).rglob(pattern)
        if path.name != "__init__.py" and path not in generated
    }
    named = {path for path in documented() if path.split("/")[0] in FOLDERS}
    assert named == actual
