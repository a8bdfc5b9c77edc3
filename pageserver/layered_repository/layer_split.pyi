from collections.abc import Callable, Sequence

from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_merge import FinishedFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.layer_writer import LayerWriter

MAX_PIECES: int

def split_layer(
    layer: LayerFile,
    keep: Sequence[tuple[int, int]],
    new_writer: Callable[[], LayerWriter],
    *,
    stop: Callable[[], bool],
) -> list[tuple[FinishedFile, LayerName]]: ...
