"""Environments whose pageserver wants tokens: everything works there, and nothing shows a token."""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import subprocess
import tomllib
import uuid
from pathlib import Path

import psycopg2
import pytest
import requests
from fixtures.auth_keys import AuthKeys
from fixtures.http_clients import ZenithPageserverApiException
from fixtures.page_verifier import verify_pages
from fixtures.postgres import Postgres
from fixtures.restored_datadir import check_restored_datadir_content
from fixtures.utils import lsn_from_hex, lsn_to_hex, wait_until
from fixtures.zenith_env import Safekeeper, SafekeeperPort, ZenithEnv, ZenithEnvBuilder

MISMATCH = "Tenant id mismatch. Permission denied"
NO_MANAGEMENT = "Attempt to access management api with tenant scope. Permission denied"
FLUSH_LSN = "SELECT pg_current_wal_flush_lsn()::text"


@pytest.fixture(params=[0, 3], ids=lambda n: f"{n} safekeepers")
def env(zenith_env_builder: ZenithEnvBuilder, request: pytest.FixtureRequest) -> ZenithEnv:
    """A running environment that wants tokens and logs all it can."""
    return started(zenith_env_builder, request.param)


def started(builder: ZenithEnvBuilder, safekeepers: int) -> ZenithEnv:
    builder.num_safekeepers = safekeepers
    builder.pageserver_auth_enabled = True
    builder.rust_log_override = "debug"
    return builder.init_start()


def tokens_of(env: ZenithEnv) -> list[str]:
    """The tokens that an environment with one tenant uses."""
    return [
        env.auth_keys.generate_management_token(),
        env.auth_keys.generate_tenant_token(env.initial_tenant.hex),
    ]


def main_timeline(env: ZenithEnv) -> uuid.UUID:
    return uuid.UUID(dict(env.zenith_cli.list_timelines())["main"])


def disk_consistent_lsn(env: ZenithEnv, timeline: uuid.UUID) -> int:
    client = env.pageserver.http_client(env.management_token)
    local = client.timeline_detail(env.initial_tenant, timeline)["local"]
    return lsn_from_hex(local["disk_consistent_lsn"])


def calls_pageserver(safekeeper: Safekeeper) -> bool:
    """Whether a safekeeper asks a pageserver to connect, or has a stream to one."""
    text = requests.get(f"http://localhost:{safekeeper.port.http}/metrics", timeout=10).text
    return re.search(r"^safekeeper_callmemaybe_subscriptions 0$", text, re.MULTILINE) is None


def rows(pg: Postgres) -> int:
    ((count,),) = pg.safe_psql("SELECT count(*) FROM t")
    return int(count)


def add_rows(pg: Postgres, count: int = 10_000) -> int:
    """Insert rows; the LSN up to which they are committed."""
    pg.safe_psql("CREATE TABLE IF NOT EXISTS t (i int, filler text DEFAULT repeat('x', 100))")
    pg.safe_psql(f"INSERT INTO t SELECT generate_series(1, {count})")
    return lsn_from_hex(pg.safe_psql(FLUSH_LSN)[0][0])


# What the tokens of clients open


def test_pageserver_auth(zenith_env_builder: ZenithEnvBuilder) -> None:
    """What other implementations' clients rely on: who may do what, and the words of refusals."""
    env = started(zenith_env_builder, 0)
    ps, tenant = env.pageserver, env.initial_tenant
    management = env.auth_keys.generate_management_token()
    own = env.auth_keys.generate_tenant_token(tenant.hex)
    stranger = env.auth_keys.generate_tenant_token(uuid.uuid4().hex)

    for token in (own, management):
        ps.safe_psql("set FOO", password=token)
        made = ps.http_client(token).timeline_create(
            tenant, ancestor_timeline_id=main_timeline(env)
        )
        assert made["local"]["ancestor_timeline_id"] == main_timeline(env).hex

    ancestor = main_timeline(env)
    with pytest.raises(ZenithPageserverApiException, match=f"^Forbidden: {MISMATCH}$"):
        ps.http_client(stranger).timeline_create(tenant, ancestor_timeline_id=ancestor)
    with pytest.raises(ZenithPageserverApiException, match=f"^Forbidden: {NO_MANAGEMENT}$"):
        ps.http_client(own).tenant_create()
    with pytest.raises(ZenithPageserverApiException, match=r"^Unauthorized: missing auth"):
        ps.http_client().tenant_list()
    assert ps.http_client(management).tenant_create() in {
        uuid.UUID(t["id"]) for t in ps.http_client(management).tenant_list()
    }
    ps.http_client().check_status()
    for password in ("", "nonsense"):
        with pytest.raises(psycopg2.OperationalError, match=r"Not enough segments|no password"):
            ps.safe_psql("set FOO", password=password)
    assert ps.http_client(own).get_metrics()
    with pytest.raises(requests.HTTPError, match="401"):
        ps.http_client().get_metrics()


def test_data_of_another_tenant_is_out_of_reach(zenith_env_builder: ZenithEnvBuilder) -> None:
    """Of a tenant that has data, somebody with another tenant's token gets to see none."""
    env = started(zenith_env_builder, 0)
    add_rows(env.postgres.create_start("main"))
    victim, timeline = env.initial_tenant.hex, main_timeline(env)
    other = env.zenith_cli.create_tenant()
    other_timeline = env.zenith_cli.create_timeline("mine", other)
    token = env.auth_keys.generate_tenant_token(other.hex)

    client = env.pageserver.http_client(token)
    with pytest.raises(ZenithPageserverApiException, match=MISMATCH):
        client.timeline_list(env.initial_tenant)
    with pytest.raises(ZenithPageserverApiException, match=MISMATCH):
        client.timeline_detail(env.initial_tenant, timeline)
    with pytest.raises(ZenithPageserverApiException):
        client.timeline_create(other, ancestor_timeline_id=timeline)

    with contextlib.closing(env.pageserver.connect(password=token)) as conn, conn.cursor() as cur:
        for command in ("basebackup", "pagestream", "callmemaybe", "do_gc", "checkpoint"):
            rest = " host=127.0.0.1" if command == "callmemaybe" else ""
            with pytest.raises(psycopg2.Error, match=MISMATCH):
                cur.execute(f"{command} {victim} {timeline.hex}{rest}")
            with pytest.raises(psycopg2.Error, match=r"not found|local timeline"):
                cur.execute(f"{command} {other.hex} {timeline.hex}{rest}")
        cur.execute(f"checkpoint {other.hex} {other_timeline.hex}")


# Computes


def test_computes(env: ZenithEnv) -> None:
    """A node starts, works, is destroyed and made again; with its branches and read-only nodes."""
    with_safekeepers = bool(env.safekeepers)
    pg = env.postgres.create_start("main", "main")
    ((connstr,),) = pg.safe_psql("SHOW zenith.page_server_connstring")
    address = f"localhost:{env.pageserver.service_port.pg}"
    assert connstr == f"postgresql://no_user:$ZENITH_AUTH_TOKEN@{address}"
    add_rows(pg)
    lsn = pg.safe_psql(FLUSH_LSN)[0][0]
    add_rows(pg)

    if with_safekeepers:
        standby = env.postgres.create_start("main", "standby", hot_standby=True)
        wait_until(lambda: rows(standby) == 20_000, what="the standby to show everything")
    past = env.postgres.create_start("main", "past", lsn=lsn)
    assert rows(past) == 10_000
    env.zenith_cli.create_branch("fix", "main", ancestor_start_lsn=lsn)
    fix = env.postgres.create_start("fix")
    add_rows(fix, 1)
    assert rows(fix) == 10_001
    no_token_shows(env, pg)

    # A clean stop and a death; then the node is gone for good, and a new one takes its place.
    pg.stop().start()
    assert rows(pg) == 20_000
    if with_safekeepers:
        pg.kill()
    pg.stop_and_destroy().create_start("main", "main")
    assert rows(pg) == 20_000
    add_rows(pg)
    verify_pages(pg)


def test_restored_data_directory(
    zenith_env_builder: ZenithEnvBuilder, test_output_dir: str
) -> None:
    """All of a compute is compared with storage, which wants a token, as often as one likes."""
    env = started(zenith_env_builder, 0)
    pg = env.postgres.create_start("main")
    for _ in range(2):
        add_rows(pg, 100)
        check_restored_datadir_content(test_output_dir, env, pg)
        pg.start()


def test_wal_reaches_the_pageserver_without_a_compute(
    zenith_env_builder: ZenithEnvBuilder,
) -> None:
    """Safekeepers log in with the token of the compute that is gone, also after their restart."""
    env = started(zenith_env_builder, 2)
    timeline = main_timeline(env)
    pg = env.postgres.create_start("main")
    add_rows(pg, 1000)
    # The blocks that are written next are here: nothing is read from a pageserver that is away.
    env.pageserver.kill()
    lsn = add_rows(pg, 1000)
    pg.stop()
    for safekeeper in env.safekeepers:
        safekeeper.stop().start()
    deliveries = list((env.repo_dir / "safekeepers").rglob("safekeeper.delivery"))
    assert len(deliveries) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in deliveries} == {0o600}
    env.pageserver.start()
    wait_until(lambda: disk_consistent_lsn(env, timeline) >= lsn, what="the WAL to be durable")
    # And then nobody asks for anything any more.
    wait_until(
        lambda: not any(calls_pageserver(s) for s in env.safekeepers),
        what="the safekeepers to come to rest",
    )
    assert rows(pg.start()) == 2000


def test_change_of_safekeepers(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A branch without a compute settles on new safekeepers, one with a compute goes on."""
    env = started(zenith_env_builder, 3)
    pg = env.postgres.create_start("main")
    lsn = add_rows(pg, 100)
    env.zenith_cli.create_branch("rest", ancestor_start_lsn=lsn_to_hex(lsn))
    rest = env.postgres.create_start("rest")
    rest.stop()
    env.safekeepers[2].kill()
    port = SafekeeperPort(pg=env.port_distributor.get_port(), http=env.port_distributor.get_port())
    options = ["--pg-port", str(port.pg), "--http-port", str(port.http)]
    said = env.zenith_cli.raw_cli(["safekeeper", "replace", "3", *options]).stdout
    env.safekeepers[2] = Safekeeper(env, port, id=4, running=True)
    assert "branch rest now has safekeepers of generation 1" in said
    pg.stop().start()
    rest.start()
    for node in (pg, rest):
        add_rows(node, 1)
        assert rows(node) == 101


# Nothing shows a token


def no_token_shows(env: ZenithEnv, pg: Postgres) -> None:
    """Neither files that others may read, nor processes, nor SQL, nor HTTP."""
    secrets = tokens_of(env)
    assert env.zenith_cli.raw_cli(["token"]).stdout.strip() in secrets

    def check(text: str, where: object) -> None:
        assert not any(secret in text for secret in secrets), f"a token in {where}"

    def known_by() -> int:
        """How many times safekeepers have the token of the tenant: each for each timeline."""
        files = (env.repo_dir / "safekeepers").rglob("safekeeper.delivery")
        return sum(secrets[1] in path.read_text(errors="replace") for path in files)

    # A majority is enough for a compute to start: the last one may be told later.
    wait_until(lambda: known_by() == 2 * len(env.safekeepers), what="all to have the token")
    for path in env.repo_dir.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # files are replaced meanwhile
            if not path.is_file() or path.is_symlink():
                continue
            config = path.parent == env.repo_dir and path.name == "config"
            # Also what is to replace it.
            if config or path.name.startswith("safekeeper.delivery"):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
            else:
                check(path.read_text(errors="replace"), path)

    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                check((process / "cmdline").read_text(errors="replace"), process / "cmdline")
                if (process / "exe").readlink().name == "postgres":
                    check((process / "environ").read_text(errors="replace"), process / "environ")

    queries = (
        "SELECT * FROM pg_settings",
        "SELECT * FROM pg_file_settings",
        "SELECT * FROM pg_stat_activity",
        "SELECT encode(pg_read_binary_file('/proc/self/environ'), 'escape')",
    )
    for query in queries:
        check(str(pg.safe_psql(query)), query)
    # Programs that the server runs inherit its environment.
    pg.safe_psql("CREATE TABLE inherited (line text)")
    pg.safe_psql("COPY inherited FROM PROGRAM 'env'")
    inherited = str(pg.safe_psql("SELECT * FROM inherited"))
    assert "PATH=" in inherited
    check(inherited, "the environment of the server's children")

    for safekeeper in env.safekeepers:
        base = f"http://localhost:{safekeeper.port.http}"
        timeline = f"{env.initial_tenant.hex}/{main_timeline(env).hex}"
        for path_name in ("/v1/status", "/metrics", f"/v1/timeline/{timeline}"):
            check(requests.get(base + path_name, timeout=10).text, path_name)
    client = env.pageserver.http_client(env.management_token)
    check(str(client.timeline_list(env.initial_tenant)), "timelines")
    check(client.get_metrics(), "metrics")


# Keys


def test_keys_of_a_new_environment(zenith_env_builder: ZenithEnvBuilder) -> None:
    """They are made whether authentication is on or not, so that it can be switched on later."""
    env = zenith_env_builder.init()
    private, public = (env.repo_dir / f"auth_{kind}_key.pem" for kind in ("private", "public"))
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert public.read_text().startswith("-----BEGIN PUBLIC KEY-----")
    said = openssl("rsa", "-in", str(private), "-noout", "-text")
    assert "2048 bit" in said
    assert openssl("rsa", "-in", str(private), "-pubout") == public.read_text()
    config = tomllib.loads((env.repo_dir / "config").read_text())
    assert config["private_key_path"] == "auth_private_key.pem"
    assert config["pageserver"]["auth_token"] == env.auth_keys.generate_management_token()
    assert stat.S_IMODE((env.repo_dir / "config").stat().st_mode) == 0o600
    assert "auth_validation" not in (env.repo_dir / "pageserver.toml").read_text().split("\n\n")[-1]


def test_auth_is_switched_on_later(zenith_env_builder: ZenithEnvBuilder) -> None:
    """As docs/authentication.md says; nodes of before go on with it."""
    env = zenith_env_builder.init_start()
    pg = env.postgres.create_start("main")
    add_rows(pg, 10)
    env.stop()
    config = env.repo_dir / "config"
    config.write_text(config.read_text().replace("'Trust'", "'ZenithJWT'"))
    toml = env.repo_dir / "pageserver.toml"
    toml.write_text(re.sub(r'auth_type = "Trust"', 'auth_type = "ZenithJWT"', toml.read_text()))
    env.start()
    with pytest.raises(ZenithPageserverApiException, match="missing authorization header"):
        env.pageserver.http_client().tenant_list()
    assert rows(pg.start()) == 10


def test_own_private_key(zenith_env_builder: ZenithEnvBuilder, test_output_dir: str) -> None:
    """One that is there already is used where it is, and its public key is written."""
    own = Path(test_output_dir) / "own.pem"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(openssl("genrsa", "2048"))
    env = zenith_env_builder.init()
    config = (env.repo_dir / "config").read_text()
    shutil.rmtree(env.repo_dir)
    config = config.replace("'Trust'", "'ZenithJWT'")
    env.zenith_cli.init(config.replace("'auth_private_key.pem'", f"'{own}'"))
    env.start()
    assert not (env.repo_dir / "auth_private_key.pem").exists()
    assert env.zenith_cli.list_tenants().stdout.startswith(env.initial_tenant.hex)
    public = (env.repo_dir / "auth_public_key.pem").read_bytes()
    token = AuthKeys(public, own.read_bytes()).generate_tenant_token(env.initial_tenant.hex)
    assert env.pageserver.http_client(token).timeline_list(env.initial_tenant)
    add_rows(env.postgres.create_start("main"), 1)


def test_keys_are_changed(zenith_env_builder: ZenithEnvBuilder) -> None:
    """With both public keys in the file for a while, nobody who has a token is turned away."""
    env = started(zenith_env_builder, 1)
    old = tokens_of(env)
    timeline = main_timeline(env)
    pg = env.postgres.create_start("main")
    lsn = add_rows(pg, 10)

    private, public = (env.repo_dir / f"auth_{kind}_key.pem" for kind in ("private", "public"))
    private.write_text(openssl("genrsa", "2048"))
    new_public = openssl("rsa", "-in", str(private), "-pubout")
    public.write_text(public.read_text() + new_public)
    del env.auth_keys
    new = tokens_of(env)
    env.pageserver.stop().start()
    for token in (*old, *new):
        assert env.pageserver.http_client(token).timeline_list(env.initial_tenant)
    config = env.repo_dir / "config"
    config.write_text(config.read_text().replace(old[0], new[0]))
    # The compute's restart gives the new token to the safekeepers; it is the same pageserver.
    pg.stop().start()
    lsn = add_rows(pg, 10)

    public.write_text(new_public)
    env.pageserver.stop().start()
    with pytest.raises(ZenithPageserverApiException, match="malformed jwt token"):
        env.pageserver.http_client(old[0]).tenant_list()
    assert env.zenith_cli.list_tenants().stdout.startswith(env.initial_tenant.hex)
    lsn = max(lsn, add_rows(pg, 10))
    pg.stop()
    wait_until(lambda: disk_consistent_lsn(env, timeline) >= lsn, what="the WAL to be durable")
    assert rows(pg.start()) == 30


def test_refusals_say_what_helps(zenith_env_builder: ZenithEnvBuilder) -> None:
    """A compute that is not let in does not start, and its command says why."""
    env = started(zenith_env_builder, 0)
    pg = env.postgres.create("main")
    private = env.repo_dir / "auth_private_key.pem"
    good = private.read_text()
    assert pg.node_name is not None

    def refusal() -> str:
        with pytest.raises(Exception, match="command failed") as error:
            env.zenith_cli.pg_start(str(pg.node_name))
        return str(error.value)

    private.write_text(openssl("genrsa", "2048"))
    assert "malformed jwt token" in refusal()
    private.unlink()
    assert f"cannot read the key file '{private}'" in refusal()
    private.write_text(good)
    pg.start()


def test_token_command(zenith_env_builder: ZenithEnvBuilder) -> None:
    """`zenith token` prints a token and nothing else, of the scope and life that is asked for."""
    env = started(zenith_env_builder, 0)
    other = env.zenith_cli.create_tenant()

    def token(*options: str) -> str:
        said = env.zenith_cli.raw_cli(["token", *options]).stdout
        assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", said)
        return said.strip()

    assert env.pageserver.http_client(token()).tenant_list()
    for options in ((), ("--expires-in", "1 h")):
        own = env.pageserver.http_client(token("--tenant-id", env.initial_tenant.hex, *options))
        assert own.timeline_list(env.initial_tenant)
        with pytest.raises(ZenithPageserverApiException, match=MISMATCH):
            own.timeline_list(other)
    short = env.pageserver.http_client(token("--expires-in", "1 s"))

    def expired() -> bool:
        try:
            short.tenant_list()
        except ZenithPageserverApiException as e:
            return str(e) == "Unauthorized: jwt token has expired"
        return False

    wait_until(expired, what="the token to expire")
    for wrong in (["--expires-in", "0 s"], ["--expires-in", "soon"], ["--tenant-id", "main"]):
        done = env.zenith_cli.raw_cli(["token", *wrong], check_return_code=False)
        assert (done.returncode, done.stdout) == (2, "")


def openssl(*arguments: str) -> str:
    """Output of the program that keys of other origin come from."""
    return subprocess.run(
        ["openssl", *arguments], capture_output=True, text=True, check=True
    ).stdout
