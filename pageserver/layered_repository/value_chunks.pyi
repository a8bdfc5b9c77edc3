from pageserver.layered_repository.ephemeral_file import EphemeralFile
from pageserver.layered_repository.memory_pool import MemoryPool

class ValueChunks:
    def __init__(self, file: EphemeralFile | None, spill_after: int, pool: MemoryPool) -> None: ...
