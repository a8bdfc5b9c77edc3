"""A test that fails with servers running, for tests of the framework itself: RUN_BROKEN=1."""

from __future__ import annotations

import os

import pytest
from fixtures.log_helper import log
from fixtures.zenith_fixtures import PgBin, ZenithEnv

pytestmark = pytest.mark.skipif(
    not os.environ.get("RUN_BROKEN"), reason="fails by intention: set RUN_BROKEN to run it"
)


def test_broken(zenith_simple_env: ZenithEnv, pg_bin: PgBin) -> None:
    """Its environment is taken down all the same, and all of its output is kept."""
    zenith_simple_env.zenith_cli.create_branch("test_broken", "empty")
    zenith_simple_env.postgres.create_start("test_broken")
    log.info("postgres is running")
    pg_bin.run(["pgbench", "--no-such-option"])
