"""A directory for tests that start Postgres, which runs as another user when the tests run as root.

pytest's own temporary directories are closed to other users.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from zenith_utils.os_user import give


@contextlib.contextmanager
def temporary_workspace() -> Iterator[Path]:
    """A directory that the Postgres user can reach and owns; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="zenith-test-"))
    try:
        path.chmod(0o755)
        give(path)
        yield path
    finally:
        shutil.rmtree(path)
