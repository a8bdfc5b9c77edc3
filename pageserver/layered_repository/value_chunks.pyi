from pageserver.layered_repository.ephemeral_file import EphemeralFile

class ValueChunks:
    def __init__(self, file: EphemeralFile | None, spill_after: int) -> None: ...
