"""The blocks a first connection reads, sent along with a base backup to save round trips.

The list is a hint: blocks that are missing here are fetched when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from postgres_ffi.relfile import (
    DEFAULTTABLESPACE_OID,
    GLOBALTABLESPACE_OID,
    MAIN_FORKNUM,
    RelTag,
)

MAX_BLOCKS = 200
FIRST_NORMAL_OID = 16384


class CatalogBlocks(NamedTuple):
    """How many leading blocks of a catalog, given by its oid, are hot."""

    oid: int
    blocks: int


class HotCatalogs(NamedTuple):
    """What a backend reads between its fork and its first answer, without a relcache file."""

    first_database: int  # the oid of the database "postgres"
    shared: tuple[CatalogBlocks, ...]
    database: tuple[CatalogBlocks, ...]


_HOT_15 = HotCatalogs(
    first_database=5,
    shared=(
        CatalogBlocks(1262, 1),  # pg_database and its indexes
        CatalogBlocks(2671, 2),
        CatalogBlocks(2672, 2),
        CatalogBlocks(1260, 1),  # pg_authid and its indexes
        CatalogBlocks(2676, 2),
        CatalogBlocks(2677, 2),
        CatalogBlocks(1213, 1),  # pg_tablespace and pg_tablespace_oid_index
        CatalogBlocks(2697, 2),
        CatalogBlocks(2965, 1),  # pg_db_role_setting_databaseid_rol_index
    ),
    database=(
        CatalogBlocks(1259, 14),  # pg_class and its indexes
        CatalogBlocks(2662, 4),
        CatalogBlocks(2663, 5),
        CatalogBlocks(1249, 30),  # pg_attribute and pg_attribute_relid_attnum_index
        CatalogBlocks(2659, 8),
        CatalogBlocks(2610, 4),  # pg_index and pg_index_indexrelid_index
        CatalogBlocks(2679, 2),
        CatalogBlocks(1247, 3),  # pg_type and pg_type_oid_index
        CatalogBlocks(2703, 4),
        CatalogBlocks(2601, 1),  # pg_am
        CatalogBlocks(2616, 2),  # pg_opclass and pg_opclass_oid_index
        CatalogBlocks(2687, 2),
        CatalogBlocks(2603, 5),  # pg_amproc and pg_amproc_fam_proc_index
        CatalogBlocks(2655, 4),
        CatalogBlocks(2615, 1),  # pg_namespace and its indexes
        CatalogBlocks(2684, 2),
        CatalogBlocks(2685, 2),
        CatalogBlocks(2690, 4),  # pg_proc_oid_index
        CatalogBlocks(2704, 5),  # pg_type_typname_nsp_index
        CatalogBlocks(2688, 4),  # pg_operator_oid_index and pg_operator_oprname_l_r_n_index
        CatalogBlocks(2689, 5),
        CatalogBlocks(2653, 4),  # indexes of pg_amop
        CatalogBlocks(2654, 4),
    ),
)
# Catalogs and their oids are the same from 15 on.
_HOT_CATALOGS: Mapping[int, HotCatalogs] = {15: _HOT_15}

Relmap = Callable[[int, int], Mapping[int, int]]
"""(spcnode, dbnode) -> {oid: relfilenode} of the catalogs mapped there."""


def startup_ranges(
    major: int, sizes: Mapping[RelTag, int], relmap: Relmap
) -> Iterator[tuple[RelTag, int]]:
    """(main fork, number of leading blocks) of the hot catalogs, MAX_BLOCKS at most in all.

    The shared catalogs, the database ``postgres``, then users' databases in the order of their
    oids. A catalog that is not mapped has its oid as relfilenode unless it was rewritten; then it
    is left out.
    """
    hot = _HOT_CATALOGS[major]
    databases = {rel.dbnode for rel in sizes if rel.spcnode == DEFAULTTABLESPACE_OID}
    places = [(GLOBALTABLESPACE_OID, 0, hot.shared)]
    places += [
        (DEFAULTTABLESPACE_OID, dbnode, hot.database)
        for dbnode in sorted(databases)
        if dbnode == hot.first_database or dbnode >= FIRST_NORMAL_OID
    ]
    left = MAX_BLOCKS
    for spcnode, dbnode, catalogs in places:
        mapped = relmap(spcnode, dbnode)
        for oid, blocks in catalogs:
            rel = RelTag(spcnode, dbnode, mapped.get(oid, oid), MAIN_FORKNUM)
            count = min(blocks, sizes.get(rel, 0), left)
            if count:
                yield rel, count
                left -= count
        if not left:
            return
