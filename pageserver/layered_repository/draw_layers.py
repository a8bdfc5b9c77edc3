"""Picture of a timeline's layers: `python -m pageserver.layered_repository.draw_layers`.

Takes the directory of a timeline, or a text file with a layer's name and, if known, its size in
bytes on each line. A pageserver may run meanwhile: nothing but names, the metadata and the headers
of small images is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pageserver.layered_repository.errors import StoreError
from pageserver.layered_repository.layer_drawing import (
    DrawnLayer,
    Labeller,
    Mark,
    MarkKind,
    draw,
    size_text,
)
from pageserver.layered_repository.layer_file import LayerFile
from pageserver.layered_repository.layer_name import LayerName
from pageserver.layered_repository.metadata import METADATA_FILE, TimelineMetadata, read_metadata
from pageserver.layered_repository.offline import (
    TenantFiles,
    TimelineFiles,
    find_tenants,
    may_be_tombstone,
)
from zenith_utils.ids import TimelineId
from zenith_utils.zstd import ZstdUnavailable


class DrawError(Exception):
    """There is nothing to draw; the message says why."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What to draw."""

    title: str
    layers: list[DrawnLayer]
    marks: list[Mark]

    def svg(self, labeller: Labeller | None = None) -> str:
        """The SVG document."""
        sizes = [layer.size for layer in self.layers if layer.size is not None]
        title = f"{self.title}: {len(self.layers)} layers"
        if sizes:
            title += f", {size_text(sum(sizes))}"
        return draw(self.layers, title=title, marks=self.marks, labeller=labeller)


def picture_of_names(path: Path) -> Picture:
    """The layers named in a text file. Raises DrawError for what is no layer's name, OSError."""
    layers = []
    try:
        lines = path.read_text("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise DrawError(f"{path}: not a text file with names of layers") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        name = LayerName.parse(words[0])
        if name is None or len(words) > 2 or (len(words) == 2 and not words[1].isdecimal()):
            raise DrawError(f"{path}, line {number}: not a layer's name, alone or with a size")
        size = int(words[1]) if len(words) == 2 else None
        layers.append(DrawnLayer(name, size))
    if not layers:
        raise DrawError(f"{path}: there is no name in it")
    return Picture(path.name, layers, [])


def picture_of_timeline(path: Path, names: Mapping[TimelineId, str] | None = None) -> Picture:
    """The layers of the timeline whose directory is given, and where others branch off.

    `names` are those that people know timelines by. Raises DrawError, StoreError if the metadata is
    damaged, OSError.
    """
    if not (path / METADATA_FILE).is_file():
        raise DrawError(
            f"{path}: not the directory of a timeline: it has no file '{METADATA_FILE}'"
        )
    tenant = find_tenants(path)[0]
    timeline = next(tenant.chosen())
    names = names or {}
    metadata = read_metadata(timeline.metadata_path)
    layers = [
        DrawnLayer(layer.name, layer.size, _is_empty(layer))
        for layer in timeline.layer_files(tenant)
    ]
    marks = _own_marks(metadata, names) + _branch_marks(tenant, timeline, names)
    title = f"timeline {timeline.timeline_id}"
    if timeline.timeline_id in names:
        title = f"{names[timeline.timeline_id]}, {title}"
    return Picture(title, layers, marks)


def _is_empty(layer: LayerFile) -> bool:
    if not may_be_tombstone(layer):
        return False
    try:
        return layer.describe()["entries"] == 0
    except (StoreError, OSError, ZstdUnavailable):
        return False  # to find out what is wrong with it is not the business of a picture


def _own_marks(metadata: TimelineMetadata, names: Mapping[TimelineId, str]) -> list[Mark]:
    marks = [
        Mark(metadata.disk_consistent_lsn, "disk consistent", MarkKind.CONSISTENT),
        Mark(metadata.latest_gc_cutoff_lsn, "GC cutoff", MarkKind.CUTOFF),
    ]
    if metadata.ancestor_id is not None:
        ancestor = names.get(metadata.ancestor_id, str(metadata.ancestor_id))
        marks.append(Mark(metadata.ancestor_lsn, f"branched off {ancestor}", MarkKind.BEGIN))
    return [mark for mark in marks if mark.lsn]


def _branch_marks(
    tenant: TenantFiles, timeline: TimelineFiles, names: Mapping[TimelineId, str]
) -> list[Mark]:
    marks = []
    for other in tenant.timelines.values():
        try:
            metadata = read_metadata(other.metadata_path)
        except (StoreError, OSError):
            continue  # it may be on its way out; to find damage is not the business of a picture
        if metadata.ancestor_id == timeline.timeline_id:
            name = names.get(other.timeline_id, str(other.timeline_id))
            marks.append(Mark(metadata.ancestor_lsn, f"branch {name}", MarkKind.BRANCH))
    return marks


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pageserver.layered_repository.draw_layers",
        description="Draw the layers of a timeline as SVG: keys to the right, LSNs upwards.",
    )
    parser.add_argument(
        "path", type=Path, help="directory of a timeline, or text file with names of layers"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.svg")
    options = parser.parse_args(argv)
    try:
        of = picture_of_timeline if options.path.is_dir() else picture_of_names
        options.output.write_text(of(options.path).svg(), encoding="utf-8")
    except (DrawError, StoreError, OSError) as error:
        print(f"cannot draw: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
