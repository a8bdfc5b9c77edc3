from typing_extensions import Buffer

from pageserver.layered_repository.inmemory_layer import InMemoryLayer
from pageserver.size_table import SizeTable
from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.wal_decoder import WalDecoder

NEED_INPUT: int
NEED_SIZE: int
NEED_DATABASE: int
NEED_HANDLER: int
RECORD_DONE: int
BAD_WAL: int
BAD_RECORD: int

class IngestLoop:
    decoder: WalDecoder
    sizes: SizeTable
    next_xid: int
    next_multi: int
    next_multi_offset: int
    commit_time: int
    clock_sets: int
    dirty: bool
    stepwise: bool
    done_lsn: int
    done_start: int
    records: int
    def __init__(
        self,
        decoder: WalDecoder,
        sizes: SizeTable,
        counters_key: bytes,
        next_xid: int,
        next_multi: int,
        next_multi_offset: int,
        commit_time_key: bytes,
        clock_sets: int,
        commit_time: int,
    ) -> None: ...
    def use_layer(self, layer: InMemoryLayer) -> None: ...
    def run(self, data: Buffer | None = None) -> int: ...
    def raise_bad_wal(self) -> None: ...
    def bad_record_reason(self) -> str: ...
    def needed(self) -> tuple[int, int, int, int, int]: ...
    def current_record(self) -> DecodedRecord: ...
    def put(self, key: bytes, flags: int, data: Buffer) -> None: ...
    def delete_range(self, start: bytes, end: bytes) -> None: ...
    def see_xid(self, xid: int) -> None: ...
    def see_multi(self, multi: int, offset: int) -> None: ...
    def set_counters(self, next_xid: int, next_multi: int, next_multi_offset: int) -> None: ...
    def finish_handled(self) -> None: ...
    def add_blocks(self, delta: int) -> None: ...
    def take_block_delta(self) -> int: ...
