from typing_extensions import Buffer

from .decoded_record import DecodedRecord

class WalDecodeError(Exception):
    lsn: int
    reason: str
    def __init__(self, lsn: int, reason: str) -> None: ...

class WalDecoder:
    def __init__(
        self,
        start_lsn: int,
        magic: int = 0xD110,
        seg_size: int = 16777216,
        *,
        prev_lsn: int = 0,
        check_prev: bool = True,
        system_identifier: int = 0,
        join_mid_record: bool = False,
        assume_switch: bool = True,
    ) -> None: ...
    def feed(self, data: Buffer) -> None: ...
    def next_record(self) -> DecodedRecord | None: ...
    def scan(self, data: Buffer) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def received_lsn(self) -> int: ...
    @property
    def last_record_start(self) -> int: ...
    @property
    def failed(self) -> bool: ...
