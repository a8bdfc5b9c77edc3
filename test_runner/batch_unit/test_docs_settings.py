"""docs/settings.md names every setting and failpoint there is, and none that there is not."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest
from batch_unit.pageserver_support import REPOSITORY

from compute_tools import postgres_conf
from control_plane.local_env import LocalEnv, PageserverConf, SafekeeperConf
from pageserver import failpoints
from pageserver import main as pageserver_main
from pageserver.config import PageServerConf, RemoteStorageConf, parse_config
from pageserver.tenant_config import TENANT_KEYS
from proxy import main as proxy_main
from safekeeper import main as safekeeper_main
from zenith_utils.failpoints import Action, Failpoint

# Parts of an object that are no keys of its file, or have another name there.
NOT_KEYS = {
    PageServerConf: {"workdir", "tenant", "tenant_document"},
    LocalEnv: {"repo_dir", "branches", "earlier_generations"},
}
# Between Zenith's own programs.
INTERNAL_VARIABLES = re.compile("ZENITH_LAZYFILES_.*")
COMPONENTS = (
    *("cli", "control_plane", "compute_tools", "pageserver", "safekeeper"),
    *("postgres_ffi", "pgxn", "zenith_utils"),
)


def documented(heading: str) -> set[str]:
    """The names in the first column of the first table below a heading that starts so."""
    text = (REPOSITORY / "docs/settings.md").read_text()
    section = re.search(rf"^#+ {re.escape(heading)}.*?(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    rows = [line for line in section[0].splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall("`([^`]+)`", row.split("|")[1])]
    assert len(names) == len(set(names))
    return set(names)


def keys(kind: type) -> set[str]:
    """The keys of a configuration file that become an object of this dataclass."""
    return {field.name for field in fields(kind)} - NOT_KEYS.get(kind, set())


def test_pageserver() -> None:
    assert documented("The pageserver") == keys(PageServerConf)
    assert documented("Settings of tenants") == TENANT_KEYS
    assert documented("Remote storage") == keys(RemoteStorageConf)


@pytest.mark.parametrize(
    ("heading", "document"),
    [("The pageserver", {}), ("Settings of tenants", {}), ("Remote storage", None)],
)
def test_pageserver_takes_each_key(heading: str, document: dict[str, object] | None) -> None:
    """The parser knows it: a wrong value is what is complained about."""
    for key in documented(heading):
        wrong = {key: [1]}
        text = {"id": 1, **wrong} if document is not None else {"id": 1, "remote_storage": wrong}
        with pytest.raises(Exception, match="Failed to parse") as caught:
            parse_config(text, Path("/"))
        reason = caught.value.__cause__ and caught.value.__cause__.__cause__
        assert "unrecognized" not in str(reason), key


def test_safekeeper_options() -> None:
    actions = safekeeper_main._parser()._actions
    shown = [action for action in actions if action.help != argparse.SUPPRESS]
    options = {option for action in shown for option in action.option_strings}
    assert documented("The safekeeper") == options - {"-h"}


def options_of(help_text: str) -> set[str]:
    """The options that a program's help explains."""
    rows = re.findall(r"^  (-.*?)(?:  |$)", help_text, re.MULTILINE)
    return {option for row in rows for option in re.findall(r"(?:^|, )(-[\w-]+)", row)}


def test_pageserver_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pageserver_main.main(["--help"])
    assert documented("The pageserver: options") == options_of(capsys.readouterr().out)


def test_proxy_options() -> None:
    assert documented("The proxy: options") == options_of(proxy_main._parser().format_help())


def test_local_environment() -> None:
    renamed = {"branch_name_mappings", "earlier_safekeeper_generations"}
    assert documented("A local environment") == keys(LocalEnv) | renamed
    assert documented("The table `pageserver`") == keys(PageserverConf)
    assert documented("The tables `safekeepers`") == keys(SafekeeperConf)


def test_settings_of_computes() -> None:
    sources = ("compute_tools/postgres_conf.py", "control_plane/compute.py", "pgxn/zenith/zenith.c")
    texts = [(REPOSITORY / source).read_text() for source in sources]
    found = {name for text in texts for name in re.findall(r'"(zenith\.[a-z_]+)"', text)}
    names = documented("Settings of Zenith")
    twins = set(postgres_conf.TWINS)
    assert {name for name in names if "." in name} == found - {"zenith.h"}
    # The others are the names of a patched server, in the same row.
    text = (REPOSITORY / "docs/settings.md").read_text()
    assert {f"zenith.{name}" for name in twins} <= names
    assert documented("Defaults that the file may change") == set(postgres_conf.DEFAULTS)
    assert "Also written `wal_acceptors`" in text and "Also written `recovery_target_lsn`" in text


def test_forced_settings_of_computes() -> None:
    forced: set[str] = set()
    for standby_name, safekeepers, hot_standby in product(
        ("walproposer", None), (True, False), (True, False)
    ):
        node = postgres_conf.Node(
            pgdata=Path("/data"),
            port=1,
            standby_name=standby_name,
            safekeepers=safekeepers,
            tracked=dict.fromkeys(postgres_conf.TRACKED_LIMITS, 1000),
            prepared=7,
            library=Path("/lib"),
            feedback_file=Path("/feedback"),
            hot_standby=hot_standby,
        )
        users = {"listen_addresses": "::1", "wal_keep_size": "10TB", "max_replication_slots": "0"}
        forced |= set(postgres_conf.command_line(users, node))
    assert documented("Set at every start") == {
        name for name in forced if not name.startswith("zenith.")
    }


def test_environment_variables() -> None:
    names = set()
    for component in COMPONENTS:
        for pattern in ("*.py", "*.c"):
            for path in (REPOSITORY / component).rglob(pattern):
                if path.with_suffix(".pyx").exists():
                    continue
                names |= set(
                    re.findall(
                        r'"((?:ZENITH|RUST|POSTGRES|GIT|LLVM|XDG|S3)_[A-Z_]+|CC|HOME|NO_COLOR)"',
                        path.read_text(),
                    )
                )
    public = {name for name in names if not INTERNAL_VARIABLES.fullmatch(name)}
    public -= {"ZENITH_", "S3_"}  # beginnings of names
    assert documented("Environment variables") == public


def test_failpoints() -> None:
    points = [point for point in vars(failpoints).values() if isinstance(point, Failpoint)]
    text = (REPOSITORY / "docs/settings.md").read_text()
    failpoint_table, type_table = text.split("\n## Failpoints\n")[1].split("\nAn action is ")
    assert set(re.findall("^\\| `([^`]+)` ", failpoint_table, re.MULTILINE)) == {
        point.name for point in points
    }
    assert re.findall("^\\| `([a-z]+)", type_table, re.MULTILINE) == [a.value for a in Action]
