"""What the system calls on the layer files of a timeline cost, counted without the GIL."""
from libc.stdint cimport uint64_t

from zenith_utils.histogram cimport HistogramCell

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>

    static inline double io_clock(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
    }
    static inline void io_add(uint64_t *sum, uint64_t more)
    {
        __atomic_fetch_add(sum, more, __ATOMIC_RELAXED);
    }
    """
    double io_clock() noexcept nogil
    void io_add(uint64_t *sum, uint64_t more) noexcept nogil


cdef double clock_seconds() noexcept nogil:
    """Seconds on a clock that only goes on; where `started` of the methods below comes from."""
    return io_clock()


cdef class IoStats:
    """Times in seconds of opening, reading, writing and syncing, and the bytes read and written.

    Any number of threads may count.
    """

    def __cinit__(self, HistogramCell open_time not None, HistogramCell read_time not None,
                  HistogramCell write_time not None, HistogramCell fsync_time not None):
        self.open_time = open_time
        self.read_time = read_time
        self.write_time = write_time
        self.fsync_time = fsync_time

    @property
    def bytes_read(self):
        """Bytes read so far."""
        return self.read

    @property
    def bytes_written(self):
        """Bytes written so far."""
        return self.written

    cdef void count_read(self, double started, size_t size) noexcept nogil:
        self.read_time.add(io_clock() - started)
        io_add(&self.read, size)

    cdef void count_write(self, double started, size_t size) noexcept nogil:
        self.write_time.add(io_clock() - started)
        io_add(&self.written, size)

    cdef void count_fsync(self, double started) noexcept nogil:
        self.fsync_time.add(io_clock() - started)
