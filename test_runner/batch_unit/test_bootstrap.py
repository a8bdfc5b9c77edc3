"""scripts/bootstrap: a checkout that was moved or copied is made ready where it is now."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from fixtures.paths import base_dir

# As much of a project as the script needs, without dependencies.
PROJECT = """
[build-system]
requires = []
[project]
name = "small"
version = "1"
dependencies = []
optional-dependencies.dev = []
[project.scripts]
zenith = "small:main"
[tool.setuptools]
packages = []
package-dir = {}
"""


def bootstrap(checkout: Path) -> str:
    """What its command says then; PIP_NO_INDEX: nothing is fetched."""
    command = [str(checkout / "scripts" / "bootstrap")]
    subprocess.run(command, env={**os.environ, "PIP_NO_INDEX": "1"}, check=True)
    zenith = [str(checkout / ".venv" / "bin" / "zenith")]
    return subprocess.run(zenith, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_moved_and_copied(tmp_path: Path) -> None:
    """Its programs run, and are its own: those of another checkout would change that one."""
    first, moved, copied = (tmp_path / name for name in ("first", "moved", "copied"))
    (first / "scripts").mkdir(parents=True)
    shutil.copy(Path(base_dir) / "scripts" / "bootstrap", first / "scripts")
    (first / "pyproject.toml").write_text(PROJECT)
    (first / "setup.py").write_text("from setuptools import setup\nsetup()\n")
    (first / "small.py").write_text("def main():\n    print(__file__)\n")
    assert bootstrap(first) == f"{first}/small.py\n"
    (first / ".venv" / "mark").touch()
    assert bootstrap(first) == f"{first}/small.py\n"
    assert (first / ".venv" / "mark").exists()

    shutil.copytree(first, copied, symlinks=True)
    first.rename(moved)
    for checkout in (copied, moved):
        assert bootstrap(checkout) == f"{checkout}/small.py\n"
        pip = subprocess.run(
            [checkout / ".venv" / "bin" / "pip", "--version"],
            check=True,
            capture_output=True,
            text=True,
        )
        assert f" from {checkout}/.venv/" in pip.stdout
