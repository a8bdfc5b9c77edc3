"""Settings of the pageserver given on the command line: which hold, how long, and which do not."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from fixtures.zenith_env import ZenithEnv, ZenithEnvBuilder


def override(text: str) -> str:
    """The option with which the command takes a setting of the pageserver."""
    return f"--pageserver-config-override={text}"


def stored(env: ZenithEnv) -> dict[str, Any]:
    """What the next start of the pageserver begins with."""
    return tomllib.loads((env.repo_dir / "pageserver.toml").read_text())


def in_force(env: ZenithEnv) -> dict[str, str]:
    """The settings of tenants that hold in the running pageserver."""
    shown = env.zenith_cli.raw_cli(["tenant", "config"]).stdout
    return dict(line.split(": ", 1) for line in shown.splitlines())


def test_init_keeps_and_start_forgets(
    zenith_env_builder: ZenithEnvBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one given wins; what `init` gets stays, what a start gets is gone after it.

    Somebody who tries a setting for one run must not find it in force weeks later, and one who
    initialised with it must not lose it.
    """
    monkeypatch.delenv("ZENITH_PAGESERVER_OVERRIDES", raising=False)
    zenith_env_builder.pageserver_config_override = "gc_horizon=1000; gc_period = '50 s'"
    env = zenith_env_builder.init()
    env.pageserver_config_override = None
    as_initialised = stored(env)
    assert as_initialised["gc_horizon"] == 1000
    assert as_initialised["gc_period"] == "50 s"

    env.pageserver.start([override("gc_horizon=2000"), override("gc_horizon=3000")])
    assert in_force(env)["gc_horizon"] == "3000"
    assert in_force(env)["gc_period"] == "50s"
    env.zenith_cli.raw_cli(["pageserver", "restart", override("gc_period='40 s'")])
    assert in_force(env)["gc_horizon"] == "1000"
    assert in_force(env)["gc_period"] == "40s"
    env.pageserver.stop()
    # `zenith start` takes them, too.
    env.zenith_cli.raw_cli(["start", override("gc_horizon=4000")])
    env.pageserver.running = True
    assert in_force(env)["gc_horizon"] == "4000"

    # A tenant's own setting is nobody's default.
    env.zenith_cli.raw_cli(["tenant", "config", "-c", "gc_horizon:5000"])
    env.pageserver.stop()
    env.pageserver.start([override("gc_horizon=6000")])
    assert in_force(env)["gc_horizon"] == "5000 (of this tenant)"
    assert stored(env) == as_initialised


def test_overrides_of_a_whole_test_run(
    zenith_env_builder: ZenithEnvBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZENITH_PAGESERVER_OVERRIDES holds for every test, save what a test itself says.

    It is how somebody runs all tests with another setting: a variable that did nothing would let
    them believe that it was tested.
    """
    monkeypatch.setenv("ZENITH_PAGESERVER_OVERRIDES", "gc_horizon=7000; gc_period='30 s';")
    zenith_env_builder.pageserver_config_override = "gc_horizon=8000"
    env = zenith_env_builder.init_start()
    assert in_force(env)["gc_horizon"] == "8000"
    assert in_force(env)["gc_period"] == "30s"
    assert stored(env)["gc_period"] == "30 s"
    monkeypatch.setenv("ZENITH_PAGESERVER_OVERRIDES", "gc_period='20 s'")
    env.pageserver.stop().start()
    assert in_force(env)["gc_horizon"] == "8000"
    assert in_force(env)["gc_period"] == "20s"


# With what the pageserver says of each.
BAD = {
    "id=10": "node id can only be set during pageserver init and cannot be overridden",
    "no_such_key=1": "unrecognized pageserver option 'no_such_key'",
    "nonsense": "Option 'nonsense' could not be parsed as a toml document",
    "gc_horizon='much'": "configure option gc_horizon is not an integer",
    "gc_horizon=-1": "configure option gc_horizon cannot be negative",
    "pg_distrib_dir=1": "configure option pg_distrib_dir is not a string",
    "gc_period='often'": "gc_period",
    "listen_pg_addr='nowhere'": "listen_pg_addr",
    "auth_type='Honour'": "auth_type",
    "remote_storage={}": "no 'local_path' nor 'bucket_name' option",
    "pg_distrib_dir='/nowhere'": "Can't find postgres binary at /nowhere",
}


def test_bad_overrides_are_refused(zenith_env_builder: ZenithEnvBuilder) -> None:
    """The command fails with the pageserver's own words, and changes nothing.

    A typo that was taken for a setting, or one whose reason stands only in some log, would cost its
    user hours; another node id would let two pageservers pass for one.
    """
    zenith_env_builder.pageserver_config_override = None
    env = zenith_env_builder.init()
    before = stored(env)
    for text, reason in BAD.items():
        done = env.zenith_cli.raw_cli(
            ["pageserver", "start", override(text)], check_return_code=False
        )
        assert done.returncode == 1, text
        assert reason in done.stderr, (text, done.stderr)
        assert "pageserver start failed" in done.stderr
        assert "Traceback" not in done.stderr
        assert stored(env) == before
    assert not (env.repo_dir / "pageserver.pid").exists()
    env.start()
    env.pageserver.http_client().check_status()


def test_bad_overrides_at_init(zenith_env_builder: ZenithEnvBuilder) -> None:
    """`init` with a bad setting fails with the reason and leaves nothing in the way of a good one.

    Else the second attempt would be told that the directory exists already.
    """
    zenith_env_builder.pageserver_config_override = "no_such_key=1"
    with pytest.raises(Exception, match="unrecognized pageserver option 'no_such_key'"):
        zenith_env_builder.init()
    assert not Path(zenith_env_builder.repo_dir, "config").exists()
    zenith_env_builder.pageserver_config_override = None
    env = zenith_env_builder.init_start()
    assert len(env.zenith_cli.list_timelines()) == 1
