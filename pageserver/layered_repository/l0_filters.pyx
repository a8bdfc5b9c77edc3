"""Whether any L0 delta may hold a key: the filters of all of them at once.

L0 deltas cover all keys, so a read has to ask each one's filter, of which the line it needs is
rarely in the processor's cache. Asked one after the other every one costs a wait for memory; here
all lines are fetched first and looked at then, so the waits are one.
"""
from libc.stdint cimport uint8_t, uint64_t

from pageserver.layered_repository.key cimport Key
from pageserver.layered_repository.key_filter cimport (
    filter_hash,
    filter_line,
    filter_line_may_contain,
)
from pageserver.layered_repository.layer_file cimport LayerFile
from pageserver.layered_repository.layer_map cimport LayerMap
from pageserver.layered_repository.layer_treap cimport Tree
from pageserver.layered_repository.open_layer cimport OpenLayer

cdef extern from *:
    void __builtin_prefetch(const void *p) noexcept nogil

cdef enum:
    LINES_AT_ONCE = 32        # more than processors fetch at a time

cdef struct Probe:
    uint64_t hash             # of the key
    uint64_t upper
    int n
    const uint8_t *lines[LINES_AT_ONCE]


cdef bint l0_may_contain(LayerMap layers, const Key *key, uint64_t upper) except -1:
    """False only if no L0 delta that begins at or below `upper` has a value of the key.

    For a map of LayerFiles. True where a file is not open: the walk opens it.
    """
    cdef Probe probe
    if layers.l0 is None:
        return False
    probe.hash = filter_hash(key)
    probe.upper = upper
    probe.n = 0
    return ask_tree(layers.l0, &probe) or ask_lines(&probe)


cdef bint ask_tree(Tree tree, Probe *probe) except -1:
    """Fetch the lines of a tree's layers; True as soon as one may contain the key.

    The GIL is held until they have been looked at, so none of the files is closed meanwhile.
    """
    cdef LayerFile layer
    cdef OpenLayer opened
    while tree is not None:
        if tree.item.start_lsn <= probe.upper:
            layer = <LayerFile?> tree.item.layer
            opened = layer.opened
            if opened is None or opened.filter == NULL:
                return True
            layer.used = True
            probe.lines[probe.n] = opened.filter + filter_line(probe.hash, opened.filter_lines)
            __builtin_prefetch(probe.lines[probe.n])
            probe.n += 1
            if probe.n == LINES_AT_ONCE and ask_lines(probe):
                return True
            if tree.right is not None and ask_tree(tree.right, probe):
                return True
        tree = tree.left
    return False


cdef bint ask_lines(Probe *probe) noexcept:
    """Look at the lines that were fetched."""
    cdef int i
    for i in range(probe.n):
        if filter_line_may_contain(probe.lines[i], probe.hash):
            return True
    probe.n = 0
    return False
