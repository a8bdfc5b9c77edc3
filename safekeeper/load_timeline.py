"""From what is on disk to a timeline that may be used, also when a part of that is lost or damaged.

A full member of a quorum must never come back with less than it has promised or acknowledged. So
whatever is wrong, the timeline first becomes `recovering` in its control file: from then on it
gives no votes and counts for nobody until a leader has brought it up to what is committed. Then its
files are cut to what is known to be good; what is cut is put aside.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from safekeeper import control_file
from safekeeper.consensus import ControlState
from safekeeper.control_file import CONTROL_FILE_NAME, ControlFileDamagedError, ControlFileError
from safekeeper.set_aside import set_all_aside, set_wal_aside
from safekeeper.timeline_registry import TimelineRegistry
from safekeeper.wal_files import WalDamagedError
from safekeeper.wal_storage import WalStorage, wal_magic
from zenith_utils.durable import fsync_dir
from zenith_utils.ids import TenantTimelineId
from zenith_utils.lsn import lsn_text

logger = logging.getLogger(__name__)


def load_state(
    timeline_id: TenantTimelineId, directory: Path, registry: TimelineRegistry, *, sync: bool
) -> ControlState:
    """The control file; one that is lost or damaged is replaced, and all WAL put aside.

    Raises FileNotFoundError (no such timeline here), ControlFileError (of another timeline or
    version), RegistryError, OSError.
    """
    promised = registry.term(timeline_id)
    path = directory / CONTROL_FILE_NAME
    try:
        state = control_file.load(path, sync=sync)
    except FileNotFoundError:
        if promised is None:
            raise
        return _lost(timeline_id, directory, promised, f"{path} is gone", sync=sync)
    except ControlFileDamagedError as e:
        return _lost(timeline_id, directory, promised or 0, str(e), sync=sync)
    if (state.tenant_id, state.timeline_id) != timeline_id:
        raise ControlFileError(f"{path} belongs to timeline {state.tenant_id}-{state.timeline_id}")
    registry.note(timeline_id, state.term)
    # An older control file may have been put back: what was promised since still holds.
    return replace(state, term=max(state.term, promised or 0))


def open_wal(
    directory: Path, state: ControlState, storage: WalStorage, *, sync: bool
) -> ControlState:
    """Find the end of WAL; what is damaged is cut off. The state that holds then.

    Raises WalStorageError, OSError.
    """
    magic = wal_magic(state.server.pg_version)
    try:
        storage.open(state.commit_lsn, magic)
    except WalDamagedError as e:
        state = after_damage(state, e.good_end)
        control_file.store(directory, state, sync=sync)
        aside = set_wal_aside(directory, e.good_end, sync=sync)
        logger.error(
            "timeline %s-%s: %s; WAL from %s on is put aside in %s, and there are no votes before "
            "a leader has brought it back from other safekeepers",
            state.tenant_id, state.timeline_id, e, lsn_text(e.good_end), aside,
        )  # fmt: skip
        storage.open(state.commit_lsn, magic)
    return state


def after_damage(state: ControlState, good_end: int) -> ControlState:
    """The state of a timeline whose WAL is good up to an LSN only: it is recovering."""
    return replace(state, recovering=True, commit_lsn=min(state.commit_lsn, good_end))


def _lost(
    timeline_id: TenantTimelineId, directory: Path, term: int, reason: str, *, sync: bool
) -> ControlState:
    """Begin again without history and WAL, but with the highest term that was promised."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = set_all_aside(directory, sync=sync)
    state = ControlState(*timeline_id, term=term, recovering=True)
    control_file.store(directory, state, sync=sync)
    if sync:
        fsync_dir(directory.parent)
        fsync_dir(directory.parent.parent)
    logger.error(
        "timeline %s: %s; what is left of it is put aside in %s, and there are no votes before a "
        "leader has brought it back from other safekeepers",
        timeline_id, reason, aside,
    )  # fmt: skip
    return state
