"""Counting values into the buckets of a histogram, cheaply enough for the hottest paths."""
from libc.math cimport isnan
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline void count_one(uint64_t *counter) {
        __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
    }
    static inline uint64_t count_read(const uint64_t *counter) {
        return __atomic_load_n(counter, __ATOMIC_RELAXED);
    }
    /* Adds to a double that is kept as its bits. */
    static inline void sum_add(uint64_t *bits, double value) {
        uint64_t seen = __atomic_load_n(bits, __ATOMIC_RELAXED), wanted;
        double sum;
        do {
            memcpy(&sum, &seen, 8);
            sum += value;
            memcpy(&wanted, &sum, 8);
        } while (!__atomic_compare_exchange_n(bits, &seen, wanted, 1, __ATOMIC_RELAXED,
                                              __ATOMIC_RELAXED));
    }
    """
    void count_one(uint64_t *counter) noexcept nogil
    uint64_t count_read(const uint64_t *counter) noexcept nogil
    void sum_add(uint64_t *bits, double value) noexcept nogil


cdef class HistogramCell:
    """One histogram: `bounds` ascending, each bucket up to and including its bound.

    Any number of threads may add values, with the GIL or without. A reader beside them may be a few
    values behind.
    """

    def __cinit__(self, bounds):
        cdef int i
        self.bounds = tuple(float(bound) for bound in bounds)
        if not self.bounds or any(a >= b for a, b in zip(self.bounds, self.bounds[1:])):
            raise ValueError(f"the bounds of a histogram must ascend: {self.bounds}")
        self.n = len(self.bounds)
        self.limits = <double *> calloc(self.n, sizeof(double))
        self.counts = <uint64_t *> calloc(self.n + 1, sizeof(uint64_t))
        if self.limits == NULL or self.counts == NULL:
            raise MemoryError
        for i in range(self.n):
            self.limits[i] = self.bounds[i]

    def __dealloc__(self):
        free(self.limits)
        free(self.counts)

    cdef void add(self, double value) noexcept nogil:
        cdef int i = 0
        if isnan(value):
            return
        while i < self.n and value > self.limits[i]:
            i += 1
        count_one(&self.counts[i])
        sum_add(&self.total, value)

    def observe(self, double value):
        """Count a value; one that is no number is ignored."""
        self.add(value)

    def snapshot(self):
        """(number of values in each bucket, the last of them beyond all bounds; their sum)."""
        cdef uint64_t bits = count_read(&self.total)
        cdef double total
        memcpy(&total, &bits, 8)
        return [count_read(&self.counts[i]) for i in range(self.n + 1)], total
