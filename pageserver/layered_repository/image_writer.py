"""Materialises a part of the key space as an image layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

from pageserver.layered_repository.errors import TimelineStopped
from pageserver.layered_repository.layer_name import KEY_SIZE, LayerName
from pageserver.layered_repository.layer_writer import LayerWriter
from pageserver.layered_repository.partitioning import Part

# Read at once: 1 MiB of pages. With more, readers wait longer for redo and for the interpreter.
BATCH_KEYS: Final = 128


def write_image(
    read: Callable[[Sequence[bytes]], list[bytes | None]],
    part: Part,
    lsn: int,
    writer: LayerWriter,
    stop: Callable[[], bool],
) -> LayerName:
    """Write the state of a part at `lsn`, that of its partitioning; returns the layer's name.

    `read` gives the values of keys at that LSN, None for one that does not exist: it is left out. A
    part without keys makes an empty image. The file is durable on return, under the temporary name
    of the writer. `stop` is asked between batches; TimelineStopped if it says so. After this or any
    other exception, that of `read` or OSError, the file is gone.
    """
    try:
        keys = _keys(part)
        while batch := list(islice(keys, BATCH_KEYS)):
            if stop():
                raise TimelineStopped("the writing of an image layer was stopped")
            writer.add_images(batch, lsn, read(batch))
        name = LayerName.image(part.start, part.end, lsn)
        writer.finish(name)
    except BaseException:
        # What cannot be removed is a temporary file all the same.
        with contextlib.suppress(OSError):
            writer.abort()
        raise
    return name


def _keys(part: Part) -> Iterator[bytes]:
    for start, end in part.ranges:
        for number in range(int.from_bytes(start, "big"), int.from_bytes(end, "big")):
            yield number.to_bytes(KEY_SIZE, "big")
