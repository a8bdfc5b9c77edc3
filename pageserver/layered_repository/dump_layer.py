"""Dump of a layer file, or of the list of a timeline's layers.

`python -m pageserver.layered_repository.dump_layer [--values] FILE`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final, TextIO

from pageserver.layered_repository.errors import CorruptLayerError, StoreError
from pageserver.layered_repository.layer_file import LayerFile, LayerStats
from pageserver.layered_repository.layer_list import decode_list, list_number
from pageserver.layered_repository.layer_name import LayerName
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import lsn_text
from zenith_utils.zstd import ZstdUnavailable

_IDS_OFFSET: Final = 16
_IDS_END: Final = 48
_CODECS: Final = {0: "no codec", 1: "zstd"}


def open_layer(path: Path) -> tuple[LayerFile, TenantId, TimelineId]:
    """The layer at `path`, of whatever tenant and timeline its header names.

    Raises ValueError if the file has no layer's name, OSError, CorruptLayerError.
    """
    name = LayerName.parse(path.name)
    if name is None:
        raise ValueError(f"{path}: not the name of a layer file")
    with path.open("rb") as file:
        header = file.read(_IDS_END)
    if len(header) < _IDS_END:
        raise CorruptLayerError(path, len(header), "the file ends early")
    tenant = TenantId(header[_IDS_OFFSET : _IDS_OFFSET + 16])
    timeline = TimelineId(header[_IDS_OFFSET + 16 : _IDS_END])
    return LayerFile(path, name, tenant.raw, timeline.raw), tenant, timeline


def dump(path: Path, out: TextIO, *, values: bool = False) -> None:
    """Verify the whole file, then print what it is made of and every entry.

    With `values` their bytes too. Raises what open_layer() and LayerFile.verify() do,
    CorruptMetadataError.
    """
    if list_number(path.name) is not None:
        _dump_list(path, out)
        return
    layer, tenant, timeline = open_layer(path)
    stats = layer.verify()
    kind = "image" if layer.is_image else "delta"
    print(f"{kind} layer of tenant {tenant} timeline {timeline}", file=out)
    print(f"keys {layer.key_start.hex().upper()} to {layer.key_end.hex().upper()}", file=out)
    print(f"LSNs {lsn_text(layer.start_lsn)} to {lsn_text(layer.end_lsn)}", file=out)
    for line in _statistics(stats, layer.describe()):
        print(line, file=out)
    for key, lsn, flags, data in layer.entries():
        init = " will_init" if flags & 1 else ""
        line = f"{key.hex().upper()} {lsn_text(lsn)} kind {flags >> 1}{init} {len(data)} bytes"
        print(f"{line} {data.hex()}" if values else line, file=out)


def _dump_list(path: Path, out: TextIO) -> None:
    content, _ = decode_list(path.read_bytes(), path)
    print(
        f"list {content.number} of the layers of tenant {content.tenant_id} timeline "
        f"{content.timeline_id}: {len(content.layers)} layers, "
        f"{sum(layer.size for layer in content.layers)} bytes",
        file=out,
    )
    for name, size in content.layers:
        print(f"{name} {size}", file=out)


def _statistics(stats: LayerStats, header: dict[str, int]) -> list[str]:
    stored = header["stored_bytes"]
    codec = _CODECS[header["codec"]]
    return [
        f"{stats.size} bytes: {stats.entries} entries of {stats.keys} keys",
        f"values: {stats.value_bytes} bytes in {stored} ({_ratio(stats.value_bytes, stored)}), "
        f"{codec} in {stats.packed_blocks} of {stats.value_blocks} blocks "
        f"of up to {header['block_target']} bytes",
        f"index: {stats.leaves} leaves, {header['index_bytes']} bytes",
        f"filter of {stats.filter_lines} lines" if stats.filter_lines else "no filter",
    ]


def _ratio(plain: int, stored: int) -> str:
    return f"{plain / stored:.2f} to 1" if stored else "empty"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Print what a layer file or a list of layers holds."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--values", action="store_true", help="print the bytes of the values")
    options = parser.parse_args()
    try:
        dump(options.file, sys.stdout, values=options.values)
    except (ValueError, OSError, StoreError, ZstdUnavailable) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
