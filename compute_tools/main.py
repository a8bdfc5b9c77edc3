"""Entry point of a compute's supervisor: `python -m compute_tools --spec FILE --status-fd N`.

Whoever starts it reads JSON lines from the status pipe until the compute is up or has failed:
{"progress": text}, {"ready": true}, {"failed": text}.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from compute_tools import state
from compute_tools.spec import ComputeSpec, SpecError
from compute_tools.supervisor import ComputeError, Supervisor
from zenith_utils.log import init_logging

log = logging.getLogger(__name__)


class StatusPipe:
    """Tells the starter how the start goes; a starter that went away is no error."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def send(self, **message: object) -> None:
        """Write one JSON line."""
        if self._fd is None:
            return
        try:
            os.write(self._fd, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            self.close()

    def close(self) -> None:
        """No more to say: the starter sees the end of the pipe."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def main(arguments: list[str] | None = None) -> int:
    """Run one compute until it ends; returns the exit status."""
    parser = argparse.ArgumentParser(prog="compute_tools", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="the compute's specification")
    parser.add_argument("--status-fd", type=int, help="pipe that is told how the start goes")
    options = parser.parse_args(arguments)
    if options.status_fd is not None:
        os.set_inheritable(options.status_fd, False)
    init_logging(None, os.environ.get("RUST_LOG"))
    status = StatusPipe(options.status_fd)
    try:
        spec = ComputeSpec.load(options.spec)
        # Held until the process is gone: nobody else touches the node before.
        state.lock(spec.state_dir)
        supervisor = Supervisor(spec)
        supervisor.start(lambda text: status.send(progress=text))
    except (ComputeError, OSError, SpecError, state.AlreadyRunning) as e:
        log.error("%s", e)
        status.send(failed=str(e))
        return 1
    status.send(ready=True)
    status.close()
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
