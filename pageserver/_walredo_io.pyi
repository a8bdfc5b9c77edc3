from collections.abc import Iterable

PAGE_SIZE: int

PAGE: int
REJECTED: int
FAILED: int
HELLO: int

COMPLETE: int
GAVE_UP: int
CLOSED: int
TIMED_OUT: int

class RedoChannel:
    def __init__(self, to_fd: int, from_fd: int, err_fd: int) -> None: ...
    def add_apply(
        self,
        spcnode: int,
        dbnode: int,
        relnode: int,
        forknum: int,
        blkno: int,
        base: bytes | None,
        records: Iterable[tuple[int, bytes]],
    ) -> None: ...
    def add_mask(self, rmid: int, blkno: int, page: bytes) -> None: ...
    @property
    def pending_bytes(self) -> int: ...
    def expect_hello(self) -> None: ...
    def exchange(self, timeout: float) -> tuple[list[tuple[int, bytes]], int]: ...
    def take_stderr(self) -> bytes: ...
