"""A pageserver that wants tokens: who is let in over HTTP and libpq, and what each may do there."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import requests
from batch_unit.auth_tokens import MANAGEMENT, bad_tokens, key, token, write_public_key
from batch_unit.pageserver_support import Pageserver, scratch_directory

from pageserver.http.auth import PUBLIC_URIS
from pageserver.http.routes import routes
from pageserver.page_service import PageServiceHandler
from zenith_utils import jwt_tokens
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.pq_client import PqConnection, PqError, connect

MISSING = "Unauthorized: missing authorization header"
MISMATCH = "Tenant id mismatch. Permission denied"
NO_MANAGEMENT = "Attempt to access management api with tenant scope. Permission denied"
TENANT_PATH = "/v1/tenant/{tenant_id}"
TIMELINE_PATH = TENANT_PATH + "/timeline/{timeline_id}"


class Needs(Enum):
    """What a route or command needs of its caller."""

    NOTHING = "nothing"
    TOKEN = "any valid token"
    TENANT = "access to the tenant it names"
    MANAGEMENT = "access to everything"


# Every route. One that is new belongs here, after a thought about who may use it.
ROUTES = {
    ("GET", "/v1/status"): Needs.NOTHING,
    ("GET", "/swagger.yml"): Needs.NOTHING,
    ("GET", "/v1/doc"): Needs.NOTHING,
    ("GET", "/metrics"): Needs.TOKEN,
    ("GET", "/v1/tenant"): Needs.MANAGEMENT,
    ("POST", "/v1/tenant"): Needs.MANAGEMENT,
    ("PUT", "/v1/tenant/config"): Needs.TENANT,
    ("GET", TENANT_PATH + "/config"): Needs.TENANT,
    ("GET", TENANT_PATH + "/timeline"): Needs.TENANT,
    ("POST", TENANT_PATH + "/timeline"): Needs.TENANT,
    ("GET", TIMELINE_PATH): Needs.TENANT,
    ("GET", TIMELINE_PATH + "/get_lsn_by_timestamp"): Needs.TENANT,
    ("POST", TIMELINE_PATH + "/attach"): Needs.TENANT,
    ("POST", TIMELINE_PATH + "/detach"): Needs.TENANT,
    ("POST", TIMELINE_PATH + "/lsn_lease"): Needs.TENANT,
    ("PUT", TIMELINE_PATH + "/lsn_lease/{lease_id}"): Needs.TENANT,
    ("DELETE", TIMELINE_PATH + "/lsn_lease/{lease_id}"): Needs.TENANT,
}

# Every command of the page service, the same way.
COMMANDS = {
    "set": Needs.TOKEN,
    "pagestream": Needs.TENANT,
    "basebackup": Needs.TENANT,
    "callmemaybe": Needs.TENANT,
    "checkpoint": Needs.TENANT,
    "compact": Needs.TENANT,
    "do_gc": Needs.TENANT,
    "wal_position": Needs.TENANT,
}


class Client:
    """Requests to a pageserver with any credentials."""

    def __init__(self, server: Pageserver) -> None:
        self.server = server
        self.management = token(MANAGEMENT)

    def http(
        self, method: str, path: str, auth: str | None, body: object = None
    ) -> requests.Response:
        """One request, with a text as its Authorization header."""
        headers = {} if auth is None else {"Authorization": auth}
        url = f"http://127.0.0.1:{self.server.http_port}{path}"
        return requests.request(method, url, json=body, headers=headers, timeout=30)

    @contextlib.contextmanager
    def session(self, password: str | None) -> Iterator[PqConnection]:
        """A connection to the page service, with a password. Raises PqError."""
        port = self.server.pg_port
        with contextlib.closing(
            connect("127.0.0.1", port, user="no_user", password=password, timeout=10)
        ) as conn:
            yield conn


class Guarded(Client):
    """A pageserver that wants tokens, with two tenants, each with a timeline."""

    def __init__(self, server: Pageserver) -> None:
        super().__init__(server)
        self.tenant, self.timeline = self._create()
        self.other, self.other_timeline = self._create()
        self.own = token({"scope": "tenant", "tenant_id": str(self.tenant)})
        self.others = token({"scope": "tenant", "tenant_id": str(self.other)})

    def _create(self) -> tuple[TenantId, TimelineId]:
        header = f"Bearer {self.management}"
        tenant = self.http("POST", "/v1/tenant", header, {}).json()
        info = self.http("POST", f"/v1/tenant/{tenant}/timeline", header, {}).json()
        return TenantId.parse(tenant), TimelineId.parse(info["timeline_id"])


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with scratch_directory() as path:
        public = write_public_key(path / "public.pem")
        server = Pageserver(
            path / "ps",
            "wait_lsn_timeout='1 s'",
            "auth_type='ZenithJWT'",
            f"auth_validation_public_key_path='{public}'",
        )
        server.start()
        try:
            yield Guarded(server)
        finally:
            server.stop()


def said(response: requests.Response) -> tuple[int, str]:
    return response.status_code, response.json()["msg"]


# HTTP


def test_every_route_is_in_the_table() -> None:
    served = {(route.method, route.path) for route in routes(MagicMock())}
    public = {("GET", uri) for uri in PUBLIC_URIS}
    assert served | public == ROUTES.keys() | public, "who may use the new route? say so in ROUTES"


@pytest.mark.parametrize("route", list(ROUTES), ids=" ".join)
def test_who_may_use_a_route(guarded: Guarded, route: tuple[str, str]) -> None:
    method, template = route
    needs = ROUTES[route]
    path = template.format(
        tenant_id=guarded.tenant, timeline_id=TimelineId.generate(), lease_id="1" * 32
    )
    body = {"tenant_id": str(guarded.tenant)} if route == ("PUT", "/v1/tenant/config") else None

    def answer(auth: str | None) -> tuple[int, str]:
        response = guarded.http(method, path, auth, body)
        return said(response) if response.status_code in (401, 403) else (0, "let in")

    management, own, others = (
        f"Bearer {t}" for t in (guarded.management, guarded.own, guarded.others)
    )
    let_in = (0, "let in")
    assert answer(management) == let_in
    denied = (403, f"Forbidden: {NO_MANAGEMENT if needs is Needs.MANAGEMENT else MISMATCH}")
    assert answer(None) == (let_in if needs is Needs.NOTHING else (401, MISSING))
    assert answer(own) == (denied if needs is Needs.MANAGEMENT else let_in)
    assert answer(others) == (let_in if needs in (Needs.NOTHING, Needs.TOKEN) else denied)


def test_public_uris_are_exact(guarded: Guarded) -> None:
    """With anything more they are other paths, and other paths need a token."""
    assert guarded.http("GET", "/v1/status", None).json() == {"id": 42}
    assert said(guarded.http("GET", "/v1/status?x=1", None)) == (401, MISSING)
    assert guarded.http("GET", "/v1/status?x=1", f"Bearer {guarded.management}").ok


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic {}", "{}", "Bearer:{}"])
def test_malformed_headers(guarded: Guarded, header: str) -> None:
    answer = guarded.http("GET", "/v1/tenant", header.format(guarded.management))
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert said(answer) == (401, "Unauthorized: malformed authorization header")


def test_the_scheme_is_taken_in_any_case(guarded: Guarded) -> None:
    assert guarded.http("GET", "/v1/tenant", f"bearer {guarded.management}").ok


@pytest.mark.parametrize("name", list(bad_tokens()))
def test_bad_tokens_over_http(guarded: Guarded, name: str) -> None:
    bad = bad_tokens()[name]
    header = f"Bearer {bad.token}".encode("latin-1").decode("latin-1")
    for path in ("/v1/tenant", f"/v1/tenant/{guarded.tenant}/timeline", "/metrics"):
        assert said(guarded.http("GET", path, header)) == (401, f"Unauthorized: {bad.http}")


def test_the_tenant_in_a_body_counts(guarded: Guarded) -> None:
    """A request that names no tenant, or nonsense, is none for a tenant to make."""
    path, own = "/v1/tenant/config", f"Bearer {guarded.own}"
    assert guarded.http("PUT", path, own, {"tenant_id": str(guarded.tenant)}).ok
    denied = (403, f"Forbidden: {NO_MANAGEMENT}")
    for body in (None, {}, {"tenant_id": None}, {"tenant_id": 1}, {"tenant_id": "x"}, ["x"]):
        assert said(guarded.http("PUT", path, own, body)) == denied
        assert guarded.http("PUT", path, f"Bearer {guarded.management}", body).status_code == 400


def test_a_tenant_cannot_reach_another_under_its_own_name(guarded: Guarded) -> None:
    """Timelines are looked for in the tenant that the token was checked against."""
    own, path = f"Bearer {guarded.own}", f"/v1/tenant/{guarded.tenant}/timeline"
    stranger = guarded.other_timeline
    assert guarded.http("GET", f"{path}/{stranger}", own).status_code == 404
    lease = guarded.http("POST", f"{path}/{stranger}/lsn_lease", own, {"ttl": 1})
    assert lease.status_code >= 400
    branch = guarded.http("POST", path, own, {"ancestor_timeline_id": str(stranger)})
    assert branch.status_code >= 400
    listed = [t["timeline_id"] for t in guarded.http("GET", path, own).json()]
    assert str(guarded.timeline) in listed and str(stranger) not in listed


# libpq


def test_every_command_is_in_the_table() -> None:
    served = PageServiceHandler(MagicMock())._commands.keys() - {"failpoints"}
    assert served == COMMANDS.keys(), "who may run the new command? say so in COMMANDS"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_who_may_run_a_command(guarded: Guarded, command: str) -> None:
    needs = COMMANDS[command]
    argument = {"callmemaybe": " host=127.0.0.1 port=1", "do_gc": " 0"}.get(command, "")
    query = f"{command} {guarded.tenant} {guarded.timeline}{argument}"

    def answer(password: str) -> str:
        with guarded.session(password) as conn:
            try:
                if command == "pagestream":
                    conn.start_copy_both(query)
                elif command == "basebackup":
                    assert b"".join(conn.copy_out(query))
                else:
                    conn.simple_query(query)
            except PqError as e:
                assert e.sqlstate == "42501"
                # The connection goes on, and so does what is allowed on it.
                conn.simple_query("set x = 1")
                return e.message
            return "done"

    assert answer(guarded.management) == "done"
    denied = NO_MANAGEMENT if needs is Needs.MANAGEMENT else MISMATCH
    assert answer(guarded.own) == (denied if needs is Needs.MANAGEMENT else "done")
    assert answer(guarded.others) == ("done" if needs is Needs.TOKEN else denied)


def test_failpoints_are_for_the_management(guarded: Guarded) -> None:
    """They belong to no tenant: they stop or slow down all of them."""
    for command in ("failpoints x=off", "FAILPOINTS x=off"):
        with guarded.session(guarded.own) as conn, pytest.raises(PqError) as e:
            conn.simple_query(command)
        assert e.value.message == NO_MANAGEMENT


def test_set_needs_nothing_but_a_valid_token(guarded: Guarded) -> None:
    """Drivers send SET on connecting, and it names no tenant."""
    for good in (guarded.management, guarded.own):
        with guarded.session(good) as conn:
            conn.simple_query("set FOO")


def test_commands_without_a_tenant_that_can_be_checked(guarded: Guarded) -> None:
    with guarded.session(guarded.own) as conn:
        for command, text in (
            ("do_gc", "invalid param number for do_gc command"),
            ("pagestream x y", "tenant"),
            ("pagestream", "invalid param number for pagestream command"),
            ("status", "unknown command"),
        ):
            with pytest.raises(PqError, match=text):
                conn.simple_query(command)


def test_a_tenant_cannot_read_another_over_libpq(guarded: Guarded) -> None:
    for command in ("basebackup", "pagestream", "checkpoint", "do_gc", "wal_position"):
        for tenant, timeline in (
            (guarded.other, guarded.other_timeline),
            (guarded.tenant, guarded.other_timeline),
        ):
            with guarded.session(guarded.own) as conn, pytest.raises(PqError):
                conn.simple_query(f"{command} {tenant} {timeline}")


def test_wal_of_another_tenant_is_not_fetched(guarded: Guarded) -> None:
    """Safekeepers give WAL to everybody, so what a tenant may name there is checked here."""
    with socket.create_server(("127.0.0.1", 0)) as safekeeper:
        port = safekeeper.getsockname()[1]
        tenant, timeline = guarded.tenant, guarded.timeline
        for options in (
            f"-c ztimelineid={timeline} ztenantid={guarded.other}",
            f"-c ztimelineid={guarded.other_timeline} ztenantid={tenant}",
            f"-c ztimelineid={timeline} ztenantid={tenant} ztenantid={guarded.other}",
            f"-cztimelineid={timeline} -cztenantid={guarded.other}",
        ):
            before = guarded.server.log().count("callmemaybe ignored")
            source = f"host=127.0.0.1 port={port} options='{options}'"
            with guarded.session(guarded.own) as conn:
                conn.simple_query(f"callmemaybe {tenant} {timeline} {source}")
            # It is told in the log, before the caller is answered.
            assert guarded.server.log().count("callmemaybe ignored") == before + 1
        safekeeper.settimeout(0.2)
        with pytest.raises(TimeoutError):
            safekeeper.accept()


@pytest.mark.parametrize("name", list(bad_tokens()))
def test_bad_tokens_over_libpq(guarded: Guarded, name: str) -> None:
    bad = bad_tokens()[name]
    with pytest.raises(PqError) as refused, guarded.session(bad.token):
        pass
    assert bad.libpq in refused.value.message
    assert (refused.value.severity, refused.value.sqlstate) == ("FATAL", "28P01")


def test_no_command_before_authentication(guarded: Guarded) -> None:
    with socket.create_connection(("127.0.0.1", guarded.server.pg_port), timeout=10) as sock:
        parameters = b"user\0x\0\0"
        sock.sendall(struct.pack(">II", 8 + len(parameters), 3 << 16) + parameters)
        assert sock.recv(9) == b"R\0\0\0\x08\0\0\0\x03"  # AuthenticationCleartextPassword
        sock.sendall(b"Q" + struct.pack(">I", 12) + b"set x=1\0")
        answer = b""
        while data := sock.recv(4096):
            answer += data
        assert answer.startswith(b"E") and b"expected a password" in answer


def test_psql_style_clients_get_their_parameters(guarded: Guarded) -> None:
    """asyncpg cannot do without server_version, with authentication as without it."""
    with guarded.session(guarded.own) as conn:
        assert conn.simple_query("set x = 1") == []


def test_no_token_is_logged(guarded: Guarded) -> None:
    """Neither good nor bad ones, whatever was done with them: the whole module's log."""
    for text in ("unknown_command {}", "callmemaybe {} x postgresql://u:{}@h", "'{}'"):
        with guarded.session(guarded.own) as conn, contextlib.suppress(PqError):
            conn.simple_query(text.replace("{}", guarded.others))
    log = guarded.server.log()
    assert "unknown command" in log
    assert "eyJ" not in log
    bad = [b.token for b in bad_tokens().values()]
    for secret in (guarded.management, guarded.own, guarded.others, *bad):
        assert not any(part in log for part in secret.split(".") if len(part) > 20)


# Configuration


@pytest.fixture
def unguarded(tmp_path: Path) -> Pageserver:
    return Pageserver(tmp_path / "ps")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("auth_type='ZenithJWT'", "Can't find auth_validation_public_key at '{}/auth_public"),
        (
            "auth_type='ZenithJWT'\nauth_validation_public_key_path='x.pem'",
            "Can't find auth_validation_public_key at '{}/x.pem'",
        ),
        (
            "auth_type='ZenithJWT'\nauth_validation_public_key_path='pageserver.toml'",
            "auth_validation_public_key_path: '{}/pageserver.toml' holds no public key",
        ),
        ("auth_type='MD5'", "auth_type 'MD5' is not supported"),
        ("auth_type='zenithjwt'", "invalid auth_type 'zenithjwt'"),
    ],
)
def test_without_a_key_it_does_not_start(unguarded: Pageserver, override: str, text: str) -> None:
    done = unguarded.run("-c", override)
    assert done.returncode == 1
    assert text.format(unguarded.workdir) in done.stderr


def test_relative_paths_of_keys_are_below_the_workdir(unguarded: Pageserver) -> None:
    (unguarded.workdir / "auth_public_key.pem").write_bytes(jwt_tokens.public_pem(key()))
    for override in (
        "auth_type='ZenithJWT'",
        "auth_type='ZenithJWT'\nauth_validation_public_key_path='auth_public_key.pem'",
    ):
        unguarded.start(override)
        try:
            client = Client(unguarded)
            assert client.http("GET", "/v1/tenant", None).status_code == 401
            assert client.http("GET", "/v1/tenant", f"Bearer {client.management}").json() == []
        finally:
            unguarded.stop()


def test_a_token_where_none_is_needed_is_not_looked_at(unguarded: Pageserver) -> None:
    unguarded.start()
    try:
        client = Client(unguarded)
        assert client.http("GET", "/v1/tenant", "nonsense").json() == []
        with client.session("nonsense") as conn:
            conn.simple_query("set x = 1")
        assert "cryptography" not in Path(f"/proc/{unguarded.pid}/maps").read_text()
    finally:
        unguarded.stop()
