"""Sharing the GIL from within long loops."""


cdef inline void let_others_run() noexcept:
    """Give way to threads that wait for the GIL."""
    with nogil:
        pass
