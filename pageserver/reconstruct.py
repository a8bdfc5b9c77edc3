"""Values from their images and records: Postgres' redo and the changes applied in-process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pageserver import keys
from pageserver._custom_redo import apply_custom_records
from pageserver.layered_repository.reader import Reconstruct, ReconstructInput
from pageserver.values import WILL_INIT, ValueKind
from pageserver.walredo import RedoRequest
from postgres_ffi.page import ZERO_PAGE
from postgres_ffi.relfile import RelTag
from zenith_utils.lsn import lsn_text


class ReconstructError(Exception):
    """A value cannot be made of what is stored; the message names key and LSN."""


class PageRedo(Protocol):
    """Applies Postgres records to pages; `WalRedoPool` does."""

    def redo(self, requests: Sequence[RedoRequest]) -> list[bytes]:
        """The rebuilt pages, in the order of the requests."""
        ...


@dataclass(slots=True)
class _Work:
    """A page on its way: `page` is as of records[done], None before an initialising record."""

    input: ReconstructInput
    block: tuple[RelTag, int] | None
    page: bytes | None
    done: int = 0

    def finished(self) -> bool:
        return self.done == len(self.input.records)

    def next_is_postgres(self) -> bool:
        return not self.finished() and _is_postgres(self.input.records[self.done])

    def run_end(self) -> int:
        """Where the run of records of one sort that starts at `done` ends."""
        records = self.input.records
        sort, end = _is_postgres(records[self.done]), self.done + 1
        while end < len(records) and _is_postgres(records[end]) == sort:
            end += 1
        return end


def make_reconstruct(redo: PageRedo) -> Reconstruct:
    """The callback of the value store; it raises ReconstructError and WalRedoError.

    Pages are rebuilt together: each round takes the next run of Postgres records of every page
    that has one to the redo processes in one call.
    """

    def reconstruct(inputs: Sequence[ReconstructInput]) -> list[bytes]:
        works = [_start(value) for value in inputs]
        while True:
            for work in works:
                if not work.finished() and not work.next_is_postgres():
                    _apply_custom(work)
            waiting = [work for work in works if work.next_is_postgres()]
            if not waiting:
                return [_page_of(work) for work in works]
            pages = redo.redo([_redo_request(work) for work in waiting])
            for work, page in zip(waiting, pages, strict=True):
                work.page, work.done = page, work.run_end()

    return reconstruct


def _start(value: ReconstructInput) -> _Work:
    if value.base is None and not (value.records and value.records[0][1] & WILL_INIT):
        raise _error(value, "there is nothing to apply the records to")
    page = ZERO_PAGE if value.base == b"" else value.base
    return _Work(value, keys.block_of_key(value.key), page)


def _page_of(work: _Work) -> bytes:
    if work.page is None:
        raise _error(work.input, "it has no image and no records")
    return work.page


def _apply_custom(work: _Work) -> None:
    end = work.run_end()
    base = ZERO_PAGE if work.page is None else work.page
    try:
        work.page = apply_custom_records(base, work.input.records[work.done : end])
    except ValueError as error:
        raise _error(work.input, str(error)) from error
    work.done = end


def _redo_request(work: _Work) -> RedoRequest:
    if work.block is None:
        raise _error(work.input, "it has Postgres records but is no block of a relation")
    rel, blkno = work.block
    records = [(lsn, data) for lsn, _, data in work.input.records[work.done : work.run_end()]]
    return RedoRequest(*rel, blkno, work.page, records)


def _is_postgres(record: tuple[int, int, bytes]) -> bool:
    return record[1] >> 1 == ValueKind.PG_RECORD


def _error(value: ReconstructInput, reason: str) -> ReconstructError:
    return ReconstructError(
        f"cannot reconstruct {keys.key_text(value.key)} at {lsn_text(value.lsn)}: {reason}"
    )
