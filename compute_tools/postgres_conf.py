"""The settings a compute's Postgres runs with.

The user's postgresql.conf stays as written. Postgres reads a generated file: our defaults first,
then the user's lines, with the settings that only a patched server knows renamed to `zenith.*`
twins. What durability rests on goes to the command line, where neither the file nor ALTER SYSTEM
can change it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

# Settings of the patched server: stock Postgres refuses to start when it meets them.
TWINS = {
    "wal_acceptors": "zenith.wal_acceptors",
    "max_replication_write_lag": "zenith.max_replication_write_lag",
    "max_replication_flush_lag": "zenith.max_replication_flush_lag",
    "max_replication_apply_lag": "zenith.max_replication_apply_lag",
    # A node at an LSN is opened there by its data directory; as a recovery target the setting
    # would stop recovery before the server is consistent.
    "recovery_target_lsn": "zenith.recovery_target_lsn",
}

# How far the pageserver may lag behind; the walproposer acts on them.
LAG_LIMITS = (
    "max_replication_write_lag",
    "max_replication_flush_lag",
    "max_replication_apply_lag",
)

DEFAULTS = {
    "listen_addresses": "'127.0.0.1'",
    "unix_socket_directories": "''",
    # Shared memory of a killed server must not outlive it.
    "dynamic_shared_memory_type": "mmap",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "wal_recycle": "off",
    "wal_init_zero": "off",
    "log_line_prefix": "'%m [%p] '",
    "allow_in_place_tablespaces": "on",
}

# Setting -> field of the control file. A hot standby refuses to start when the setting is below
# what the WAL was written with.
TRACKED_LIMITS = {
    "max_connections": "max_connections",
    "max_worker_processes": "max_worker_processes",
    "max_wal_senders": "max_wal_senders",
    "max_prepared_transactions": "max_prepared_xacts",
    "max_locks_per_transaction": "max_locks_per_xact",
}
# What Zenith itself uses: a worker that logs free space maps beside Postgres' own launcher;
# a walsender with its slot for the walproposer or the pageserver, and room for a reconnect.
_OWN_NEEDS = {"max_worker_processes": 2, "max_wal_senders": 4, "max_replication_slots": 2}
_POSTGRES_DEFAULTS = {
    "max_connections": 100,
    "max_worker_processes": 8,
    "max_wal_senders": 10,
    "max_replication_slots": 10,
    "max_prepared_transactions": 0,
    "max_locks_per_transaction": 64,
}

# guc-file.l: a name, perhaps "=", and a quoted string or a word.
_LINE = re.compile(
    r"^\s*(?P<name>[A-Za-z_][\w.$]*)\s*(?:=|\s)\s*(?P<value>'(?:[^'\\]|''|\\.)*'|[^'#\s]+)"
)
_ESCAPE = re.compile(r"''|\\([0-7]{1,3}|.)", re.DOTALL)
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
# parse_int() of guc.c: a number and perhaps a unit.
_SIZE = re.compile(r"\s*([-+]?[0-9.][0-9a-fA-FxX.]*(?:[eE][-+]?[0-9]+)?)\s*(B|kB|MB|GB|TB)?\s*")
_UNITS = {"B": 2.0**-20, "kB": 2.0**-10, "MB": 1.0, "GB": 2.0**10, "TB": 2.0**20}
_INT_MAX = (1 << 31) - 1
_INCLUDES = frozenset({"include", "include_if_exists", "include_dir"})
_EVERY_ADDRESS = frozenset({"*", "0.0.0.0", "localhost", "127.0.0.1"})
# The wal_keep_size of a new node, which a patched server lives well with. With safekeepers the
# WAL is theirs to keep, and here it would only fill the disk.
_KEEP_FOR_EVER = "10TB"
_KEEP_SIZE = "1GB"


@dataclass(frozen=True, slots=True)
class Include:
    """An include directive; `kind` is its name, `path` as written."""

    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Node:
    """What the command line depends on beside the user's settings.

    `standby_name` is whom commits wait for, None on a read-only node. `tracked` are the limits
    (TRACKED_LIMITS) that the WAL up to here was written with, `prepared` counts the prepared
    transactions, `library` is the preload library, `feedback_file` is where it finds what the
    pageserver reports. A `hot_standby` follows the timeline; where its WAL comes from is in the
    settings file, as it changes.
    """

    pgdata: Path
    port: int
    standby_name: str | None
    safekeepers: bool
    tracked: Mapping[str, int]
    prepared: int
    library: Path
    feedback_file: Path
    hot_standby: bool = False


def parse_line(line: str) -> tuple[str, str] | None:
    """Name, in lower case, and value of the setting in a line, if there is one."""
    match = _LINE.match(line)
    return None if match is None else (match["name"].lower(), _unquoted(match["value"]))


def is_well_formed(line: str) -> bool:
    """Whether Postgres can make sense of a line: a setting, a comment, or nothing."""
    match = _LINE.match(line)
    rest = line if match is None else line[match.end("value") :]
    return not rest.strip() or rest.lstrip().startswith("#")


def parse_include(line: str) -> Include | None:
    """The include directive in a line, if there is one."""
    setting = parse_line(line)
    return None if setting is None or setting[0] not in _INCLUDES else Include(*setting)


def translate_line(line: str) -> str:
    """One line of the user's file as stock Postgres accepts it."""
    match = _LINE.match(line)
    twin = None if match is None else TWINS.get(match["name"].lower())
    if match is None or twin is None:
        return line
    return line[: match.start("name")] + twin + line[match.end("name") :]


def generate(user_lines: Iterable[str], own: Mapping[str, str] | None = None) -> str:
    """The file Postgres reads, from the lines of the user's postgresql.conf.

    `own` settings of ours win over the user's.
    """
    lines = ["# Generated at start from the node's postgresql.conf: edit that file instead."]
    lines += [f"{name} = {value}" for name, value in DEFAULTS.items()]
    lines += ["", "# From postgresql.conf"]
    lines += [translate_line(line) for line in user_lines]
    if own:
        lines += ["", "# From the supervisor"]
        lines += [
            f"{name} = '{value.replace(chr(39), 2 * chr(39))}'" for name, value in own.items()
        ]
    return "\n".join(lines) + "\n"


def parse(lines: Iterable[str]) -> dict[str, str]:
    """Settings of a configuration, names in lower case, the last line of a name wins.

    A setting of the patched server and its twin are one, under the name of the former.
    """
    originals = {twin: name for name, twin in TWINS.items()}
    settings = {}
    for line in lines:
        setting = parse_line(line)
        if setting is not None:
            settings[originals.get(setting[0], setting[0])] = setting[1]
    return settings


def command_line(settings: Mapping[str, str], node: Node) -> dict[str, str]:
    """Settings forced on the command line; `settings` are the user's effective ones."""
    logical = settings.get("wal_level", "").lower() == "logical"
    forced = {
        # A data_directory line of a copied file would lead to another server's data.
        "data_directory": str(node.pgdata),
        # The port that the node is listed with, and that the walproposer connects to.
        "port": str(node.port),
        # The directory is disposable, the truth is in storage: nothing here needs to survive.
        "fsync": "off",
        "full_page_writes": "off",
        "wal_log_hints": "off",
        "restart_after_crash": "off",
        # A WAL-logging level below replica would not reach the safekeepers.
        "wal_level": "logical" if logical else "replica",
        "shared_preload_libraries": preload_libraries(
            settings.get("shared_preload_libraries", ""), str(node.library)
        ),
        "data_sync_retry": "off",
        "zenith.feedback_file": str(node.feedback_file),
    }
    addresses = settings.get("listen_addresses")
    if addresses is not None:
        forced["listen_addresses"] = with_loopback(addresses)
    if node.standby_name is None:
        forced["zenith.read_only_node"] = "on"
        forced["synchronous_standby_names"] = ""
        forced["hot_standby"] = "on"
        # WAL comes from the safekeepers alone; where the node stands at its LSN, from nowhere.
        if not node.hot_standby:
            forced["primary_conninfo"] = ""
        forced["primary_slot_name"] = forced["restore_command"] = ""
        forced["wal_receiver_create_temp_slot"] = "off"
    else:
        forced["synchronous_standby_names"] = node.standby_name
        if node.safekeepers:
            # The slot of a walproposer that has no quorum would be invalidated, and with it all
            # commits: they would wait for ever.
            forced["max_slot_wal_keep_size"] = "-1"
            if settings.get("wal_keep_size") == _KEEP_FOR_EVER:
                forced["wal_keep_size"] = _KEEP_SIZE
    return forced | _limits(settings, node)


def limits_in_use(settings: Mapping[str, str], forced: Mapping[str, str]) -> dict[str, int]:
    """The values of TRACKED_LIMITS that a server runs with; `forced` is its command line."""
    return {
        name: _integer(forced.get(name, settings.get(name)), _POSTGRES_DEFAULTS[name])
        for name in TRACKED_LIMITS
    }


def size_limit(settings: Mapping[str, str], name: str) -> int | None:
    """A limit in whole MB, as Postgres understands the setting, in bytes; 0 means no limit.

    None if Postgres refuses the value: it goes on with the one before.
    """
    match = _SIZE.fullmatch(settings.get(name, "-1"))
    try:
        megabytes = None if match is None else round(_number(match[1]) * _UNITS[match[2] or "MB"])
    except (ValueError, OverflowError):
        return None
    if megabytes is None or not -1 <= megabytes <= _INT_MAX:
        return None
    return max(megabytes, 0) << 20


def _limits(settings: Mapping[str, str], node: Node) -> dict[str, str]:
    """The limits that the user's settings are too low for, raised."""
    needed = dict(_OWN_NEEDS)
    if node.standby_name is None:
        for name in TRACKED_LIMITS:
            needed[name] = max(needed.get(name, 0), node.tracked.get(name, 0))
    needed["max_prepared_transactions"] = max(
        needed.get("max_prepared_transactions", 0), node.prepared
    )
    return {
        name: str(least)
        for name, least in needed.items()
        if _integer(settings.get(name), _POSTGRES_DEFAULTS[name]) < least
    }


def preload_libraries(users: str, library: str) -> str:
    """The user's list with `zenith`, by name or path, replaced by our build, which comes first."""
    names = [name.strip().strip('"') for name in users.split(",")]
    others = [name for name in names if name and PurePath(name).name.split(".")[0] != "zenith"]
    return ",".join(_listed(name) for name in (library, *others))


def _listed(name: str) -> str:
    """An element of a list setting, quoted where it needs to be (SplitDirectoriesString)."""
    return f'"{name}"' if "," in name or name != name.strip() else name


def with_loopback(addresses: str) -> str:
    """The user's addresses and the one that the walproposer and the command line connect to."""
    names = [name.strip() for name in addresses.split(",") if name.strip()]
    if not _EVERY_ADDRESS.isdisjoint(names):
        return addresses
    return ",".join(["127.0.0.1", *names])


def _unquoted(value: str) -> str:
    """The value as Postgres takes it (DeescapeQuotedString in guc-file.l)."""
    if not value.startswith("'"):
        return value
    return _ESCAPE.sub(_unescaped, value[1:-1])


def _unescaped(match: re.Match[str]) -> str:
    text = match[1]
    if text is None:
        return "'"
    return chr(int(text, 8) & 0xFF) if text[0] in "01234567" else _ESCAPED.get(text, text)


def _integer(text: str | None, default: int) -> int:
    """An integer setting as Postgres reads it: decimal, octal, hexadecimal or rounded."""
    if text is None:
        return default
    try:
        return round(_number(text.strip()))
    except (ValueError, OverflowError):
        return default


def _number(text: str) -> float:
    """A number as strtol(3) with any base or strtod(3) reads it; raises ValueError."""
    digits = text.lstrip("+-").lower()
    if digits.startswith("0") and digits.isdecimal():
        return int(text, 8)
    return int(text, 16) if digits.startswith("0x") else float(text)
