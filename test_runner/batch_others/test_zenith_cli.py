"""The zenith command over whole environments: answers, states and errors that scripts rely on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import uuid
from typing import Any

import pytest
from fixtures.utils import wait_until
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder, kill_process

LSN = r"[0-9A-F]+/[0-9A-F]+"
HEX = "[0-9a-f]{32}"


def said(env: ZenithEnv, *arguments: str, code: int = 0) -> str:
    """The standard output of a command."""
    return answer(env, *arguments, code=code).stdout


def answer(env: ZenithEnv, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = env.zenith_cli.raw_cli(list(arguments), check_return_code=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def document(env: ZenithEnv, *arguments: str, code: int = 0) -> Any:
    return json.loads(said(env, *arguments, "--json", code=code))


def test_timelines_and_tenants(zenith_env_builder: ZenithEnvBuilder) -> None:
    """What scripts parse: timelines and tenants, from their creation on."""
    env = zenith_env_builder.init_start()
    cli, first = env.zenith_cli, env.initial_tenant
    assert [name for name, _ in cli.list_timelines()] == ["main"]
    created = said(env, "timeline", "branch", "--branch-name", "a")
    match = re.fullmatch(
        rf"Created timeline '({HEX})' at Lsn ({LSN}) for tenant: {first.hex}\. "
        r"Ancestor timeline: 'main'\n",
        created,
    )
    assert match, created
    cli.create_branch("b", "a")
    cli.create_branch("c", "main")
    created = said(env, "timeline", "create", "--branch-name", "empty")
    assert re.fullmatch(
        rf"Created timeline '{HEX}' at Lsn {LSN} for tenant: {first.hex}\n", created
    )
    names = dict(cli.list_timelines())
    assert set(names) == {"main", "a", "b", "c", "empty"}
    lines = said(env, "timeline", "list").splitlines()
    assert lines[0] == f"(L) empty [{names['empty']}]"
    assert lines[1] == f"(L) main [{names['main']}]"
    below = "┃" if names["a"] < names["c"] else " "
    assert any(re.fullmatch(rf"\(L\) {below}  ┗━ @{LSN}: b \[{names['b']}\]", li) for li in lines)
    a = next(line for line in lines if " a [" in line)
    assert a == f"(L) {'┣' if names['a'] < names['c'] else '┗'}━ @{match[2]}: a [{match[1]}]"

    assert said(env, "tenant", "list").split()[::2] == [first.hex]
    second = uuid.uuid4()
    assert said(env, "tenant", "create", "--tenant-id", second.hex) == (
        f"tenant {second.hex} successfully created on the pageserver\n"
    )
    assert cli.list_timelines(second) == []
    cli.create_timeline("main", tenant_id=second)
    assert [name for name, _ in cli.list_timelines(second)] == ["main"]
    assert set(dict(cli.list_timelines())) == set(names), "the other tenant's are its own"
    again = answer(env, "tenant", "create", "--tenant-id", second.hex, code=1)
    assert again.stderr.startswith(f"command failed: tenant {second.hex} exists already\n")
    assert "Http error (409) at " in again.stderr
    env.pageserver.stop()
    env.pageserver.start()
    listed = [line.split()[0] for line in said(env, "tenant", "list").splitlines()]
    assert sorted(listed) == sorted([first.hex, second.hex])
    assert [t["tenant_id"] for t in document(env, "tenant", "list")] == listed


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_daemons_stop_and_start(zenith_env_builder: ZenithEnvBuilder, mode: str) -> None:
    """The lines of start, stop and restart, and that each command can be given twice."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init()
    pageserver, safekeeper = env.pageserver.service_port, env.safekeepers[0].port
    assert said(env, "stop", "-m", mode).splitlines() == [
        "Pageserver is already stopped",
        "Safekeeper 1 is already stopped",
    ]
    started = [
        f"Starting pageserver at 'localhost:{pageserver.pg}' in '{env.repo_dir}'",
        "Pageserver started",
        f"initializing for sk 1 for {safekeeper.http}",
        f"Starting safekeeper at '127.0.0.1:{safekeeper.pg}' in '{env.repo_dir}/safekeepers/sk1'",
        "Safekeeper started",
    ]
    assert said(env, "start").splitlines() == started
    again = said(env, "start")
    assert f"Pageserver is already running with pid {env.pageserver.pid()}" in again
    assert f"Safekeeper 1 is already running with pid {env.safekeepers[0].pid()}" in again
    assert "is running at" in said(env, "pageserver", "status")

    word = {"fast": "gracefully", "immediate": "immediately"}[mode]
    for kind, start in (("pageserver", started[:2]), ("safekeeper", started[2:])):
        title = kind.capitalize()
        stopped = said(env, kind, "stop", "-m", mode).splitlines()
        assert stopped[0] == f"Stop {kind} {word}"
        assert f"{title} stopped receiving connections" in stopped
        assert stopped[-1].startswith(f"{title} status is: ")
        second = said(env, kind, "stop", "-m", mode)
        assert re.fullmatch(
            rf"{title} with pid \d+ does not exist, but a PID file was found\n", second
        )
        said(env, kind, "status", code=1)
        assert said(env, kind, "start").splitlines() == start
        if mode == "fast":
            restarted = said(env, kind, "restart").splitlines()
            assert restarted[0] == f"Stop {kind} gracefully"
            assert restarted[-len(start) :] == start
    said(env, "stop", "-m", mode)
    said(env, "pageserver", "status", code=1)


def test_pid_files_of_the_dead(zenith_env_builder: ZenithEnvBuilder) -> None:
    """After kill -9, and where the number is another process' now: nothing wrong is killed."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    dead = env.pageserver.pid()
    kill_process(env.repo_dir / "pageserver.pid")
    assert document(env, "pageserver", "status", code=1)["pid"] is None
    assert document(env, "status", code=3)["warnings"][0]["text"] == (
        "pageserver is down: zenith pageserver start"
    )
    assert said(env, "pageserver", "stop") == (
        f"Pageserver with pid {dead} does not exist, but a PID file was found\n"
    )
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        (env.repo_dir / "pageserver.pid").write_text(str(bystander.pid))
        assert "pid files: " in said(env, "doctor")
        said(env, "pageserver", "stop", "-m", "immediate")
        assert bystander.poll() is None
        said(env, "pageserver", "start")
        assert env.pageserver.pid() != bystander.pid
        assert document(env, "pageserver", "status")["pid"] == env.pageserver.pid()
    finally:
        bystander.kill()
        bystander.wait()
    wait_until(lambda: document(env, "status")["warnings"] == [], what="an end of the warnings")


def test_init_twice(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The second init refuses, and the environment is as it was."""
    env = zenith_env_builder.init()
    config = (env.repo_dir / "config").read_text()
    refused = answer(env, "init", code=1)
    assert refused.stdout == ""
    assert refused.stderr.splitlines() == [
        "command failed: Failed to initialize zenith repository",
        "",
        "Caused by:",
        f"    0: directory '{env.repo_dir}' already exists. Perhaps already initialized?",
    ]
    assert (env.repo_dir / "config").read_text() == config


def test_config_is_rewritten(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Its shape after a rewrite; scripts replace its last two lines and leave out the last end."""
    zenith_env_builder.num_safekeepers = 2
    env = zenith_env_builder.init()
    path = env.repo_dir / "config"
    path.write_text("strange = 5\n# a remark\n" + path.read_text())
    ports = [env.port_distributor.get_port() for _ in range(2)]
    lines = path.read_text().splitlines()
    assert lines[-2].startswith("listen_http_addr = 'localhost:")
    assert lines[-1].startswith("listen_pg_addr = 'localhost:")
    lines[-2:] = [
        f"listen_{n}_addr = '127.0.0.1:{p}'" for n, p in zip(("http", "pg"), ports, strict=True)
    ]
    path.write_text("\n".join(lines))
    overrides = [f"--pageserver-config-override={line}" for line in lines[-2:]]
    assert f"'127.0.0.1:{ports[1]}'" in said(env, "pageserver", "start", *overrides)
    env.pageserver.running = True
    env.zenith_cli.create_branch("z")
    env.zenith_cli.create_branch("a.b")
    lines = path.read_text().splitlines()
    assert all(line.startswith("#") for line in lines[:3])
    assert not any(line.startswith(("strange", "# a remark")) for line in lines)
    scalars = [line.split(" = ")[0] for line in lines[3 : lines.index("")]]
    assert scalars == sorted(scalars)
    assert {"default_tenant_id", "pg_distrib_dir", "zenith_distrib_dir"} <= set(scalars)
    tables = [line for line in lines if line.startswith("[")]
    assert tables == ["[[safekeepers]]"] * 2 + ["[branch_name_mappings]", "[pageserver]"]
    branches = lines[lines.index("[branch_name_mappings]") + 1 : lines.index("[pageserver]") - 1]
    assert [line.split(" = ")[0] for line in branches] == ['"a.b"', "main", "z"]
    assert f"main = [['{env.initial_tenant.hex}', '" in "\n".join(branches)
    keys = [line.split(" = ")[0] for line in lines[lines.index("[pageserver]") + 1 :]]
    assert keys == sorted(keys)
    assert lines[-2:] == [
        f"listen_http_addr = '127.0.0.1:{ports[0]}'",
        f"listen_pg_addr = '127.0.0.1:{ports[1]}'",
    ]


def status_of(env: ZenithEnv, node: str) -> str:
    listed = said(env, "pg", "list").splitlines()
    assert listed[0] == "NODE\tADDRESS\tTIMELINE\tBRANCH NAME\tLSN\t\tSTATUS"
    row = next(line for line in listed if line.startswith(f"{node}\t")).split("\t")
    assert len(row) == 7
    return row[6]


def test_pg_list(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A node from its creation over a crash to its end; `psql` finds it while it runs."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    port = env.port_distributor.get_port()
    assert said(env, "pg", "create", "n", "--port", str(port)) == ""
    assert status_of(env, "n") == "stopped"
    refused = answer(env, "psql", code=1)
    assert refused.stderr.endswith("Start one: zenith pg start n\n")
    lines = said(env, "pg", "start", "n").splitlines()
    assert lines[0] == "Starting existing postgres n..."
    directory = env.repo_dir / "pgdatadirs" / "tenants" / env.initial_tenant.hex / "n"
    assert (
        f"Extracting base backup to create postgres instance: path={directory} port={port}" in lines
    )
    connect = f"host=127.0.0.1 port={port} user=zenith_admin dbname=postgres"
    assert f"Starting postgres node at '{connect}'" in lines
    try:
        assert status_of(env, "n") == "running"
        assert said(env, "psql", "main", "--", "-Atc", "SHOW port") == f"{port}\n"
        answer(env, "psql", "-c", "SELECT no_such_thing", code=1)
        ignored = answer(env, "pg", "start", "n", "--lsn", "0/28", code=1)
        assert "--lsn ignored: n exists" in ignored.stderr
        assert "The node is already running" in ignored.stderr
        (row,) = [n for n in document(env, "pg", "list") if n["node"] == "n"]
        assert (row["port"], row["branch"], row["kind"]) == (port, "main", "read-write")
        os.kill(int((directory / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        wait_until(lambda: status_of(env, "n") == "crashed", what="the crash to be seen")
        assert "postgres n has crashed" in said(env, "status", code=3)
        said(env, "pg", "start", "n")
        env.pageserver.stop()
        down = answer(env, "pg", "list")
        assert "Failed to load timeline info: " in down.stderr
        assert down.stdout.splitlines()[1].split("\t")[4:] == ["?", "", "running"]
    finally:
        said(env, "pg", "stop", "n")
    assert status_of(env, "n") == "stopped"
    assert f"Destroying postgres data directory '{directory}'" in said(
        env, "pg", "stop", "n", "--destroy"
    )
    assert document(env, "pg", "list") == []
    assert not directory.exists()


def test_error_chains(zenith_env_builder: ZenithEnvBuilder) -> None:
    """What goes wrong in the pageserver reaches the user, with what was to be done."""
    zenith_env_builder.num_safekeepers = 1
    env = zenith_env_builder.init_start()
    past = answer(env, "pg", "start", "past", "--lsn", "0/28", code=1).stderr
    assert "command failed: page server 'basebackup' command failed" in past
    below = answer(
        env,
        *("timeline", "branch", "--branch-name", "below", "--ancestor-start-lsn", "0/28"),
        code=1,
    ).stderr
    assert below.startswith("command failed: Error: ")
    assert "below" not in dict(env.zenith_cli.list_timelines())
    env.pageserver.stop()
    down = answer(env, "timeline", "list", code=1).stderr.splitlines()
    assert down[0] == (
        "command failed: the pageserver does not answer: is it running? ('zenith start')"
    )
    assert down[2] == "Caused by:"
    assert re.fullmatch(r"    0: cannot reach http://localhost:\d+/v1/.*", down[3])

    toml = env.repo_dir / "pageserver.toml"
    good = toml.read_text()
    toml.write_text(good + "no_such_setting = 5\n")
    broken = answer(env, "pageserver", "start", code=1).stderr
    assert "no_such_setting" in broken, "the daemon's own words"
    assert "pageserver start failed: Pageserver failed to start. See " in broken
    toml.write_text(good)
    env.pageserver.start()
    wrong = answer(
        env, *("pageserver", "restart", "--pageserver-config-override", "gc_horizon='x'"), code=1
    )
    env.pageserver.running = False
    assert "gc_horizon" in wrong.stderr
    assert "pageserver start failed: " in wrong.stderr
    config = (env.repo_dir / "config").read_text()
    (env.repo_dir / "config").write_text("[pageserver\n")
    unreadable = answer(env, "pg", "list", code=1).stderr
    assert unreadable.startswith("Error: Error loading config\n\nCaused by:\n    0: cannot parse")
    (env.repo_dir / "config").write_text(config)
