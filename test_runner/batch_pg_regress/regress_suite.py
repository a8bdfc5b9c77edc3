"""Running a suite of Postgres' regression tests against a server."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fixtures.log_helper import log
from fixtures.pg_protocol import PgBin, PgProtocol, VanillaPostgres, unprivileged
from fixtures.regress_sources import RegressSources
from fixtures.utils import wait_until

# The suites expect Postgres' default here; computes are more permissive.
SETTINGS = (
    "shared_buffers=64MB",
    "max_prepared_transactions=10",
    "allow_in_place_tablespaces=off",
)

# Tests whose expected results are not those of every release of PostgreSQL 15. One that fails must
# still print exactly what a stock server of the same distribution prints.
RELEASE_DIFFERENCES = {
    "alter_table": "15.20 refuses to change a column type that a CHECK constraint uses as a row "
    "type, and locks the referenced index when it adds a foreign key",
    "rules": "15.20 prints AS before the alias of the target of UPDATE, DELETE and MERGE",
    "triggers": "contrib/spi's refint of 15.20 cascades an update to other statements",
}

_ENDED = re.compile(r"^(?:test)? +(\S+) +\.\.\. ", re.MULTILINE)
_FAILED = re.compile(_ENDED.pattern + "FAILED", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """A schedule, and what it is run with."""

    program: Path
    inputdir: Path
    schedule: Path
    sources: RegressSources


def core_suite(sources: RegressSources, schedule: Path | None = None) -> Suite:
    """The core regression suite, or those of its tests that a schedule names."""
    whole = sources.regress_dir / "parallel_schedule"
    return Suite(sources.pg_regress, sources.regress_dir, schedule or whole, sources)


def isolation_suite(sources: RegressSources) -> Suite:
    """The isolation suite."""
    schedule = sources.isolation_dir / "isolation_schedule"
    return Suite(sources.pg_isolation_regress, sources.isolation_dir, schedule, sources)


class SuiteRun:
    """A suite in progress on a server; its files are below `work`."""

    def __init__(self, server: PgProtocol, suite: Suite, work: Path) -> None:
        self.outputdir = work / "output"
        self._printed = work / "printed"
        # The server itself writes below the output directory (COPY TO a file).
        work.mkdir(mode=0o777)
        work.chmod(0o777)
        shutil.copytree(suite.inputdir, self.outputdir)
        shutil.copyfile(suite.schedule, self.outputdir / "schedule")
        if user := unprivileged():
            owner = f"{user['user']}:{user['group']}"
            subprocess.run(["chown", "-R", owner, str(work)], check=True)
        command = [
            str(suite.program),
            f"--bindir={suite.sources.bin_dir}",
            f"--dlpath={suite.sources.library_dir}",
            f"--inputdir={self.outputdir}",
            f"--outputdir={self.outputdir}",
            f"--schedule={self.outputdir / 'schedule'}",
            "--host=127.0.0.1",
            f"--port={server.port}",
            f"--user={server.username}",
            "--max-concurrent-tests=20",
        ]
        with self._printed.open("w") as out:
            self._process = subprocess.Popen(
                command,
                cwd=self.outputdir,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                **unprivileged(),
            )

    def printed(self) -> str:
        """What pg_regress has said up to now."""
        return self._printed.read_text(errors="replace")

    def wait_for_test(self, name: str) -> None:
        """Wait until a test has ended."""
        wait_until(
            lambda: name in self.tests() or self._process.poll() is not None,
            timeout=600,
            what=f"the regression test {name} to end",
        )
        assert self._process.poll() is None, f"pg_regress ended early: {self.printed()[-3000:]}"

    def wait(self) -> list[str]:
        """Wait for the end; names of the tests that did not give their expected results."""
        code = self._process.wait()
        printed = self.printed()
        log.info("%s", printed[-8000:])
        failed = _FAILED.findall(printed)
        assert (code == 0) == (not failed), f"pg_regress ended with {code}: {printed[-3000:]}"
        return failed

    def __enter__(self) -> SuiteRun:
        return self

    def __exit__(self, *_: object) -> None:
        """End what is left of the run."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def tests(self) -> set[str]:
        """Names of the tests that have ended."""
        return set(_ENDED.findall(self.printed()))

    def result(self, test: str) -> str:
        """What a test printed."""
        return (self.outputdir / "results" / f"{test}.out").read_text(errors="replace")

    def differences(self) -> str:
        """The differences from the expected results."""
        return (self.outputdir / "regression.diffs").read_text(errors="replace")


def run_suite(
    server: PgProtocol, suite: Suite, work: Path, *, pg_bin: PgBin, stock_port: int
) -> None:
    """Run a suite to its end; fails unless all results are as expected.

    The expected results are of the tests' release, which may be older than the server's: see
    RELEASE_DIFFERENCES. The stock server to compare with is started only when a test fails.
    """
    with SuiteRun(server, suite, work) as run:
        failed = run.wait()
    for test in sorted(RELEASE_DIFFERENCES.keys() & run.tests() - set(failed)):
        log.warning("%s is listed in RELEASE_DIFFERENCES and gives its expected results", test)
    if not failed:
        return
    log.info("not as expected: %s\n%s", failed, run.differences())
    stock = _run_on_stock(suite, work.with_name(f"{work.name}_stock"), pg_bin, stock_port)
    unlike = [
        line
        for test in failed
        if run.result(test) != stock.result(test)
        for line in _diff(test, stock.result(test), run.result(test))
    ]
    assert not unlike, "unlike a stock server:\n" + "\n".join(unlike)
    unlisted = set(failed) - RELEASE_DIFFERENCES.keys()
    assert not unlisted, (
        f"{sorted(unlisted)} give the results of a stock server, not those that the tests "
        f"of {suite.sources.version} expect: find out why, then list them in RELEASE_DIFFERENCES\n"
        f"{run.differences()[:20000]}"
    )


def _run_on_stock(suite: Suite, work: Path, pg_bin: PgBin, port: int) -> SuiteRun:
    pgdata = work.with_name(f"{work.name}_pgdata")
    options = ("-U", "zenith_admin", "--no-locale", "-E", "UTF8")
    with VanillaPostgres(pgdata, pg_bin, port, options) as vanilla:
        vanilla.username = "zenith_admin"
        vanilla.configure("\n".join([*SETTINGS, "fsync=off"]))
        vanilla.start()
        with SuiteRun(vanilla, suite, work) as run:
            run.wait()
    return run


def _diff(test: str, stock: str, ours: str) -> list[str]:
    lines = difflib.unified_diff(
        stock.splitlines(), ours.splitlines(), f"{test} (stock)", f"{test} (Zenith)", lineterm=""
    )
    return list(lines)[:200]
