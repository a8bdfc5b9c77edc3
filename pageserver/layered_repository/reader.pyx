"""The read path: newest layer to oldest, then the ancestor at the branch point, then redo.

A walk holds the GIL while it looks for its way, a microsecond or so at a time, and while it takes
what a few keys find in memory: giving it up would take longer. It gives it up for more keys, and to
read from files. It holds no lock: what it reads belongs to the view of the timeline that it took. A
layer file of that view may be deleted before the walk opens it, because others have taken its
place; then there is a newer view, and the read starts again with that.
"""
from collections.abc import Callable, Sequence

cimport cython
from cython cimport dataclasses
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from pageserver.layered_repository.ephemeral_file cimport ReadWindow, window_free
from pageserver.layered_repository.gil cimport let_others_run
from pageserver.layered_repository.inmemory_layer cimport READ_OK, InMemoryLayer
from pageserver.layered_repository.key cimport FLAGS_IMAGE, WILL_INIT, key_bytes, key_less
from pageserver.layered_repository.key_list cimport KeyList
from pageserver.layered_repository.l0_filters cimport l0_may_contain
from pageserver.layered_repository.layer_file cimport LayerFile
from pageserver.layered_repository.layer_map cimport Found as Candidates
from pageserver.layered_repository.layer_map cimport LayerMap, choose
from pageserver.layered_repository.layer_treap cimport Item
from pageserver.layered_repository.open_layer cimport OpenLayer, ReadError
from pageserver.layered_repository.page_cache cimport TimelineCache
from pageserver.layered_repository.read_batch cimport Found, Query, ReadBatch

from pageserver.layered_repository.errors import (
    KeyNotFound,
    LayerGoneError,
    MissingBaseError,
    StoreError,
)
from zenith_utils.lsn import lsn_text

cdef enum:
    KEYS_PER_WALK = 1024      # bounds the memory of a read of very many keys
    FEW_KEYS = 16             # so many are looked for in memory with the GIL held
    VALUES_PER_TURN = 32      # then other threads get a chance to run


@cython.final
@dataclasses.dataclass(frozen=True, eq=False)
cdef class ReadView:
    """All layers of a timeline at one moment; readers keep the view they started with.

    `frozen` are InMemoryLayers, the newest first; `layers` is a LayerMap of LayerFiles.
    """

    open: InMemoryLayer
    frozen: tuple
    layers: LayerMap


@cython.final
@dataclasses.dataclass(frozen=True)
cdef class ReconstructInput:
    """What a value is made of: `records` (lsn, flags, data), oldest first, applied to `base`.

    `base` is None if the oldest record initialises the value. `lsn` is that of the newest record.
    """

    key: bytes
    lsn: object
    base: object
    records: list


Reconstruct = Callable[[Sequence[ReconstructInput]], list[bytes]]


# ---- reading values

def get(object timeline not None, bytes key not None, uint64_t lsn):
    """The value of a key; see Timeline.get."""
    cdef ReadBatch batch
    cdef tuple cached
    cdef object value
    cdef list needed = []
    cdef TimelineCache rebuilt = timeline.rebuilt
    while True:
        batch = ReadBatch.__new__(ReadBatch)
        batch.add_key(key)
        cached = rebuilt.get(key, lsn)
        if cached is not None:
            if <uint64_t> cached[0] == lsn:
                return cached[1]
            batch.need_above(0, cached[0])
        if collect(timeline, batch, lsn):
            break
    value = value_of(batch, 0, cached, lsn, needed)
    if value is not None:
        return value
    if not needed:
        raise KeyNotFound(
            f"could not find data for key {key.hex().upper()} of timeline {timeline.timeline_id} "
            f"for request at LSN {lsn_text(lsn)}"
        )
    return reconstruct(timeline, needed, True)[0]


def get_vectored(object timeline not None, object keys not None, uint64_t lsn, *,
                 bint cache=True):
    """The values of many keys; see Timeline.get_vectored.

    With `cache` what has to be reconstructed is kept in the page cache and what is read from layer
    files in the block cache. More than 1024 keys are read in several walks.
    """
    cdef Py_ssize_t start, count = len(keys)
    cdef list values = []
    if count <= KEYS_PER_WALK:
        return read_some(timeline, keys, lsn, cache)
    for start in range(0, count, KEYS_PER_WALK):
        values += read_some(timeline, keys[start:start + KEYS_PER_WALK], lsn, cache)
    return values


cdef list read_some(object timeline, object keys, uint64_t lsn, bint cache):
    """The values of keys in any order."""
    cdef ReadBatch batch = ReadBatch.__new__(ReadBatch, keys)
    cdef list ordered
    cdef dict by_key
    if batch.ascending:
        return read_ascending(timeline, keys, batch, lsn, cache)
    ordered = sorted(set(keys))
    batch = ReadBatch.__new__(ReadBatch, ordered)
    by_key = dict(zip(ordered, read_ascending(timeline, ordered, batch, lsn, cache)))
    return [by_key[key] for key in keys]


cdef list read_ascending(object timeline, object keys, ReadBatch batch, uint64_t lsn, bint cache):
    """The values of keys that ascend; `batch` is a new one of these keys."""
    cdef TimelineCache rebuilt = timeline.rebuilt
    cdef list cached, values = [], needed = [], places = []
    cdef object value
    cdef tuple version
    cdef int i
    while True:
        batch.keeps_blocks = cache
        cached = []
        for i in range(batch.count):
            version = rebuilt.get(<bytes> keys[i], lsn)
            cached.append(version)
            if version is not None:
                batch.need_above(i, version[0])
        if collect(timeline, batch, lsn):
            break
        batch = ReadBatch.__new__(ReadBatch, keys)
    for i in range(batch.count):
        value = value_of(batch, i, cached[i], lsn, needed)
        values.append(value)
        if len(needed) > len(places):
            places.append(i)
        if i % VALUES_PER_TURN == 0:
            let_others_run()
    batch = None
    if needed:
        for i, value in zip(places, reconstruct(timeline, needed, cache)):
            values[i] = value
    return values


cdef object value_of(ReadBatch batch, int i, tuple cached, uint64_t lsn, list needed):
    """The value of query `i` after the walk, None if there is none or if it has to be made.

    In the latter case what that takes is appended to `needed`.
    """
    cdef Query *query = &batch.queries[i]
    cdef Found *newest
    cdef Found *oldest
    cdef object base = None
    cdef list records
    if query.newest < 0:
        return cached[1] if query.based else None
    newest = &batch.found[query.newest]
    if newest.flags == FLAGS_IMAGE:
        return batch.data(newest)
    oldest = &batch.found[query.oldest]
    records = batch.values(i)
    if oldest.flags == FLAGS_IMAGE:
        base = records.pop(0)[2]
    elif not oldest.flags & WILL_INIT:
        if not query.based:
            raise MissingBaseError(
                f"Base image for {key_bytes(&query.key).hex().upper()} at {lsn_text(lsn)} "
                f"not found, but got {len(records)} WAL records"
            )
        base = cached[1]
    needed.append(ReconstructInput(key_bytes(&query.key), newest.lsn, base, records))
    return None


cdef list reconstruct(object timeline, list needed, bint cache):
    cdef list values = timeline.reconstruct(needed)
    cdef TimelineCache rebuilt = timeline.rebuilt
    cdef ReconstructInput item
    cdef Py_ssize_t i
    if len(values) != len(needed):
        raise StoreError(f"{len(values)} values were reconstructed instead of {len(needed)}")
    if cache:
        for i in range(len(needed)):
            item = needed[i]
            # What an unfinished batch wrote may still be replaced.
            if item.lsn <= timeline.last_record_lsn:
                rebuilt.put(item.key, <uint64_t> item.lsn, <bytes?> values[i])
    return values


# ---- the walk

cdef bint collect(object timeline, ReadBatch batch, uint64_t lsn) except -1:
    """Find the values of all queries of a new batch (keys ascending) at or below an LSN.

    False if a layer was deleted meanwhile: start again with a new batch.
    """
    cdef uint64_t upper = lsn, ancestor_lsn
    cdef ReadView view
    while True:
        ancestor_lsn = timeline.ancestor_lsn
        batch.close_at(0, batch.count, upper)
        if upper > ancestor_lsn and batch.pending:
            view = timeline.view
            try:
                collect_here(view, batch, upper)
            except LayerGoneError:
                if timeline.view is view:
                    raise
                return False
        if batch.pending == 0:
            return True
        if timeline.ancestor is None:
            # Nothing is older than the bases.
            batch.close_at(0, batch.count, 0)
            return True
        upper = min(upper, ancestor_lsn)
        timeline = ancestor_at(timeline, upper)


cdef object ancestor_at(object timeline, uint64_t lsn):
    """The ancestor, as soon as it can be read at an LSN."""
    timeline = timeline.ancestor
    if timeline.last_record_lsn < lsn:
        # It was restarted and has not got its WAL back yet.
        timeline.wait_lsn(lsn, timeline.settings.wait_lsn_timeout)
    return timeline


cdef int collect_here(ReadView view, ReadBatch batch, uint64_t upper) except -1:
    """Find the values in the layers of one timeline."""
    cdef InMemoryLayer layer
    upper = collect_in_memory(view.open, batch, upper)
    for layer in view.frozen:
        if batch.pending == 0:
            return 0
        upper = collect_in_memory(layer, batch, upper)
    if upper and batch.pending:
        collect_in_files(view.layers, batch, upper)
    return 0


cdef uint64_t collect_in_memory(InMemoryLayer layer, ReadBatch batch, uint64_t upper) except? 0:
    """Find the values in a layer in memory; the LSN to go on at is returned."""
    cdef ReadWindow window
    cdef int code
    if upper < layer.start_lsn:
        return upper
    if layer.max_lsn:
        memset(&window, 0, sizeof(window))
        if batch.count <= FEW_KEYS and (layer.file is None or layer.file.size == 0):
            code = layer.collect(batch, 0, batch.count, upper, 0, &window)
            window_free(&window)
        else:
            with nogil:
                code = layer.collect(batch, 0, batch.count, upper, 0, &window)
                window_free(&window)
        if code != READ_OK:
            layer.raise_read_error(code, &window)
    if layer.start_lsn == 0:
        return 0
    batch.close_at(0, batch.count, layer.start_lsn - 1)
    return layer.start_lsn - 1


cdef struct Span:             # of queries that are to be looked for at or below an LSN
    int first
    int last
    uint64_t upper


cdef int collect_in_files(LayerMap layers, ReadBatch batch, uint64_t upper) except -1:
    """Find the values in layer files.

    Queries with the same layers before them go together. Spans yet to be walked never overlap, so
    there are never more of them than queries.
    """
    cdef Span one
    cdef Span *spans = &one
    cdef Span span
    cdef int n = 1
    if batch.count > 1:
        spans = <Span *> malloc(batch.count * sizeof(Span))
        if spans == NULL:
            raise MemoryError
    try:
        spans[0] = Span(0, batch.count, upper)
        while n:
            n -= 1
            span = spans[n]
            while span.first < span.last and batch.queries[span.first].complete:
                span.first += 1
            if span.first < span.last:
                collect_span(layers, batch, span, spans, &n)
    finally:
        if spans != &one:
            free(spans)
    return 0


cdef int collect_span(LayerMap layers, ReadBatch batch, Span span, Span *spans,
                      int *n) except -1:
    """Walk the first queries of a span down to where their layers have to be searched again.

    Pushes what is left of the span. The span has a query, the first one is not complete.
    """
    cdef Candidates candidates
    cdef Item image, delta, l0, item
    cdef uint64_t floor = 0
    cdef bint in_l0
    cdef int last = common_candidates(layers, batch, span, &candidates)
    if last < span.last:
        spans[n[0]] = Span(last, span.last, span.upper)
        n[0] += 1
        span.last = last
    image = None if candidates.image == NULL else <Item> candidates.image
    delta = None if candidates.delta == NULL else <Item> candidates.delta
    # Of a single key; those of a batch share the way, and what each file says of them.
    in_l0 = span.last - span.first > 1 or l0_may_contain(
        layers, &batch.queries[span.first].key, span.upper)
    while True:
        l0 = layers.newest_l0(span.upper) if in_l0 else None
        item = choose(image, delta, l0, span.upper, &floor)
        if item is None:
            return 0
        if item is image:
            # It holds every key of its range that exists: nothing older counts.
            batch.close_at(span.first, span.last, floor)
            if batch.any_pending(span.first, span.last):
                collect_in_file(<LayerFile?> item.layer, batch, span, floor)
                batch.close(span.first, span.last)
            return 0
        collect_in_file(<LayerFile?> item.layer, batch, span, floor)
        span.upper = floor - 1
        batch.close_at(span.first, span.last, span.upper)
        if span.upper == 0 or not batch.any_pending(span.first, span.last):
            return 0
        if item is delta or (delta is not None and span.upper < delta.start_lsn):
            spans[n[0]] = span
            n[0] += 1
            return 0


cdef int common_candidates(LayerMap layers, ReadBatch batch, Span span,
                           Candidates *candidates) except -1:
    """Search for the layers of the first query of a span; the end of those that have the same."""
    cdef Candidates other
    cdef int i
    layers.find(&batch.queries[span.first].key, span.upper, candidates)
    other = candidates[0]
    for i in range(span.first + 1, span.last):
        if batch.queries[i].complete:
            continue
        if not other.bordered:
            return span.last
        if key_less(&batch.queries[i].key, &other.border):
            continue
        layers.find(&batch.queries[i].key, span.upper, &other)
        if other.image != candidates.image or other.delta != candidates.delta:
            return i
    return span.last


cdef int collect_in_file(LayerFile layer, ReadBatch batch, Span span, uint64_t floor) except -1:
    """Find the values with floor <= LSN <= span.upper in one layer file."""
    cdef OpenLayer opened = layer.opened
    cdef ReadError error
    cdef int code
    if opened is None:
        opened = layer.open()
    layer.used = True
    if span.last - span.first <= FEW_KEYS:
        while batch.queries[span.first].complete \
                or not opened.may_contain(&batch.queries[span.first].key):
            span.first += 1
            if span.first == span.last:
                return 0
        code = opened.collect_cached(batch, span.first, span.last, span.upper, floor, &error)
    else:
        with nogil:
            code = opened.collect(batch, span.first, span.last, span.upper, floor, &error)
    if code != 0:
        opened.raise_error(&error)
    return 0


# ---- listing keys

def scan_keys(object timeline not None, bytes start not None, bytes end not None, uint64_t lsn):
    """The keys in [start, end) that have a value; see Timeline.scan_keys."""
    cdef KeyList found = KeyList.__new__(KeyList)
    while not scan(timeline, start, end, lsn, found):
        found = KeyList.__new__(KeyList)
    return found.ascending()


cdef bint scan(object timeline, bytes start, bytes end, uint64_t upper, KeyList found) except -1:
    """Add the keys of a timeline and its ancestors; False if a layer was deleted meanwhile."""
    cdef list ranges = [(start, end)]
    cdef ReadView view
    while True:
        if upper > <uint64_t> timeline.ancestor_lsn:
            view = timeline.view
            try:
                ranges = scan_here(view, ranges, upper, found)
            except LayerGoneError:
                if timeline.view is view:
                    raise
                return False
        if not ranges or timeline.ancestor is None:
            return True
        upper = min(upper, <uint64_t> timeline.ancestor_lsn)
        timeline = ancestor_at(timeline, upper)


cdef list scan_here(ReadView view, list ranges, uint64_t upper, KeyList found):
    """Add the keys of one timeline; returns the ranges whose keys may be in the ancestor too."""
    cdef InMemoryLayer layer
    cdef bytes start, end, stop
    cdef list left = []
    for layer in (view.open, *view.frozen):
        for start, end in ranges:
            found.extend(layer.keys(start, end, upper))
        for start, end, lsn in layer.tombstones():
            if lsn <= upper:
                ranges = without(ranges, start, end)
    for start, end in ranges:
        while start < end:
            stop = view.layers.next_border(start)
            stop = end if stop is None else min(end, stop)
            if not scan_files(view.layers, start, stop, upper, found):
                left.append((start, stop))
            start = stop
    return left


cdef bint scan_files(LayerMap layers, bytes start, bytes end, uint64_t upper,
                     KeyList found) except -1:
    """Add the keys of a range within which no layer begins or ends.

    False if their history goes on in the ancestor.
    """
    cdef tuple hit
    while upper:
        hit = layers.search(start, upper)
        if hit is None:
            return False
        layer, floor = hit
        found.extend(layer.keys(start, end, upper, floor))
        if layer.is_image:
            return True
        upper = floor - 1
    return False


cdef list without(list ranges, bytes start, bytes end):
    """What is left of ranges of keys beside [start, end)."""
    cdef list left = []
    cdef bytes first, last
    for first, last in ranges:
        if end <= first or last <= start:
            left.append((first, last))
            continue
        if first < start:
            left.append((first, start))
        if end < last:
            left.append((end, last))
    return left
