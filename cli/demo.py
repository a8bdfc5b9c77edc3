"""`zenith demo`: the main job on real data, with the time each step takes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import psycopg2
from rich.console import Console
from rich.table import Table

from control_plane.compute import SUPERUSER, Compute, ComputeControlPlane
from control_plane.errors import ControlPlaneError
from control_plane.local_env import DEFAULT_BRANCH, LocalEnv, PageserverConf, SafekeeperConf
from control_plane.pageserver_http import PageserverHttp
from control_plane.time_travel import wait_for_newest
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import Lsn

from .environment import create_environment, start_environment, stop_environment

_ORDERS = 5000

_LOAD = """
CREATE TABLE orders (
    id      bigint PRIMARY KEY,
    item    text NOT NULL,
    price   numeric(10, 2) NOT NULL,
    placed  timestamptz NOT NULL
);
INSERT INTO orders
SELECT i, 'item ' || i % 97, 5 + (i * 37 % 2000) / 10.0,
       '2026-01-01'::timestamptz + i * '7 min'::interval
FROM generate_series(1, {rows}) AS i;
CREATE INDEX orders_item ON orders (item);
ANALYZE orders;
"""

_MISTAKE = "UPDATE orders SET price = 0; DELETE FROM pgbench_accounts WHERE aid % 2 = 0"

_STATE = """
SELECT (SELECT count(*) FROM orders),
       (SELECT sum(price) FROM orders),
       (SELECT count(*) FROM orders WHERE price = 0),
       (SELECT count(*) FROM pgbench_accounts)
"""


@dataclass(slots=True)
class _Clock:
    """Shows each step and keeps its time."""

    console: Console
    steps: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self.console.print(f"[bold]{title}[/bold] ... ", end="")
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.steps.append((title, seconds))
        self.console.print(f"[green]{_duration(seconds)}[/green]")


@click.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=Path(".zenith-demo"),
    show_default=True,
    help="Where to build the environment; must not exist.",
)
@click.option("--scale", default=5, show_default=True, help="pgbench scale: 15 MB each.")
@click.option("--keep", is_flag=True, help="Leave the environment running at the end.")
def demo(directory: Path, scale: int, keep: bool) -> None:
    """Build an environment, load data, make a mistake, and go back before it.

    \b
    Starts a pageserver, three safekeepers and Postgres on free ports, loads pgbench's tables and
    a table of orders, branches before and after a "mistake", and shows both states side by side.

    \b
    zenith demo
    zenith demo --scale 50 --keep
    """
    directory = directory.absolute()
    os.environ["ZENITH_REPO_DIR"] = str(directory)
    console = Console(highlight=False)
    clock = _Clock(console)
    env = _make_environment(directory, clock)
    try:
        with clock.step("start the pageserver and three safekeepers (fsync on)"), _quiet():
            start_environment(env)
        _tell(env, scale, clock)
    except BaseException:
        console.print()
        with _quiet():
            stop_environment(env, immediate=True)
        console.print(f"[red]The demo failed; its logs are in {directory}[/red]")
        raise
    _summary(clock)
    if keep:
        console.print(
            f"\nStill running. Next: export ZENITH_REPO_DIR={directory}; "
            "./scripts/zenith pg list; ./scripts/zenith timeline list"
        )
        return
    with _quiet():
        stop_environment(env, immediate=True)
    shutil.rmtree(directory)


def _make_environment(directory: Path, clock: _Clock) -> LocalEnv:
    ports = _free_ports(8)
    conf = LocalEnv.parse("", directory)
    conf.pageserver = PageserverConf(
        listen_pg_addr=f"127.0.0.1:{ports[0]}", listen_http_addr=f"127.0.0.1:{ports[1]}"
    )
    conf.safekeepers = [SafekeeperConf(i, ports[2 * i], ports[2 * i + 1]) for i in (1, 2, 3)]
    with TemporaryDirectory() as scratch, clock.step(f"create an environment in {directory.name}"):
        config = Path(scratch) / "config.toml"
        config.write_text(conf.to_toml())
        return create_environment(config, None, ())


def _tell(env: LocalEnv, scale: int, clock: _Clock) -> None:
    """The story: load, mistake, branches before and after it, side by side."""
    say = clock.console.print
    plane, tenant = ComputeControlPlane(env), env.default_tenant_id
    assert tenant is not None
    ports = iter(_free_ports(4))

    with clock.step("start Postgres on branch main, to the first query"), _quiet():
        main = plane.create(
            tenant, "main", env.branch_timeline(DEFAULT_BRANCH, tenant), None, next(ports)
        )
        main.start(lambda _: None)
        version = _query(main, "SHOW server_version")[0]
    say(f"    stock PostgreSQL {version} on 127.0.0.1:{main.port}")

    with clock.step(f"load pgbench at scale {scale} and {_ORDERS} orders"):
        _pgbench(env, main, "--initialize", "--quiet", f"--scale={scale}")
        _execute(main, _LOAD.format(rows=_ORDERS))
    with clock.step("run pgbench, 4 clients, 1000 transactions each"):
        _pgbench(env, main, "--client=4", "--transactions=1000", "--no-vacuum")

    before = Lsn.parse(_query(main, "SELECT pg_current_wal_flush_lsn()::text")[0])
    say(f"    all is well at LSN {before}")
    with clock.step("the mistake: every price set to 0, every second account deleted"):
        _execute(main, _MISTAKE)

    with clock.step(f"branch main as it was at {before}, before the mistake"):
        fixed = _branch(env, tenant, "before-mistake", before)
    with clock.step("start Postgres on that branch, to the first query"), _quiet():
        old = plane.create(tenant, "before", fixed, None, next(ports))
        old.start(lambda _: None)
        _query(old, "SELECT 1")
    with clock.step("branch main as it is, after the mistake"):
        broken = _branch(env, tenant, "after-mistake", None)
    with clock.step("start Postgres on that branch, to the first query"), _quiet():
        new = plane.create(tenant, "after", broken, None, next(ports))
        new.start(lambda _: None)
        _query(new, "SELECT 1")
    with clock.step("write to both branches at once"):
        _execute(old, "INSERT INTO orders VALUES (0, 'only before', 1, now())")
        _execute(new, "INSERT INTO orders VALUES (0, 'only after', 2, now())")
    with clock.step(f"open main read-only at {before}"), _quiet():
        past = plane.create(
            tenant, "past", env.branch_timeline(DEFAULT_BRANCH, tenant), before, next(ports)
        )
        past.start(lambda _: None)

    table = Table(title=f"\nThe same database, four ways (before and past: at {before})")
    table.add_column("", no_wrap=True)
    for title in ("main", "branch before", "branch after", "main, past"):
        table.add_column(title, justify="right")
    states = [_query(node, _STATE) for node in (main, old, new, past)]
    names = ("orders", "sum of prices", "orders at price 0", "pgbench accounts")
    for i, name in enumerate(names):
        table.add_row(name, *(f"{state[i]:,}" for state in states))
    say(table)
    if not states[1][1] > states[2][1] or states[3][2] != 0:
        raise ControlPlaneError("the branches do not show what they should: please report this")


def _branch(env: LocalEnv, tenant: TenantId, name: str, lsn: Lsn | None) -> TimelineId:
    main = env.branch_timeline(DEFAULT_BRANCH, tenant)
    if lsn is None:
        wait_for_newest(env, tenant, main)
    info = PageserverHttp(env).timeline_create(
        tenant, ancestor_timeline_id=main, ancestor_start_lsn=lsn
    )
    timeline_id = TimelineId.parse(info["timeline_id"])
    env.add_branch(name, tenant, timeline_id)
    return timeline_id


def _pgbench(env: LocalEnv, node: Compute, *arguments: str) -> None:
    command = [str(env.pg_distrib_dir / "bin" / "pgbench"), *arguments]
    command += ["--host=127.0.0.1", f"--port={node.port}", f"--username={SUPERUSER}", "postgres"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ControlPlaneError(f"pgbench failed: {done.stderr.strip()}")


@contextmanager
def _cursor(node: Compute) -> Iterator[Any]:
    """A cursor on a node; raises ControlPlaneError."""
    try:
        with closing(
            psycopg2.connect(host="127.0.0.1", port=node.port, user=SUPERUSER, dbname="postgres")
        ) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                yield cursor
    except psycopg2.Error as e:
        raise ControlPlaneError(f"postgres {node.name} did not do what it was asked") from e


def _query(node: Compute, sql: str) -> tuple[Any, ...]:
    with _cursor(node) as cursor:
        cursor.execute(sql)
        row: tuple[Any, ...] = cursor.fetchone()
        return row


def _execute(node: Compute, sql: str) -> None:
    with _cursor(node) as cursor:
        cursor.execute(sql)


def _summary(clock: _Clock) -> None:
    table = Table(title="\nTime of each step")
    table.add_column("step")
    table.add_column("time", justify="right")
    for title, seconds in clock.steps:
        table.add_row(title, _duration(seconds))
    clock.console.print(table)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; held until all are chosen, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the steps' own chatter off the demo's page."""
    with Path(os.devnull).open("w") as null, redirect_stdout(null):
        yield
