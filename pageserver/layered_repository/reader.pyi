from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.timeline import Timeline

@dataclass(frozen=True, eq=False)
class ReadView:
    open: InMemoryLayer
    frozen: tuple[InMemoryLayer, ...]
    layers: LayerMap[LayerFile]

@dataclass(frozen=True)
class ReconstructInput:
    key: bytes
    lsn: int
    base: bytes | None
    records: list[tuple[int, int, bytes]]

Reconstruct = Callable[[Sequence[ReconstructInput]], list[bytes]]

def get(timeline: Timeline, key: bytes, lsn: int) -> bytes: ...
def get_vectored(
    timeline: Timeline, keys: Sequence[bytes], lsn: int, *, cache: bool = True
) -> list[bytes | None]: ...
def scan_keys(timeline: Timeline, start: bytes, end: bytes, lsn: int) -> list[bytes]: ...
