"""What a postmaster's parent does with the processes that it is left with."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: all children but the spared one are ended. There is no deadline that
# would hide a child that is waited for in vain.
_CLEAN_UP = """
import os, subprocess, sys
from pathlib import Path
from compute_tools import postgres_process
postgres_process.KILL_TIMEOUT = 1e9
dead = subprocess.Popen(["true"])
os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
left = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
gone = subprocess.Popen(["true"])
gone.wait()
postgres_process.PostgresProcess(Path("/nonexistent"), gone, 0).clean_up(spare=[dead.pid])
for child in left:
    assert not Path(f"/proc/{child.pid}").exists()
assert dead.wait() == 0
"""


def test_clean_up_beside_a_dead_child() -> None:
    """A child to be spared that has ended and is not waited for yet keeps nobody else alive."""
    done = subprocess.run(
        [sys.executable, "-c", _CLEAN_UP], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
