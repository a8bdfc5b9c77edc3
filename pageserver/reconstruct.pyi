from collections.abc import Sequence
from typing import Protocol

from pageserver.layered_repository.reader import Reconstruct
from pageserver.walredo import RedoRequest

class ReconstructError(Exception): ...

class PageRedo(Protocol):
    def redo(self, requests: Sequence[RedoRequest]) -> list[bytes]: ...

def make_reconstruct(redo: PageRedo) -> Reconstruct: ...
