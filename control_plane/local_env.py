"""The configuration of a local environment: the file `config` of its repository directory."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from control_plane.errors import ConfigError, ControlPlaneError
from zenith_utils.durable import write_file_durably
from zenith_utils.ids import TenantId, TimelineId

LAST_PORT = 65535
DEFAULT_BRANCH = "main"
DEFAULT_REPO_DIR = ".zenith"
CONFIG_FILE = "config"
PRIVATE_KEY_FILE = "auth_private_key.pem"
PUBLIC_KEY_FILE = "auth_public_key.pem"

_TOP_LEVEL = frozenset(
    (
        *("default_tenant_id", "pg_distrib_dir", "zenith_distrib_dir", "private_key_path"),
        *("pageserver", "safekeepers", "safekeeper_generation", "branch_name_mappings"),
        "earlier_safekeeper_generations",
    )
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_HEADER = """\
# This file describes a local environment of Zenith.
# It is read and rewritten by the `zenith` command: edit it only while nothing runs.
# The branch names of each tenant stand in [branch_name_mappings].
"""


@dataclass(slots=True)
class PageserverConf:
    """Where the pageserver listens and how it is talked to."""

    id: int = 1
    listen_pg_addr: str = "127.0.0.1:64000"
    listen_http_addr: str = "127.0.0.1:9898"
    auth_type: str = "Trust"
    auth_token: str = field(default="", repr=False)
    """What the command line proves with that it may do everything."""


@dataclass(slots=True)
class SafekeeperConf:
    """Where one safekeeper listens; `sync` false runs it without fsync.

    `instance` is that of its data directory in hex, empty before its first start. The `wal_` ones
    are options of its program about the WAL it keeps, not given if they are empty.
    """

    id: int = 1
    pg_port: int = 5454
    http_port: int = 7676
    sync: bool = True
    instance: str = ""
    wal_keep_size: str = ""
    wal_offload: str = ""
    wal_removal: str = ""
    wal_removal_interval: str = ""

    @property
    def wal_options(self) -> dict[str, str]:
        """The options about WAL that are set, by the names of the configuration."""
        return {
            f.name: value
            for f in fields(self)
            if f.name.startswith("wal_") and (value := getattr(self, f.name))
        }


@dataclass(slots=True)
class GenerationMember:
    """A safekeeper of an earlier generation, as it was then."""

    id: int = 1
    pg_port: int = 5454
    instance: str = ""


@dataclass(slots=True)
class SafekeeperGeneration:
    """Who the safekeepers were before a change of the configuration."""

    number: int
    members: list[GenerationMember]


@dataclass(slots=True)
class LocalEnv:
    """A local environment. `branches` maps a branch name to its timeline in each tenant."""

    repo_dir: Path
    pg_distrib_dir: Path
    zenith_distrib_dir: Path
    default_tenant_id: TenantId | None = None
    private_key_path: str = PRIVATE_KEY_FILE
    """Of the key that tokens are signed with; relative to the repository."""
    pageserver: PageserverConf = field(default_factory=PageserverConf)
    safekeepers: list[SafekeeperConf] = field(default_factory=list)
    safekeeper_generation: int = 0
    """Grows with each change of the safekeepers; `earlier_generations` may still matter."""
    earlier_generations: list[SafekeeperGeneration] = field(default_factory=list)
    branches: dict[str, dict[TenantId, TimelineId]] = field(default_factory=dict)

    # Places in the repository

    @property
    def config_path(self) -> Path:
        """The configuration file."""
        return self.repo_dir / CONFIG_FILE

    @property
    def private_key_file(self) -> Path:
        """The key that tokens are signed with."""
        return self.repo_dir / self.private_key_path

    @property
    def public_key_file(self) -> Path:
        """The key that the pageserver checks them with."""
        return self.repo_dir / PUBLIC_KEY_FILE

    def safekeeper_dir(self, node_id: int) -> Path:
        """Work directory of a safekeeper."""
        return self.repo_dir / "safekeepers" / f"sk{node_id}"

    def safekeeper_ids_on_disk(self) -> list[int]:
        """Ids of the safekeepers that have a directory, in the configuration or not."""
        names = [path.name for path in self.safekeeper_dir(0).parent.glob("sk*")]
        return sorted(int(name[2:]) for name in names if name[2:].isdecimal())

    def pgdata_dirs(self, tenant_id: TenantId) -> Path:
        """Directory of a tenant's compute data directories."""
        return self.repo_dir / "pgdatadirs" / "tenants" / str(tenant_id)

    def compute_state_dir(self, tenant_id: TenantId, node: str) -> Path:
        """Directory of what a compute's supervisor keeps for itself."""
        return self.repo_dir / "computes" / str(tenant_id) / node

    def safekeeper(self, node_id: int) -> SafekeeperConf:
        """The configuration of a safekeeper; raises ControlPlaneError."""
        for conf in self.safekeepers:
            if conf.id == node_id:
                return conf
        known = ", ".join(str(conf.id) for conf in self.safekeepers) or "none"
        raise ControlPlaneError(f"could not find safekeeper '{node_id}': the config has {known}")

    # Branch names

    def branch_timeline(self, name: str, tenant_id: TenantId) -> TimelineId:
        """Timeline of a branch; raises ControlPlaneError."""
        timeline_id = self.branches.get(name, {}).get(tenant_id)
        if timeline_id is None:
            raise ControlPlaneError(
                f"Found no timeline id for branch name '{name}'{self._similar(name, tenant_id)}"
            )
        return timeline_id

    def _similar(self, name: str, tenant_id: TenantId) -> str:
        """What may have been meant by the name of a branch that does not exist."""
        from difflib import get_close_matches

        names = [known for known, timelines in self.branches.items() if tenant_id in timelines]
        similar = get_close_matches(name, names)
        if similar:
            return f". Did you mean {' or '.join(similar)}?"
        option = "" if tenant_id == self.default_tenant_id else f" --tenant-id {tenant_id}"
        return f": see 'zenith timeline list{option}'"

    def check_branch_is_free(
        self, name: str, tenant_id: TenantId, timeline_id: TimelineId | None = None
    ) -> None:
        """Refuse a name that is taken or unusable; `timeline_id` is to get it, if there is one."""
        if not name or any(c.isspace() or not c.isprintable() or c in "[]" for c in name):
            raise ControlPlaneError(
                f"invalid branch name '{name}': blanks and brackets are not allowed"
            )
        existing = self.branches.get(name, {}).get(tenant_id)
        if existing is not None:
            other = "" if timeline_id is None else f" {timeline_id}"
            raise ControlPlaneError(
                f"branch '{name}' is already mapped to timeline {existing}, "
                f"cannot map to another timeline{other}"
            )

    def add_branch(self, name: str, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        """Give a timeline a name, and save. Two commands at once do not undo each other."""
        with self.locked():
            self.refresh()
            self.check_branch_is_free(name, tenant_id, timeline_id)
            self.branches.setdefault(name, {})[tenant_id] = timeline_id
            self.save()

    def branch_name(self, tenant_id: TenantId, timeline_id: TimelineId) -> str | None:
        """Name of a timeline, if it has one."""
        for name, timelines in self.branches.items():
            if timelines.get(tenant_id) == timeline_id:
                return name
        return None

    # The file

    def save(self) -> None:
        """Write the configuration file, durably."""
        write_file_durably(self.config_path, self.to_toml().encode(), mode=0o600)

    def refresh(self) -> None:
        """Read what other commands may have changed meanwhile; with the lock held."""
        saved = LocalEnv.load(self.repo_dir)
        self.branches = saved.branches
        self.safekeepers = saved.safekeepers
        self.safekeeper_generation = saved.safekeeper_generation
        self.earlier_generations = saved.earlier_generations

    def locked(self) -> AbstractContextManager[None]:
        """Keep other commands from changing the configuration or making nodes meanwhile."""
        return self._holding("config.lock", fcntl.LOCK_EX)

    def starting_compute(self) -> AbstractContextManager[None]:
        """Keep others out of electing leaders without a compute; other starts go on meanwhile."""
        return self._holding("settling.lock", fcntl.LOCK_SH)

    def settling_branch(self) -> AbstractContextManager[None]:
        """Keep computes from being started that an election without a compute would fence."""
        return self._holding("settling.lock", fcntl.LOCK_EX)

    @contextmanager
    def _holding(self, name: str, operation: int) -> Iterator[None]:
        fd = os.open(self.repo_dir / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, operation)
            yield
        finally:
            os.close(fd)

    def to_toml(self) -> str:
        """The file's text; the listen addresses stay the last two lines: scripts edit them."""
        lines = [_HEADER.rstrip()]
        if self.default_tenant_id is not None:
            lines.append(f"default_tenant_id = {toml_string(self.default_tenant_id)}")
        lines.append(f"pg_distrib_dir = {toml_string(self.pg_distrib_dir)}")
        lines.append(f"private_key_path = {toml_string(self.private_key_path)}")
        if self.safekeeper_generation:
            lines.append(f"safekeeper_generation = {self.safekeeper_generation}")
        lines.append(f"zenith_distrib_dir = {toml_string(self.zenith_distrib_dir)}")
        for conf in self.safekeepers:
            lines += ["", "[[safekeepers]]"]
            lines += [f"http_port = {conf.http_port}", f"id = {conf.id}"]
            lines += [] if not conf.instance else [f"instance = {toml_string(conf.instance)}"]
            lines += [f"pg_port = {conf.pg_port}", f"sync = {str(conf.sync).lower()}"]
            lines += [f"{name} = {toml_string(value)}" for name, value in conf.wal_options.items()]
        for generation in self.earlier_generations:
            lines += ["", "[[earlier_safekeeper_generations]]", "members = ["]
            for m in generation.members:
                instance = toml_string(m.instance)
                lines.append(
                    f"    {{ id = {m.id}, instance = {instance}, pg_port = {m.pg_port} }},"
                )
            lines += ["]", f"number = {generation.number}"]
        lines += ["", "[branch_name_mappings]"]
        for name, timelines in sorted(self.branches.items()):
            pairs = ", ".join(f"['{t}', '{tl}']" for t, tl in sorted(timelines.items()))
            key = name if _BARE_KEY.fullmatch(name) else _escaped(name)
            lines.append(f"{key} = [{pairs}]")
        lines += ["", "[pageserver]"]
        for name in ("auth_token", "auth_type", "id", "listen_http_addr", "listen_pg_addr"):
            value = getattr(self.pageserver, name)
            text = str(value) if isinstance(value, int) else toml_string(value)
            lines.append(f"{name} = {text}")
        return "\n".join(lines) + "\n"

    @classmethod
    def load(cls, repo_dir: Path) -> LocalEnv:
        """Read the environment of a repository; raises ConfigError."""
        path = repo_dir / CONFIG_FILE
        if not path.is_file():
            raise ConfigError("Error loading config") from ControlPlaneError(
                f"Zenith config is not found in {repo_dir}. You need to run 'zenith init' first"
            )
        try:
            return cls.parse(path.read_text(encoding="utf-8"), repo_dir)
        except (OSError, UnicodeDecodeError, ControlPlaneError) as e:
            raise ConfigError("Error loading config") from e

    @classmethod
    def parse(cls, text: str, repo_dir: Path) -> LocalEnv:
        """Make an environment of a configuration text; keys it does not know are ignored."""
        try:
            document = tomllib.loads(text)
            return cls._from_document(document, repo_dir)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
            raise ControlPlaneError(f"cannot parse the config: {e}") from e

    @classmethod
    def _from_document(cls, document: dict[str, Any], repo_dir: Path) -> LocalEnv:
        tenant = document.get("default_tenant_id")
        branches: dict[str, dict[TenantId, TimelineId]] = {}
        for name, pairs in document.get("branch_name_mappings", {}).items():
            branches[name] = {TenantId.parse(t): TimelineId.parse(tl) for t, tl in pairs}
        safekeepers = [_known(SafekeeperConf, s) for s in document.get("safekeepers", [])]
        if len({conf.id for conf in safekeepers}) < len(safekeepers):
            raise ValueError("two safekeepers have the same id")
        generation = document.get("safekeeper_generation", 0)
        earlier = [_generation(g) for g in document.get("earlier_safekeeper_generations", [])]
        numbers = [*(g.number for g in earlier), generation]
        if any(type(number) is not int for number in numbers) or numbers != sorted(set(numbers)):
            raise ValueError(f"the generations of safekeepers are out of order: {numbers}")
        return cls(
            repo_dir=repo_dir,
            # Commands run anywhere: a relative path is one of where the environment is made.
            pg_distrib_dir=Path(
                document.get("pg_distrib_dir") or default_pg_distrib_dir()
            ).absolute(),
            zenith_distrib_dir=Path(
                document.get("zenith_distrib_dir") or default_zenith_distrib_dir()
            ).absolute(),
            default_tenant_id=None if tenant is None else TenantId.parse(tenant),
            private_key_path=document.get("private_key_path", PRIVATE_KEY_FILE),
            pageserver=_known(PageserverConf, document.get("pageserver", {})),
            safekeepers=safekeepers,
            safekeeper_generation=generation,
            earlier_generations=earlier,
            branches=branches,
        )


_T = TypeVar("_T", PageserverConf, SafekeeperConf, GenerationMember)


def _known(kind: type[_T], values: dict[str, Any]) -> _T:
    """An object of the keys it knows, each of the right type."""
    arguments = {}
    defaults = asdict(kind())
    for name in defaults.keys() & values.keys():
        if type(values[name]) is not type(defaults[name]):
            raise ValueError(f"{name} must be of type {type(defaults[name]).__name__}")
        if name.endswith("_port") and not 1 <= values[name] <= LAST_PORT:
            raise ValueError(f"{name} {values[name]} is no port: it must be from 1 to {LAST_PORT}")
        arguments[name] = values[name]
    return kind(**arguments)


def _generation(values: dict[str, Any]) -> SafekeeperGeneration:
    members = [_known(GenerationMember, m) for m in values["members"]]
    return SafekeeperGeneration(values["number"], members)


def toml_string(value: object) -> str:
    """A TOML string: literal, or basic where that cannot hold the text."""
    text = str(value)
    return f"'{text}'" if text.isprintable() and "'" not in text else _escaped(text)


def _escaped(text: str) -> str:
    """A basic TOML string; its escapes are a superset of JSON's."""
    return json.dumps(text, ensure_ascii=False)


def unknown_keys(document: dict[str, Any]) -> list[str]:
    """Keys of a configuration that mean nothing, as `table.key`."""
    unknown = sorted(document.keys() - _TOP_LEVEL)
    tables: list[tuple[str, Any, type]] = [
        ("pageserver", document.get("pageserver", {}), PageserverConf)
    ]
    tables += [("safekeepers", table, SafekeeperConf) for table in document.get("safekeepers", [])]
    for name, table, kind in tables:
        known = {f.name for f in fields(kind)}
        unknown += [f"{name}.{key}" for key in sorted(table.keys() - known)]
    return list(dict.fromkeys(unknown))


def repo_dir_from_environment() -> Path:
    """ZENITH_REPO_DIR, else `.zenith` in the current directory."""
    return Path(os.environ.get("ZENITH_REPO_DIR") or DEFAULT_REPO_DIR).absolute()


def default_pg_distrib_dir() -> Path:
    """POSTGRES_DISTRIB_DIR, else the newest supported server of the distribution."""
    from postgres_ffi.distrib import DistribError, find_distrib

    try:
        return find_distrib().bin_dir.parent
    except DistribError as e:
        raise ControlPlaneError("Failed to create zenith configuration") from e


def default_zenith_distrib_dir() -> Path:
    """Directory of the running `zenith` command, where the daemons' commands are too."""
    return Path(sys.executable).parent
