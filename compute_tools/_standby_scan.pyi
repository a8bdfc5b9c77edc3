from typing_extensions import Buffer

from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.versions import PgVersion
from postgres_ffi.wal_decoder import WalDecoder

def scan(
    decoder: WalDecoder, data: Buffer, version: PgVersion, ended: dict[int, int]
) -> list[DecodedRecord]: ...
