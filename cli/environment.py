"""`zenith init`, `start`, `stop`: the whole environment."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from control_plane import auth, daemons, membership
from control_plane.compute import ComputeControlPlane, stop_supervisor
from control_plane.environment import daemon_environment
from control_plane.errors import ControlPlaneError
from control_plane.local_env import (
    CONFIG_FILE,
    DEFAULT_BRANCH,
    PUBLIC_KEY_FILE,
    LocalEnv,
    SafekeeperConf,
    repo_dir_from_environment,
    toml_string,
    unknown_keys,
)
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.os_user import postgres_user
from zenith_utils.reachable import check_reachable

from .context import (
    TIMELINE_ID,
    CliContext,
    override_option,
    pass_context,
    render_error,
    say,
    stop_mode_option,
)
from .progress import progress
from .tables import warn


@click.command()
@click.option("--config", "config", type=click.Path(path_type=Path), help="Config to start from.")
@click.option("--timeline-id", type=TIMELINE_ID, help="Id of the first timeline; default: random.")
@override_option
def init(config: Path | None, timeline_id: TimelineId | None, overrides: tuple[str, ...]) -> None:
    """Make a new environment with a tenant and its branch main.

    Without a config: a pageserver at ports 64000 and 9898 and one safekeeper at 5454 and 7676. A
    config names what differs, for instance three safekeepers:

    \b
    [[safekeepers]]
    id = 1
    pg_port = 5454
    http_port = 7676
    ... and so on for 2 and 3

    \b
    zenith init
    ZENITH_REPO_DIR=/srv/zenith zenith init --config three-safekeepers.toml
    """
    with progress("making the environment"):
        create_environment(config, timeline_id, overrides)


def create_environment(
    config: Path | None, timeline_id: TimelineId | None, overrides: tuple[str, ...]
) -> LocalEnv:
    """Make the repository directory of a new environment; raises ControlPlaneError.

    Nothing is left behind where it fails.
    """
    from concurrent.futures import ThreadPoolExecutor

    repo_dir = repo_dir_from_environment()
    if repo_dir.exists():
        raise ControlPlaneError("Failed to initialize zenith repository") from _exists(repo_dir)
    env = _initial_environment(config, repo_dir)
    _check_programs(env)
    try:
        _make_reachable(repo_dir)
    except FileExistsError:
        # Another init has made it since we looked: it is not ours to remove.
        raise ControlPlaneError("Failed to initialize zenith repository") from _exists(repo_dir)
    try:
        check_reachable(repo_dir)
        if env.default_tenant_id is None:
            env.default_tenant_id = TenantId.generate()
        timeline_id = timeline_id or TimelineId.generate()
        env.branches = {DEFAULT_BRANCH: {env.default_tenant_id: timeline_id}}
        for conf in env.safekeepers:
            env.safekeeper_dir(conf.id).mkdir(parents=True)
        _make_reachable(repo_dir / "pgdatadirs" / "tenants")
        env.pageserver.auth_type = _auth_type(env, overrides)
        with ThreadPoolExecutor(1) as pool:
            # While the pageserver is at work, which checks that its key is there if it needs one.
            keys = pool.submit(auth.make_keys, env)
            if auth.needs_token(env):
                keys.result()
            _init_pageserver(env, timeline_id, overrides)
            keys.result()
        env.save()
    except BaseException:
        shutil.rmtree(repo_dir, ignore_errors=True)
        raise
    return env


def _make_reachable(path: Path) -> None:
    """Make a directory, and those above it, that Postgres' user gets through whatever the umask.

    Those that exist are not ours to open. Raises FileExistsError, and OSError.
    """
    made = [path, *(part for part in path.parents if not part.exists())]
    other_user = postgres_user() is not None
    path.mkdir(parents=True)
    if other_user:
        for part in made:
            part.chmod(stat.S_IMODE(part.stat().st_mode) | 0o011)


def _exists(repo_dir: Path) -> ControlPlaneError:
    initialized = (repo_dir / CONFIG_FILE).exists()
    return ControlPlaneError(
        f"directory '{repo_dir}' already exists. Perhaps already initialized?"
        + ("" if initialized else " It holds no config: if an init was killed, remove it")
    )


def _initial_environment(config: Path | None, repo_dir: Path) -> LocalEnv:
    if config is None:
        env = LocalEnv.parse("", repo_dir)
        env.safekeepers = [SafekeeperConf()]
        return env
    try:
        text = config.read_text(encoding="utf-8")
    except OSError as e:
        raise ControlPlaneError(f"cannot read the config {config}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ControlPlaneError(f"the config {config} is not a text in UTF-8") from e
    env = LocalEnv.parse(text, repo_dir)
    strange = unknown_keys(tomllib.loads(text))
    if strange:
        warn(f"ignored, because they mean nothing: {', '.join(strange)} in {config}")
    # What another environment's safekeepers were says nothing about new ones.
    for conf in env.safekeepers:
        conf.instance = ""
    env.safekeeper_generation, env.earlier_generations = 0, []
    return env


def _check_programs(env: LocalEnv) -> None:
    if not (env.pg_distrib_dir / "bin" / "postgres").exists():
        raise ControlPlaneError("Failed to create zenith configuration") from ControlPlaneError(
            f"Can't find postgres binary at {env.pg_distrib_dir}"
        )
    for name in ("pageserver", "safekeeper"):
        if not (env.zenith_distrib_dir / name).exists():
            raise ControlPlaneError("Failed to create zenith configuration") from ControlPlaneError(
                f"Can't find binary '{name}' in zenith distrib dir '{env.zenith_distrib_dir}'"
            )


def _auth_type(env: LocalEnv, overrides: tuple[str, ...]) -> str:
    """The pageserver's: an override has the last word. Bad ones it will complain about itself."""
    found: object = env.pageserver.auth_type
    for text in overrides:
        with suppress(tomllib.TOMLDecodeError):
            found = tomllib.loads(text.strip()).get("auth_type", found)
    return found if isinstance(found, str) else env.pageserver.auth_type


def _init_pageserver(env: LocalEnv, timeline_id: TimelineId, overrides: tuple[str, ...]) -> None:
    conf = env.pageserver
    settings = [
        f"pg_distrib_dir={toml_string(env.pg_distrib_dir)}",
        f"auth_type={toml_string(conf.auth_type)}",
        f"listen_http_addr={toml_string(conf.listen_http_addr)}",
        f"listen_pg_addr={toml_string(conf.listen_pg_addr)}",
        f"id={conf.id}",
        *overrides,
    ]
    if auth.needs_token(env):
        settings.append(f"auth_validation_public_key_path='{PUBLIC_KEY_FILE}'")
    command = [str(env.zenith_distrib_dir / "pageserver"), "--init", "-D", str(env.repo_dir)]
    for text in settings:
        command += ["-c", text]
    command += ["--create-tenant", str(env.default_tenant_id)]
    command += ["--initial-timeline-id", str(timeline_id)]
    done = subprocess.run(
        command,
        env=daemon_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ControlPlaneError(
            "pageserver init failed: init invocation failed, "
            f"exit status: {done.returncode}\nStdout: {done.stdout}\nStderr: {done.stderr}"
        )


@click.command()
@override_option
@pass_context
def start(ctx: CliContext, overrides: tuple[str, ...]) -> None:
    """Start the pageserver and every safekeeper that does not run yet.

    Compute nodes are started one by one: see `zenith pg start`.

    \b
    zenith start
    zenith start --pageserver-config-override "wait_lsn_timeout='5 s'"
    """
    start_environment(ctx.env, overrides)


def start_environment(env: LocalEnv, overrides: tuple[str, ...] = ()) -> None:
    """Start all daemons; raises ControlPlaneError naming the one that fails.

    A safekeeper that cannot start does not keep the others from it: they may be a majority.
    """
    start_pageserver(env, overrides)
    failures: list[tuple[int, ControlPlaneError]] = []
    for conf in list(env.safekeepers):
        try:
            start_safekeeper(env, conf.id)
        except ControlPlaneError as e:
            failures.append((conf.id, e))
    if failures:
        said = "\n".join(f"safekeeper '{node_id}' start failed: {e}" for node_id, e in failures)
        raise ControlPlaneError(said) from failures[0][1].__cause__


def start_pageserver(env: LocalEnv, overrides: tuple[str, ...] = ()) -> None:
    """Start the pageserver; raises ControlPlaneError."""
    daemon = daemons.pageserver(env, overrides)
    try:
        if overrides and daemon.running_pid() is not None:
            raise ControlPlaneError(
                "it is already running, and overrides are for a start: use `pageserver restart`"
            )
        with progress("starting the pageserver"):
            daemon.start(say)
    except ControlPlaneError as e:
        raise ControlPlaneError(f"pageserver start failed: {e}") from e.__cause__


def start_safekeeper(env: LocalEnv, node_id: int) -> None:
    """Start one safekeeper; raises ControlPlaneError."""
    conf = env.safekeeper(node_id)
    membership.check_disk(env, node_id)
    say(f"initializing for sk {node_id} for {conf.http_port}")
    with progress(f"starting safekeeper {node_id}"):
        daemons.safekeeper(env, node_id).start(say)
    membership.record_instance(env, node_id)


@click.command()
@stop_mode_option
@pass_context
def stop(ctx: CliContext, mode: str) -> None:
    """Stop all computes, the pageserver and the safekeepers.

    What cannot be stopped is reported, and the rest is stopped all the same.

    \b
    zenith stop
    zenith stop -m immediate
    """
    stop_environment(ctx.env, immediate=mode == "immediate")


def stop_environment(env: LocalEnv, *, immediate: bool) -> None:
    """Stop everything. What fails is reported, and the rest is stopped all the same."""
    for name, state_dir in ComputeControlPlane(env).living():
        with _reported(f"postgres {name} stop failed"), progress(f"stopping postgres {name}"):
            stop_supervisor(name, state_dir, say, immediate=False)
    with _reported("pageserver stop failed"), progress("stopping the pageserver"):
        daemons.pageserver(env).stop(say, immediate=immediate)
    for conf in env.safekeepers:
        what = f"safekeeper {conf.id}"
        with _reported(f"{what} stop failed"), progress(f"stopping {what}"):
            daemons.safekeeper(env, conf.id).stop(say, immediate=immediate)
    for node_id, process in daemons.removed_safekeepers(env).items():
        what = f"safekeeper {node_id}, which was removed:"
        with _reported(f"{what} stop failed"), progress(f"stopping safekeeper {node_id}"):
            process.stop(say, immediate=immediate)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except (ControlPlaneError, OSError) as e:
        failed = ControlPlaneError(f"{what}: {e}")
        failed.__cause__ = e.__cause__
        warn(render_error(failed))
