"""Bringing branches without a compute to the present generation of safekeepers.

A walproposer without Postgres is elected, brings new safekeepers up, establishes the generation and
leaves. Where a compute runs, its restart does that: it must not be fenced by us. So none is started
(Compute.start) from where we see that there is none until the walproposer has left.
"""

from __future__ import annotations

import json
import subprocess
import sys

from compute_tools import state
from compute_tools.spec import ComputeSpec, SpecError
from control_plane import membership, node_safekeepers
from control_plane.compute import ComputeControlPlane, Say
from control_plane.environment import compute_environment
from control_plane.local_env import LocalEnv

_TIMEOUT = 30.0


def settle(env: LocalEnv, say: Say) -> None:
    """Establish the present generation where there is WAL and no compute; failures are told."""
    standings = membership.ask_standings(env)
    for key, name in sorted(membership.timeline_names(env, standings.values()).items()):
        if not _is_late(env, key, standings):
            continue
        # Asked again: the branches before this one may have taken long.
        if not _is_late(env, key, membership.ask_standings(env)):
            continue
        with env.settling_branch():
            if key in _with_compute(env):
                continue
            trouble = _establish(env, *key.split("-"))
        say(
            f"branch {name} now has safekeepers of generation {env.safekeeper_generation}"
            if not trouble
            else f"branch {name} goes on with the safekeepers of before until a compute is "
            f"started on it: {trouble}"
        )


def _is_late(env: LocalEnv, key: str, standings: membership.Standings) -> bool:
    """Whether a timeline has WAL, and was not established in the present generation."""
    known = [standing[key] for standing in standings.values() if key in standing]
    late = all(s.established < env.safekeeper_generation for s in known)
    return late and any(s.has_wal for s in known)


def _with_compute(env: LocalEnv) -> set[str]:
    """The timelines, as `<tenant>-<timeline>`, that a living compute writes to."""
    busy = set()
    for _, state_dir in ComputeControlPlane(env).living():
        try:
            spec = ComputeSpec.load(state_dir / state.SPEC_FILE)
        except SpecError:
            continue
        if not spec.read_only:
            busy.add(f"{spec.tenant_id}-{spec.timeline_id}")
    return busy


def _establish(env: LocalEnv, tenant: str, timeline: str) -> str:
    """Why it did not work; empty if it did."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "compute_tools.walproposer", "--settle"),
            *(f"--tenant={tenant}", f"--timeline={timeline}"),
            f"--safekeepers={node_safekeepers.setting(node_safekeepers.own_addresses(env))}",
            f"--membership={json.dumps(membership.membership(env).to_json())}",
        ],
        # Its end of this pipe tells it that we are there.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=compute_environment(),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.wait(_TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        code = process.wait()
        process.stdin.close()
    events = [json.loads(line) for line in process.stdout.read().splitlines()]
    process.stdout.close()
    if code == 0:
        return ""
    messages = [str(event["message"]) for event in events if "message" in event]
    return messages[-1] if messages else f"no election within {_TIMEOUT:.0f} s"
