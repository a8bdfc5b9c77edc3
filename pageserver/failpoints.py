"""The failpoints of the pageserver, set by its ``failpoints`` command."""

from __future__ import annotations

import logging
from typing import Final

from zenith_utils.failpoints import Failpoint, configure

log = logging.getLogger(__name__)

AFTER_INGEST: Final = Failpoint("walreceiver-after-ingest")
"""After each record that was ingested; it is visible then."""

BEFORE_SAVING_METADATA: Final = Failpoint("checkpoint-before-saving-metadata")
"""A frozen layer is in its files, which no list names and the metadata do not count yet."""

BEFORE_RENAME: Final = Failpoint("compaction-before-rename")
"""New layers of a compaction are complete under temporary names."""

BEFORE_DELETE: Final = Failpoint("layers-before-delete")
"""Layers that compaction or garbage collection replaced are in no list, their files still there."""

_ALL: Final = {
    point.name: point
    for point in (AFTER_INGEST, BEFORE_SAVING_METADATA, BEFORE_RENAME, BEFORE_DELETE)
}


def set_failpoints(text: str) -> None:
    """What failpoints do from now on, ``<name>=<action>[;...]``. Raises FailpointFormatError."""
    configure(_ALL, text)
    log.warning("failpoints set: %s", text)


def release_failpoints() -> None:
    """End what waits at failpoints, so that the pageserver can stop."""
    for point in _ALL.values():
        point.release()
