"""SQL tests of our own, run by pg_regress on a compute and followed by the page verifier.

Their SQL, expected results and schedule are in zenith_regress. What a stock server prints is
expected of all but the tests named zenith_*.
"""

from __future__ import annotations

from pathlib import Path

from batch_pg_regress.regress_suite import SETTINGS, Suite, SuiteRun
from batch_pg_regress.test_pg_regress import verify_storage
from fixtures.regress_sources import RegressSources, pg_regress_program
from fixtures.zenith_env import ZenithEnvBuilder

SUITE = Path(__file__).with_name("zenith_regress")

# The smallest buffers: most pages that a test reads were written out before.
SMALL_BUFFERS = [*SETTINGS, "shared_buffers=1MB"]


def zenith_suite(distrib_dir: Path) -> Suite:
    """The suite, with the programs of the installed server."""
    sources = RegressSources(
        regress_dir=SUITE,
        isolation_dir=SUITE,
        library_dir=distrib_dir / "lib",
        bin_dir=distrib_dir / "bin",
        pg_regress=pg_regress_program(distrib_dir, "regress"),
        pg_isolation_regress=pg_regress_program(distrib_dir, "isolation"),
        version="",
    )
    return Suite(sources.pg_regress, SUITE, SUITE / "schedule", sources)


def test_zenith_regress(zenith_env_builder: ZenithEnvBuilder, test_output_dir: str) -> None:
    """Every kind of object on its way to storage, in SQL; then each page is compared."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main", config_lines=SMALL_BUFFERS)
    suite = zenith_suite(env.paths.pg_distrib_dir)
    with SuiteRun(pg, suite, Path(test_output_dir) / "zenith_regress") as run:
        failed = run.wait()
    assert not failed, run.differences()[:20000]
    verify_storage(pg)
