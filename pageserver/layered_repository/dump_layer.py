"""Dump of a layer file: `python -m pageserver.layered_repository.dump_layer [--values] FILE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final, TextIO

from pageserver.layered_repository.errors import CorruptLayerError
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.lsn import lsn_text

_IDS_OFFSET: Final = 16
_IDS_END: Final = 48


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
    """Print the header and every entry, with `values` their bytes too; verifies all checksums."""
    layer, tenant, timeline = open_layer(path)
    kind = "image" if layer.is_image else "delta"
    print(f"{kind} layer of tenant {tenant} timeline {timeline}", file=out)
    print(f"keys {layer.key_start.hex().upper()} to {layer.key_end.hex().upper()}", file=out)
    print(f"LSNs {lsn_text(layer.start_lsn)} to {lsn_text(layer.end_lsn)}", file=out)
    print(", ".join(f"{what} {number}" for what, number in layer.describe().items()), file=out)
    for key, lsn, flags, data in layer.entries():
        init = " will_init" if flags & 1 else ""
        line = f"{key.hex().upper()} {lsn_text(lsn)} kind {flags >> 1}{init} {len(data)} bytes"
        print(f"{line} {data.hex()}" if values else line, file=out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Print what a layer file holds.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--values", action="store_true", help="print the bytes of the values")
    options = parser.parse_args()
    try:
        dump(options.file, sys.stdout, values=options.values)
    except (ValueError, OSError, CorruptLayerError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
