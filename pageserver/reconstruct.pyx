"""Values from their images and records: Postgres' redo and the changes applied in-process."""
from typing import Protocol

cimport cython
from libc.stdint cimport uint8_t

from zenith_utils.unaligned cimport get32_big

from pageserver import keys
from pageserver._custom_redo import apply_custom_records
from pageserver.walredo import RedoRequest
from postgres_ffi.page import ZERO_PAGE
from zenith_utils.lsn import lsn_text

cdef enum:
    WILL_INIT = 1    # bit of the flags, see values.py
    PG_RECORD = 1    # ValueKind.PG_RECORD
    KEY_SIZE = 18
    RELATION = 0     # KeyKind.RELATION
    LAST_FORK = 3


class ReconstructError(Exception):
    """A value cannot be made of what is stored; the message names key and LSN."""


class PageRedo(Protocol):
    """Applies Postgres records to pages; `WalRedoPool` does."""

    def redo(self, requests):
        """The rebuilt pages, in the order of the requests."""
        ...


@cython.final
@cython.freelist(256)
cdef class Work:
    """A page on its way: `page` is as of records[done], None before an initialising record."""

    cdef object input
    cdef list records
    cdef bytes page
    cdef Py_ssize_t done


def make_reconstruct(object redo not None):
    """The callback of the value store; it raises ReconstructError and WalRedoError.

    Pages are rebuilt together: each round takes the next run of Postgres records of every page
    that has one to the redo processes in one call.
    """

    def reconstruct(inputs):
        cdef list works = [start(value) for value in inputs]
        cdef list waiting, pages
        cdef Work work
        cdef Py_ssize_t i
        while True:
            waiting, requests = [], []
            for work in works:
                if apply_custom(work):
                    requests.append(redo_request(work))
                    waiting.append(work)
            if not waiting:
                return [page_of(work) for work in works]
            pages = redo.redo(requests)
            if len(pages) != len(waiting):
                raise ReconstructError(f"{len(pages)} pages were rebuilt, not {len(waiting)}")
            for i in range(len(waiting)):
                (<Work> waiting[i]).page = pages[i]

    return reconstruct


cdef inline bint is_postgres(tuple record) except -1:
    return <long> record[1] >> 1 == PG_RECORD


cdef Work start(object value):
    cdef Work work = Work.__new__(Work)
    work.input = value
    work.records = value.records
    work.page = value.base
    if work.page is None:
        if not work.records or not <long> work.records[0][1] & WILL_INIT:
            raise error(value, "there is nothing to apply the records to")
    elif not work.page:
        work.page = ZERO_PAGE
    return work


cdef bytes page_of(Work work):
    if work.page is None:
        raise error(work.input, "it has no image and no records")
    return work.page


cdef bint apply_custom(Work work) except -1:
    """Apply the records before the next one of Postgres; whether there is one."""
    cdef Py_ssize_t end = work.done
    while end < len(work.records) and not is_postgres(work.records[end]):
        end += 1
    if end > work.done:
        base = ZERO_PAGE if work.page is None else work.page
        try:
            work.page = apply_custom_records(base, work.records[work.done:end])
        except ValueError as e:
            raise error(work.input, str(e)) from e
        work.done = end
    return end < len(work.records)


cdef object redo_request(Work work):
    """The request for the run of Postgres records that comes next, which counts as done then."""
    cdef list records = []
    cdef tuple record
    cdef bytes key = work.input.key
    cdef const uint8_t *k = key
    # The key of a relation block, see keys.py.
    if len(key) != KEY_SIZE or k[0] != RELATION or get32_big(k + 9) == 0 or k[13] > LAST_FORK:
        raise error(work.input, "it has Postgres records but is no block of a relation")
    while work.done < len(work.records):
        record = work.records[work.done]
        if not is_postgres(record):
            break
        records.append((record[0], record[2]))
        work.done += 1
    return RedoRequest(
        get32_big(k + 1), get32_big(k + 5), get32_big(k + 9), k[13], get32_big(k + 14),
        work.page, records,
    )


cdef object error(object value, str reason):
    return ReconstructError(
        f"cannot reconstruct {keys.key_text(value.key)} at {lsn_text(value.lsn)}: {reason}"
    )
