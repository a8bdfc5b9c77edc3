"""`postgres --sync-safekeepers`: a quorum agrees on the end of the WAL, which is printed.

A walproposer without Postgres is elected and brings a majority to the end of the most advanced
log, so that all that may have been acknowledged is committed. It tells the safekeepers, as every
walproposer does, who their pageserver is, and leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compute_tools.quorum_settings import QuorumSettings, QuorumSettingsError
from compute_tools.spec import address_text

DEFAULT_TIMEOUT = 60.0
# Safekeepers beyond the quorum are brought to the same end as long as they make progress.
_LEAVE_TIMEOUT = 15.0


class SyncError(Exception):
    """The quorum has not agreed; the message says why."""


def sync_safekeepers(settings: QuorumSettings, timeout: float) -> str:
    """The LSN up to which a quorum holds everything as committed; `0/0`: nothing was ever written.

    Raises SyncError, also when that takes more than `timeout` seconds.
    """
    process = subprocess.Popen(
        _command(settings),
        # Its end of this pipe tells it that we are there.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    events: dict[str, Any] = {}
    try:
        for line in process.stdout:
            event = json.loads(line)
            events[event["event"]] = event
            if event["event"] == "elected":
                timer.cancel()
                timer = threading.Timer(_LEAVE_TIMEOUT, process.kill)
                timer.start()
        process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    if "elected" in events:
        return str(events["elected"]["epoch_start_lsn"])
    raise SyncError(_reason(events, settings, timeout))


def _command(settings: QuorumSettings) -> list[str]:
    command = [sys.executable, "-P", "-m", "compute_tools.walproposer", "--settle"]
    command += [f"--tenant={settings.tenant_id}", f"--timeline={settings.timeline_id}"]
    command.append(f"--safekeepers={_addresses(settings)}")
    if settings.pageserver_connstr:
        command.append(f"--pageserver-connstr={settings.pageserver_connstr}")
    return command


def _addresses(settings: QuorumSettings) -> str:
    return ",".join(address_text(*address) for address in settings.safekeepers)


def _reason(events: dict[str, Any], settings: QuorumSettings, timeout: float) -> str:
    if "defeated" in events:
        return f"a compute took over this timeline in term {events['defeated']['term']}"
    if "fatal" in events:
        return str(events["fatal"]["message"])
    why = events.get("waiting", {}).get("message", "are they running?")
    return (
        f"no majority of the safekeepers ({_addresses(settings)}) answered within "
        f"{timeout:g} s: {why}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the LSN; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="postgres --sync-safekeepers",
        description="Bring a majority of the safekeepers to the end of the WAL, and print its LSN "
        "(0/0: nothing was ever written). The safekeepers are those of postgresql.conf.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-D",
        dest="pgdata",
        metavar="DATADIR",
        default=os.environ.get("PGDATA"),
        help="directory of postgresql.conf, else $PGDATA",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="give up without a majority after so long (default: %(default)g)",
    )
    options = parser.parse_args(arguments)
    if not options.pgdata:
        parser.error("there is no -D, and the environment variable PGDATA is not set")
    try:
        settings = QuorumSettings.read(Path(options.pgdata))
        print(sync_safekeepers(settings, options.timeout))
    except (OSError, QuorumSettingsError, SyncError) as e:
        print(f"sync-safekeepers: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
