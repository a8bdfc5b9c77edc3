"""`zenith doctor`: what is wrong with this machine and the environment, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from control_plane.checks import Finding, Result, fail, guarded, machine_checks, ok
from control_plane.environment_checks import default_port_checks, environment_checks
from control_plane.errors import ControlPlaneError
from control_plane.local_env import CONFIG_FILE, LocalEnv, repo_dir_from_environment

from .context import say
from .progress import progress
from .tables import json_option, say_json, say_styled

_STYLES = {Result.WARN: "warning", Result.FAIL: "bad"}


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Check this machine and the environment for what is wrong.

    Each line says ok, warn or fail, what was found, and what to do. Without an environment it
    tells whether `zenith init` would work. Nothing is changed. Exit status 1: something fails.

    \b
    zenith doctor
    zenith doctor --json | jq '.[] | select(.result != "ok")'
    """
    with progress("looking"):
        findings = list(_examine(repo_dir_from_environment()))
    if as_json:
        keys = ("check", "result", "found", "remedy")
        say_json([{key: getattr(f, key) or None for key in keys} for f in findings])
    else:
        for finding in findings:
            _show(finding)
    return 1 if any(finding.result is Result.FAIL for finding in findings) else 0


def _examine(repo_dir: Path) -> Iterator[Finding]:
    if not (repo_dir / CONFIG_FILE).exists():
        yield from machine_checks(None, repo_dir)
        yield ok("config", f"no environment in {repo_dir}: zenith init makes one")
        yield from default_port_checks()
        return
    try:
        env = LocalEnv.load(repo_dir)
    except ControlPlaneError as e:
        yield from machine_checks(None, repo_dir)
        remedy = f"correct {repo_dir / CONFIG_FILE}"
        if isinstance(e.__cause__, OSError):
            remedy = "run zenith as the owner of the environment"
        yield fail("config", f"{e.__cause__}", remedy)
        return
    yield from machine_checks(env, repo_dir)
    yield from guarded("environment", lambda: environment_checks(env))


def _show(finding: Finding) -> None:
    text = f"{finding.result:<5} {finding.check}: {finding.found}"
    if finding.result is Result.OK:
        say(text)
        return
    say_styled(text, _STYLES[finding.result])
    say(f"      -> {finding.remedy}")
