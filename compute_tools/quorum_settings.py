"""What a postgresql.conf says about the quorum that the server's WAL goes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compute_tools import postgres_conf
from compute_tools.config_files import ConfigFiles
from zenith_utils.daemonize import AddressError, parse_address
from zenith_utils.ids import TenantId, TimelineId

_DEFAULT_SAFEKEEPER_PORT = 5454


class QuorumSettingsError(Exception):
    """The configuration does not say it; the message names the file and the setting."""


@dataclass(frozen=True, slots=True)
class QuorumSettings:
    """Whose WAL it is and who keeps it; `pageserver_connstr` is empty where there is none."""

    tenant_id: TenantId
    timeline_id: TimelineId
    safekeepers: tuple[tuple[str, int], ...]
    pageserver_connstr: str

    @classmethod
    def read(cls, pgdata: Path) -> QuorumSettings:
        """From the configuration files in `pgdata`, which need not hold anything else.

        Raises QuorumSettingsError.
        """
        conf = pgdata / "postgresql.conf"
        try:
            conf.open().close()
        except OSError as e:
            raise QuorumSettingsError(f"cannot read {conf}: {e.strerror}") from e
        lines, automatic = ConfigFiles(pgdata, conf).read()
        for line in lines:
            if not postgres_conf.is_well_formed(line):
                raise QuorumSettingsError(
                    f"syntax error in {conf}, or a file it includes: {line!r}"
                )
        return cls.of(postgres_conf.parse([*lines, *automatic]), conf)

    @classmethod
    def of(cls, settings: dict[str, str], conf: Path) -> QuorumSettings:
        """From settings that were read from `conf`. Raises QuorumSettingsError."""

        def required(name: str) -> str:
            if not settings.get(name):
                raise QuorumSettingsError(f"{conf} does not set {name}")
            return settings[name]

        try:
            name = "zenith.zenith_tenant"
            tenant_id = TenantId.parse(required(name))
            name = "zenith.zenith_timeline"
            timeline_id = TimelineId.parse(required(name))
            name = "wal_acceptors"
            safekeepers = tuple(
                parse_address(part.strip(), _DEFAULT_SAFEKEEPER_PORT)
                for part in required(name).split(",")
            )
        except (ValueError, AddressError) as e:
            raise QuorumSettingsError(f"{name} in {conf}: {e}") from e
        if len(set(safekeepers)) < len(safekeepers):
            raise QuorumSettingsError(f"wal_acceptors in {conf} names a safekeeper twice")
        return cls(
            tenant_id, timeline_id, safekeepers, settings.get("zenith.page_server_connstring", "")
        )
