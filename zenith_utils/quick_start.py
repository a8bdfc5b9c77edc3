"""A daemon's start without garbage collections of its own imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """A `with` block in which the garbage collector rests.

    Importing makes tens of thousands of objects that stay: looking through them again and again
    takes a fifth of the time. Those that are there at the end are left out of later collections,
    which would find nothing in them either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
