from collections.abc import Iterable

from typing_extensions import Buffer

def apply_custom_records(base: Buffer, records: Iterable[tuple[int, int, bytes]]) -> bytes: ...
