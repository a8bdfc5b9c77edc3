"""Command line of the walproposer; control.py describes the dialogue on stdin and stdout."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from compute_tools.auth import with_auth_token
from compute_tools.safekeeper_membership import NOT_KNOWN, SafekeeperMembership
from compute_tools.walproposer.config import Config
from compute_tools.walproposer.control import ControlChannel
from compute_tools.walproposer.core import Predecessors
from compute_tools.walproposer.shell import Walproposer
from zenith_utils.daemonize import AddressError, parse_address
from zenith_utils.ids import TenantId, TimelineId

_DEFAULT_SAFEKEEPER_PORT = 5454


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (control.py)."""
    config = _parse_arguments(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s walproposer %(levelname)s %(message)s",
    )
    proposer = Walproposer(config, ControlChannel(0, 1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's
    signal.signal(signal.SIGTERM, lambda *_: proposer.terminate())
    code = proposer.run()
    # Threads may still be connecting to safekeepers that are down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parse_arguments(argv: Sequence[str] | None) -> Config:
    parser = argparse.ArgumentParser(prog="walproposer", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--tenant", type=TenantId.parse, required=True)
    add("--timeline", type=TimelineId.parse, required=True)
    add("--safekeepers", type=_safekeepers, required=True, help="host:port,host:port,...")
    add(
        "--pageserver-connstr",
        help="what safekeepers call, a postgresql:// URL without '='; $ZENITH_AUTH_TOKEN in it "
        "stands for the environment variable",
    )
    add("--pgdata", type=Path, help="data directory of Postgres, whose pg_wal helps laggards")
    add("--pg-version", type=int, default=0, help="server version number, as 150018")
    add(
        "--membership",
        type=_membership,
        default=NOT_KNOWN,
        help="JSON: instances and generations of the safekeepers (safekeeper_membership.py)",
    )
    add("--drain-timeout", type=float, default=10.0, help="seconds to push the last WAL")
    add("--feedback-file", type=Path, help="where Postgres finds what the pageserver reports")
    add("--own-terms", type=_terms, help="terms that earlier walproposers of this Postgres won")
    add("--last-term", type=int, default=0, help="the highest term they asked for votes in")
    add("--settle", action="store_true", help="establish the generation and leave: no Postgres")
    args = parser.parse_args(argv)
    predecessors = None
    if args.own_terms is not None:
        predecessors = Predecessors(args.own_terms, max(args.last_term, *args.own_terms, 0))
    if args.membership.members and len(args.membership.members) != len(args.safekeepers):
        parser.error("--membership must have a member for each of --safekeepers")
    return Config(
        args.tenant,
        args.timeline,
        args.safekeepers,
        None if args.pageserver_connstr is None else with_auth_token(args.pageserver_connstr),
        args.pgdata,
        args.pg_version,
        args.drain_timeout,
        args.feedback_file,
        predecessors,
        args.membership,
        args.settle,
    )


def _terms(text: str) -> frozenset[int]:
    return frozenset(int(part) for part in text.split(","))


def _membership(text: str) -> SafekeeperMembership:
    try:
        membership = SafekeeperMembership.from_json(json.loads(text))
        membership.for_proposer()
    except (ValueError, TypeError, KeyError) as e:
        raise argparse.ArgumentTypeError(f"not a membership of safekeepers: {e!r}") from e
    return membership


def _safekeepers(text: str) -> tuple[tuple[str, int], ...]:
    try:
        return tuple(parse_address(part, _DEFAULT_SAFEKEEPER_PORT) for part in text.split(","))
    except AddressError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
