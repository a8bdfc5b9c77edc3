"""Relation files: the (tablespace, database, relation, fork) tag and its path in a data directory.

Names follow common/relpath.c: `<relnode>[_fsm|_vm|_init][.<segment>]`.
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from .versions import PgVersion

MAIN_FORKNUM = 0
FSM_FORKNUM = 1
VISIBILITYMAP_FORKNUM = 2
INIT_FORKNUM = 3
MAX_FORKNUM = INIT_FORKNUM

DEFAULTTABLESPACE_OID = 1663
GLOBALTABLESPACE_OID = 1664

RELSEG_SIZE = 131072  # blocks in one file of a relation: 1 GiB

_FORK_SUFFIXES = ("", "_fsm", "_vm", "_init")
_FORK_OF_SUFFIX = {suffix: forknum for forknum, suffix in enumerate(_FORK_SUFFIXES)}
_REL_FILE_NAME = re.compile(r"([1-9][0-9]{0,9})(_fsm|_vm|_init)?(?:\.([1-9][0-9]{0,5}))?", re.ASCII)
_OID = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)
_MAX_OID = 0xFFFFFFFF


class RelTag(NamedTuple):
    """One fork of a relation, as WAL names it; sorts in the order of storage keys."""

    spcnode: int
    dbnode: int
    relnode: int
    forknum: int

    def __str__(self) -> str:
        return f"{self.spcnode}/{self.dbnode}/{self.relnode}{fork_suffix(self.forknum)}"


def fork_suffix(forknum: int) -> str:
    """File name suffix of a fork, e.g. `_vm`; ValueError if there is no such fork."""
    if not 0 <= forknum <= MAX_FORKNUM:
        raise ValueError(f"no relation fork has number {forknum}")
    return _FORK_SUFFIXES[forknum]


def database_path(spcnode: int, dbnode: int, version: PgVersion) -> str:
    """Directory of a database in a tablespace, relative to the data directory."""
    if spcnode == GLOBALTABLESPACE_OID:
        return "global"
    if spcnode == DEFAULTTABLESPACE_OID:
        return f"base/{dbnode}"
    return f"pg_tblspc/{spcnode}/{version.tablespace_version_directory}/{dbnode}"


def relpath(rel: RelTag, version: PgVersion, segno: int = 0) -> str:
    """Path of one 1 GiB file of a relation fork, relative to the data directory."""
    directory = database_path(rel.spcnode, rel.dbnode, version)
    segment = f".{segno}" if segno else ""
    return f"{directory}/{rel.relnode}{fork_suffix(rel.forknum)}{segment}"


def parse_rel_file_name(name: str) -> tuple[int, int, int] | None:
    """(relnode, forknum, segment number) of a file name, None if it names no relation file.

    Temporary relations (`t<backend>_<relnode>`) are not storage's business: None.
    """
    match = _REL_FILE_NAME.fullmatch(name)
    if match is None or int(match[1]) > _MAX_OID:
        return None
    return int(match[1]), _FORK_OF_SUFFIX[match[2] or ""], int(match[3] or 0)


def parse_relpath(path: str, version: PgVersion) -> tuple[RelTag, int] | None:
    """(tag, segment number) of a path relative to the data directory, None if it is no relation."""
    parts = PurePosixPath(path).parts
    file = parse_rel_file_name(parts[-1]) if parts else None
    database = _parse_database(parts[:-1], version)
    if file is None or database is None:
        return None
    relnode, forknum, segno = file
    return RelTag(*database, relnode, forknum), segno


def _parse_database(parts: tuple[str, ...], version: PgVersion) -> tuple[int, int] | None:
    match parts:
        case ("global",):
            return GLOBALTABLESPACE_OID, 0
        case ("base", dbnode) if _is_oid(dbnode):
            return DEFAULTTABLESPACE_OID, int(dbnode)
        case ("pg_tblspc", spcnode, directory, dbnode) if (
            _is_oid(spcnode)
            and _is_oid(dbnode)
            and directory == version.tablespace_version_directory
        ):
            return int(spcnode), int(dbnode)
    return None


def _is_oid(text: str) -> bool:
    return _OID.fullmatch(text) is not None and int(text) <= _MAX_OID
