"""Exceptions of the value store; each names the object it is about."""

from __future__ import annotations

from pathlib import Path


class StoreError(Exception):
    """Base of everything the value store raises on purpose."""


class KeyNotFound(StoreError):
    """No value of the key at or below the LSN."""


class MissingBaseError(StoreError):
    """There are records for the key but nothing they could be applied to."""


class CorruptFileError(StoreError):
    """A file of the store does not hold what was written to it."""

    def __init__(self, path: Path | str, offset: int, reason: str) -> None:
        super().__init__(f"{path}: corrupt at offset {offset}: {reason}")
        self.path = Path(path)
        self.offset = offset
        self.reason = reason


class CorruptLayerError(CorruptFileError):
    """A layer file does not hold what was written to it."""


class CorruptMetadataError(CorruptFileError):
    """The metadata or the list of layers of a timeline does not hold what was written to it."""


class MissingFileError(StoreError):
    """A file that a timeline needs is not there."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: missing: {reason}")
        self.path = Path(path)
        self.reason = reason


class FormatVersionError(StoreError):
    """A file was written by a program with another format of files."""

    def __init__(self, path: Path | str, found: int, supported: int) -> None:
        super().__init__(f"{path}: format version {found}, this program reads {supported}")
        self.path = Path(path)
        self.found = found
        self.supported = supported


class LayerGoneError(StoreError):
    """A layer file was removed before it could be read; the current layer map knows others."""


class TimelineNotFound(StoreError):
    """The timeline is not in the repository."""


class TimelineExists(StoreError):
    """The timeline id is taken."""


class WaitLsnTimeout(StoreError):
    """The WAL up to an LSN did not arrive in time."""


class LsnNotReadable(StoreError):
    """The LSN is older than the history that is kept."""


class InvalidBranchLsn(StoreError):
    """A branch cannot start at this LSN."""


class TimelineStopped(StoreError):
    """The timeline was shut down."""
