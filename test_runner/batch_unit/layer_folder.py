"""A directory of layer files made by hand, for tests of what reads some and writes others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pageserver.layered_repository.files import FILES, Files
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter

Entry = tuple[bytes, int, int, bytes]
TENANT, TIMELINE = b"a" * 16, b"b" * 16


def key(number: int) -> bytes:
    """A key by its number."""
    return number.to_bytes(18, "big")


def never() -> bool:
    """Whether to stop."""
    return False


@dataclass
class LayerFolder:
    """A directory of layers."""

    path: Path
    files: Files = FILES
    compress: bool = False
    made: int = 0
    paths: list[Path] = field(default_factory=list)

    def new_writer(self) -> LayerWriter:
        """A writer of the next temporary file."""
        self.made += 1
        path = self.path / f"{self.made}.temp"
        self.paths.append(path)
        return LayerWriter(path, TENANT, TIMELINE, files=self.files, compress=self.compress)

    def layer(self, name: LayerName, entries: Sequence[Entry]) -> LayerFile:
        """A finished layer."""
        writer = LayerWriter(self.path / str(name), TENANT, TIMELINE)
        for entry in sorted(entries):
            writer.add(*entry)
        writer.finish(name)
        return LayerFile(self.path / str(name), name, TENANT, TIMELINE)
