from typing_extensions import Buffer

class FrameReader:
    def __init__(self, fd: int, received: Buffer, limit: int) -> None: ...
