"""What the handlers of single WAL records work with."""

from collections.abc import Callable
from dataclasses import dataclass

from pageserver.pgdatadir_mapping import DatadirTimeline
from postgres_ffi.versions import PgVersion


class IngestError(Exception):
    """A WAL record that cannot be ingested; the message names it and says why."""


@dataclass(slots=True)
class IngestContext:
    """Surroundings of the record in hand.

    `publish()` makes everything before the record readable through `datadir` and returns the LSN
    to read it at. `early_offsets_page` is the page of multixact offsets that was created by a
    CREATE_ID before its ZERO_OFF_PAGE record, which then must not clear it.
    """

    datadir: DatadirTimeline
    version: PgVersion
    publish: Callable[[], int]
    early_offsets_page: int | None = None
