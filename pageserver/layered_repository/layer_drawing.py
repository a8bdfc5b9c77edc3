"""A picture of the layers of a timeline: key space from left to right, LSNs upwards, as SVG.

Pure: no I/O. Both axes are compressed. Between two neighbouring keys where some layer begins or
ends there is a column, whose width follows the bytes that layers have there, not the number of
keys; between two neighbouring LSNs a row, whose height follows the logarithm of the WAL. An image
layer has a row of its own at its LSN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, groupby, pairwise
from math import log2
from typing import Final, Generic, TypeVar
from xml.sax.saxutils import escape

from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from zenith_utils.lsn import lsn_text

Labeller = Callable[[bytes], Sequence[str]]
"""What a key belongs to, from the whole to the part: each level gets a line below the picture."""

_LEFT: Final = 110.0
_WIDTH: Final = 1000.0
_RIGHT: Final = 270.0  # for the texts of marks
_MARGIN: Final = 20.0
_TOP: Final = 64.0
_MIN_HEIGHT, _MAX_HEIGHT, _ROW_HEIGHT = 280.0, 1400.0, 18.0
_LINE: Final = 14.0  # from one line of text to the next
_CHARACTER: Final = 6.6  # width of one, about
_KEY_SPACING: Final = 40.0
_KEY_TEXT: Final = 170.0
_EMPTY_COLUMN: Final = 0.1  # of the width of a usual one
_SIZE_UNITS: Final = ("bytes", "kB", "MB", "GB", "TB")

_STYLE: Final = """
text{font:11px sans-serif;fill:#222}
.title{font-size:15px;font-weight:bold}
.lsn{text-anchor:end;font-family:monospace}
.key{font:7.5px monospace}
.grid{stroke:#e4e4e4}
.band0{fill:#eef1f5}.band1{fill:#dbe2ea}
.layer{stroke:#fff;stroke-width:.6}.thin{stroke:none}
.layer:hover{stroke:#000;stroke-width:1.5}
.l0{fill:#f2a541}.delta{fill:#5b8fc9}.image{fill:#3f9b63}.tombstone{fill:#c8393b}
.mark{stroke-width:1.2;fill:none}.lead{stroke-width:.6;fill:none}
.consistent{stroke:#111}.cutoff{stroke:#a3209b;stroke-dasharray:7 3}
.branch{stroke:#0b7285;stroke-dasharray:2 3}.begin{stroke:#0b7285;stroke-width:2}
"""


class MarkKind(Enum):
    """What a horizontal line stands for; the value is its style."""

    CONSISTENT = "consistent"
    CUTOFF = "cutoff"
    BRANCH = "branch"
    BEGIN = "begin"


@dataclass(frozen=True, slots=True)
class Mark:
    """A line at an LSN: what lies below it is at or below the LSN."""

    lsn: int
    text: str
    kind: MarkKind


@dataclass(frozen=True, slots=True)
class DrawnLayer:
    """A layer; `size` in bytes where it is known, `is_empty` an image without keys."""

    name: LayerName
    size: int | None = None
    is_empty: bool = False

    @property
    def kind(self) -> str:
        """One of _KINDS."""
        if self.name.is_image:
            return "tombstone" if self.is_empty else "image"
        return "l0" if self.name.is_l0 else "delta"


# In the order of painting: what comes later lies on top.
_KINDS: Final = {
    "l0": ("L0 delta", "L0 deltas"),
    "delta": ("delta", "deltas"),
    "image": ("image", "images"),
    "tombstone": ("tombstone (empty image)", "tombstones (empty images)"),
}


def draw(
    layers: Iterable[DrawnLayer],
    *,
    title: str,
    marks: Iterable[Mark] = (),
    labeller: Labeller | None = None,
) -> str:
    """The SVG document. Without a labeller keys are shown in hexadecimal."""
    order = list(_KINDS)
    drawn = sorted(layers, key=lambda layer: (order.index(layer.kind), str(layer.name)))
    marks = sorted(marks, key=lambda mark: (-mark.lsn, mark.kind.value, mark.text))
    x_axis = key_axis(drawn)
    y_axis = lsn_axis(drawn, marks)
    bottom = _TOP + y_axis.length
    below = _bands(x_axis, labeller, bottom) if labeller else _keys(x_axis, bottom)
    # The grid lies below the layers, the lines above.
    body = [
        *_grid(y_axis, {layer.name.end_lsn for layer in drawn}, bottom),
        *(_layer(layer, x_axis, y_axis, bottom, labeller) for layer in drawn),
        *_marks(marks, y_axis, bottom),
        *below.elements,
        *_legend(drawn),
    ]
    width = _LEFT + _WIDTH + (_RIGHT if marks else _MARGIN)
    height = bottom + below.height + _MARGIN
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
            f'<text class="title" x="{_LEFT:.0f}" y="22">{escape(title)}</text>',
            *body,
            "</svg>\n",
        ]
    )


# ---- axes


B = TypeVar("B", bytes, int)


@dataclass(frozen=True, slots=True)
class Axis(Generic[B]):
    """Where the borders between columns, or rows, lie: their distances from the first one."""

    borders: tuple[B, ...]
    places: dict[B, float]
    length: float

    @classmethod
    def of(cls, borders: tuple[B, ...], weights: Sequence[float], length: float) -> Axis[B]:
        """Divide a length among the spaces between the borders."""
        total = sum(weights)
        sums = accumulate(weights, initial=0.0)
        places = {border: length * at / total for border, at in zip(borders, sums, strict=True)}
        return Axis(borders, places, length)


def key_axis(layers: Sequence[DrawnLayer]) -> Axis[bytes]:
    """Columns between the keys where layers begin or end."""
    borders = tuple(sorted({key for x in layers for key in (x.name.key_start, x.name.key_end)}))
    if not borders:
        return Axis.of((MIN_KEY, MAX_KEY), [1.0], _WIDTH)
    index = {border: i for i, border in enumerate(borders)}
    covered = [0] * len(borders)
    bytes_here = [0.0] * len(borders)
    for layer in layers:
        if layer.kind != "l0":  # these say nothing of where the keys are
            first, last = index[layer.name.key_start], index[layer.name.key_end]
            covered[first] += 1
            covered[last] -= 1
            share = (layer.size or 0) / (last - first)
            bytes_here[first] += share
            bytes_here[last] -= share
    depths = list(accumulate(covered))[:-1]
    sizes = list(accumulate(bytes_here))[:-1]
    average = sum(sizes) / (sum(depth > 0 for depth in depths) or 1)
    weights = [
        (1.0 + (max(size, 0.0) / average if average else 0.0)) if depth else _EMPTY_COLUMN
        for depth, size in zip(depths, sizes, strict=True)
    ]
    return Axis.of(borders, weights, _WIDTH)


def lsn_axis(layers: Sequence[DrawnLayer], marks: Sequence[Mark]) -> Axis[int]:
    """Rows between the LSNs where layers begin or end, and the marks."""
    lsns = {lsn for x in layers for lsn in (x.name.start_lsn, x.name.end_lsn)}
    borders = tuple(sorted(lsns | {mark.lsn + 1 for mark in marks})) or (0, 1)
    if len(borders) == 1:
        borders = (borders[0], borders[0] + 1)
    images = {layer.name.start_lsn for layer in layers if layer.name.is_image}
    weights = [
        1.3 if start in images else 0.5 + 0.06 * log2(end - start)
        for start, end in pairwise(borders)
    ]
    height = min(max(_ROW_HEIGHT * len(weights), _MIN_HEIGHT), _MAX_HEIGHT)
    return Axis.of(borders, weights, height)


# ---- elements


def _layer(
    layer: DrawnLayer,
    x_axis: Axis[bytes],
    y_axis: Axis[int],
    bottom: float,
    labeller: Labeller | None,
) -> str:
    name = layer.name
    x, end = x_axis.places[name.key_start], x_axis.places[name.key_end]
    y = bottom - y_axis.places[name.end_lsn]
    width = max(end - x, 0.6)
    height = max(bottom - y_axis.places[name.start_lsn] - y, 1.2)
    thin = "" if width > 3 and height > 4 else " thin"
    return (
        f'<rect class="layer {layer.kind}{thin}" x="{_LEFT + x:.2f}" y="{y:.2f}" '
        f'width="{width:.2f}" height="{height:.2f}">'
        f"<title>{escape(_tooltip(layer, labeller))}</title></rect>"
    )


def _tooltip(layer: DrawnLayer, labeller: Labeller | None) -> str:
    name = layer.name
    lsns = f"LSN {lsn_text(name.start_lsn)}"
    if not name.is_image:
        lsns += f" to {lsn_text(name.end_lsn - 1)}"
    size = "" if layer.size is None else f", {size_text(layer.size)}"
    lines = [str(name), f"{_KINDS[layer.kind][0]}, {lsns}{size}"]
    if labeller is not None:
        first, end = (" / ".join(labeller(key)) for key in (name.key_start, name.key_end))
        lines.append(f"from {first}" if first == end else f"from {first} to {end}")
    return "\n".join(lines)


def _grid(y_axis: Axis[int], ends: set[int], bottom: float) -> list[str]:
    """Labels of the LSNs at which layers end, as many as there is room for."""
    first, *others = y_axis.borders
    elements = []
    if others[0] != first + 1:
        elements.append(_grid_line(0.0, first, bottom))
    last = 0.0
    for border in others:
        place = y_axis.places[border]
        room = place - last >= _LINE and y_axis.length - place >= _LINE
        if border == others[-1] or (room and border in ends):
            last = place
            # The last LSN of the row below: layers end before the border.
            elements.append(_grid_line(place, border - 1, bottom))
    return elements


def _grid_line(place: float, lsn: int, bottom: float) -> str:
    y = bottom - place
    return (
        f'<line class="grid" x1="{_LEFT - 4:.0f}" x2="{_LEFT + _WIDTH:.0f}" '
        f'y1="{y:.2f}" y2="{y:.2f}"/>'
        f'<text class="lsn" x="{_LEFT - 8:.0f}" y="{y + 4:.2f}">{lsn_text(lsn)}</text>'
    )


def _marks(marks: Sequence[Mark], y_axis: Axis[int], bottom: float) -> list[str]:
    """Lines from the highest to the lowest, their texts to the right where there is room."""
    lines = []
    for (lsn, kind), alike in groupby(marks, key=lambda mark: (mark.lsn, mark.kind)):
        texts = [mark.text for mark in alike]
        lines.append((bottom - y_axis.places[lsn + 1], lsn, kind, texts))
    labels = spread([line[0] for line in lines], _LINE, _TOP, bottom)
    right = _LEFT + _WIDTH
    elements = []
    for (y, lsn, kind, texts), label_y in zip(lines, labels, strict=True):
        text = texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"
        tooltip = escape(f"{lsn_text(lsn)}: " + ", ".join(texts))
        elements.append(
            f'<line class="mark {kind.value}" x1="{_LEFT:.0f}" x2="{right:.0f}" '
            f'y1="{y:.2f}" y2="{y:.2f}"><title>{tooltip}</title></line>'
        )
        if label_y is not None:
            room = int((_RIGHT - 24) / _CHARACTER)
            shown = escape(_shortened(f"{lsn_text(lsn)} {text}", room))
            elements.append(
                f'<path class="lead {kind.value}" d="M{right:.0f} {y:.2f}l16 {label_y - y:.2f}"/>'
                f'<text x="{right + 19:.0f}" y="{label_y + 4:.2f}">{shown}'
                f"<title>{tooltip}</title></text>"
            )
    return elements


def spread(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float | None]:
    """Places near the wanted ones (ascending) so far apart that texts do not collide.

    None for what there is no room for: of too many every n-th gets a place.
    """
    room = max(int((high - low) / distance) + 1, 1)
    step = -(-len(wanted) // room) or 1
    places: list[float | None] = [None] * len(wanted)
    chosen = range(0, len(wanted), step)
    at = low - distance
    for i in chosen:
        at = max(wanted[i], at + distance)
        places[i] = at
    limit = high
    for i in reversed(chosen):
        place = places[i]
        assert place is not None
        places[i] = limit = min(place, limit)
        limit -= distance
    return places


@dataclass(frozen=True, slots=True)
class _Below:
    """What is below the picture, and its height."""

    elements: list[str]
    height: float


def _bands(x_axis: Axis[bytes], labeller: Labeller, bottom: float) -> _Below:
    """For each level of labels a line of cells, one for neighbouring columns with the same."""
    columns = [(key, tuple(labeller(key))) for key in x_axis.borders[:-1]]
    ends = [x_axis.places[border] for border in x_axis.borders[1:]]
    elements: list[str] = []
    y = bottom + 6
    for level in range(max((len(labels) for _, labels in columns), default=0)):
        cells = []
        for labels, group in groupby(enumerate(columns), key=lambda item: item[1][1][: level + 1]):
            members = [i for i, _ in group]
            if len(labels) > level:
                start = x_axis.places[columns[members[0]][0]]
                cells.append(_Cell(start, ends[members[-1]] - start, labels))
        height = max(cell.height for cell in cells)
        elements += (cell.element(y, height, i) for i, cell in enumerate(cells))
        y += height + 3
    return _Below(elements, y - bottom)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A range of keys with the same labels; that of a part stands where it has no room to lie."""

    x: float
    width: float
    labels: Sequence[str]

    @property
    def _upright(self) -> bool:
        text_width = len(self.labels[-1]) * _CHARACTER + 6
        return len(self.labels) > 1 and _LINE - 3 <= self.width < text_width

    @property
    def height(self) -> float:
        return len(self.labels[-1]) * _CHARACTER + 6 if self._upright else _LINE + 3

    def element(self, y: float, height: float, number: int) -> str:
        """The cell; `height` is that of the line of cells."""
        title = f"<title>{escape(' / '.join(self.labels))}</title>"
        x = _LEFT + self.x
        cell = (
            f'<rect class="band{number % 2}" x="{x:.2f}" y="{y:.2f}" '
            f'width="{max(self.width, 0.3):.2f}" height="{height:.0f}">{title}</rect>'
        )
        text = self.labels[-1]
        if self._upright:
            at = f'transform="translate({x + self.width / 2 - 4:.2f} {y + 4:.2f}) rotate(90)"'
        else:
            text = _shortened(text, int((self.width - 4) / _CHARACTER))
            at = f'x="{x + 3:.2f}" y="{y + 12:.2f}"'
        return f"{cell}<text {at}>{escape(text)}{title}</text>" if text else cell


def _keys(x_axis: Axis[bytes], bottom: float) -> _Below:
    """The keys of borders in hexadecimal, as many as there is room for."""
    elements = []
    last = -_KEY_SPACING
    for border in x_axis.borders:
        x = x_axis.places[border]
        if x - last >= _KEY_SPACING:
            last = x
            place = f"{_LEFT + x + 3:.2f} {bottom + 8:.2f}"
            elements.append(
                f'<path class="lead branch" d="M{_LEFT + x:.2f} {bottom:.2f}v5"/>'
                f'<text class="key" transform="translate({place}) rotate(90)">'
                f"{border.hex().upper()}</text>"
            )
    return _Below(elements, _KEY_TEXT + 8)


def _legend(layers: Sequence[DrawnLayer]) -> list[str]:
    elements = []
    x = _LEFT
    for kind, (one, many) in _KINDS.items():
        these = [layer for layer in layers if layer.kind == kind]
        sizes = [layer.size for layer in these if layer.size is not None]
        label = f"{len(these)} {one if len(these) == 1 else many}"
        if sizes:
            label += f", {size_text(sum(sizes))}"
        elements.append(
            f'<rect class="{kind}" x="{x:.0f}" y="34" width="12" height="12"/>'
            f'<text x="{x + 17:.0f}" y="44">{escape(label)}</text>'
        )
        x += 40 + len(label) * _CHARACTER
    return elements


# ---- texts


def size_text(size: float) -> str:
    """A number of bytes for people."""
    unit, *larger = _SIZE_UNITS
    while size >= 1000 and larger:
        size /= 1000
        unit, *larger = larger
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"


def _shortened(text: str, room: int) -> str:
    """As much of a text as `room` characters show, nothing where that says nothing."""
    if len(text) <= room:
        return text
    return f"{text[: room - 1]}…" if room >= 4 else ""
