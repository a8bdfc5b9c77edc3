"""Writing a tar archive as a stream of parts, without files and without seeking."""

from __future__ import annotations

import tarfile
from collections.abc import Callable

Part = bytes | bytearray | memoryview

# Big parts are cut, so that a receiver needs no big buffer for one message.
MAX_MESSAGE = 1 << 20
_PADDING = bytes(tarfile.BLOCKSIZE)


class TarStream:
    """A GNU format archive, handed piece by piece to ``send(*parts)``.

    Files get mode 0600, directories 0700, all the modification time ``mtime`` (Unix seconds).
    """

    def __init__(self, send: Callable[..., None], mtime: int) -> None:
        self._send = send
        self._mtime = mtime

    def directory(self, name: str) -> None:
        """Adds a directory."""
        self._send(self._header(name, 0, tarfile.DIRTYPE, 0o700))

    def file(self, name: str, *parts: Part) -> None:
        """Adds a file whose content is ``parts`` in order."""
        size = sum(map(len, parts))
        header = self._header(name, size, tarfile.REGTYPE, 0o600)
        padding = _PADDING[: -size % tarfile.BLOCKSIZE]
        if size <= MAX_MESSAGE:
            self._send(header, *parts, padding)
            return
        self._send(header)
        for part in parts:
            self._send_cut(part)
        self._send(padding)

    def end(self) -> None:
        """Ends the archive: two blocks of zeros."""
        self._send(_PADDING, _PADDING)

    def _send_cut(self, part: Part) -> None:
        view = memoryview(part)
        for start in range(0, len(view), MAX_MESSAGE):
            self._send(view[start : start + MAX_MESSAGE])

    def _header(self, name: str, size: int, kind: bytes, mode: int) -> bytes:
        entry = tarfile.TarInfo(name)
        entry.size, entry.type, entry.mode, entry.mtime = size, kind, mode, self._mtime
        return entry.tobuf(tarfile.GNU_FORMAT)
