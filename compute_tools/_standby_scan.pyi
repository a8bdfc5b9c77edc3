from typing_extensions import Buffer

from postgres_ffi.decoded_record import DecodedRecord
from postgres_ffi.wal_decoder import WalDecoder

def scan(decoder: WalDecoder, data: Buffer) -> list[DecodedRecord]: ...
