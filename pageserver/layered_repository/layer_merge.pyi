from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter

@dataclass(frozen=True, slots=True)
class FinishedFile:
    path: str
    size: int

def merge_layers(
    layers: Sequence[LayerFile],
    new_writer: Callable[[], LayerWriter],
    *,
    target_size: int,
    start_lsn: int,
    end_lsn: int,
    stop: Callable[[], bool],
) -> list[tuple[FinishedFile, LayerName]]: ...
