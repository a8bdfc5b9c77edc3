"""Pictures of layers: well-formed, every layer there once and where it belongs, with labels."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
from batch_unit import store_support as support
from batch_unit.store_support import BRANCH, IMAGE, MAIN, key

from pageserver.key_labels import key_labels
from pageserver.keys import (
    CHECKPOINT_KEY,
    DATABASE_DIRECTORY_KEY,
    TABLESPACES_KEY,
    next_key,
    rel_block_key,
    rel_size_key,
    relmap_key,
    slru_block_key,
)
from pageserver.layered_repository.draw_layers import (
    DrawError,
    main,
    picture_of_names,
    picture_of_timeline,
)
from pageserver.layered_repository.errors import CorruptMetadataError
from pageserver.layered_repository.layer_drawing import (
    DrawnLayer,
    Labeller,
    Mark,
    MarkKind,
    draw,
    size_text,
    spread,
)
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName
from postgres_ffi.relfile import RelTag
from postgres_ffi.slru import SlruKind

SVG = "{http://www.w3.org/2000/svg}"

L0 = DrawnLayer(LayerName.l0_delta(65, 81), 1000)
LEFT = DrawnLayer(LayerName.delta(key(1), key(5), 17, 65), 9000)
RIGHT = DrawnLayer(LayerName.delta(key(1 << 100), key(1 << 101), 17, 65), 1000)
IMPORT = DrawnLayer(LayerName.image(key(0), key(1 << 101), 16), 50_000)
TOMBSTONE = DrawnLayer(LayerName.image(key(2), key(5), 40), 280, is_empty=True)
LAYERS = [TOMBSTONE, IMPORT, RIGHT, L0, LEFT]


class Rectangle:
    """A drawn layer; y goes downwards."""

    def __init__(self, element: ElementTree.Element) -> None:
        self.kind = element.attrib["class"].split()[1]
        self.left, self.top = float(element.attrib["x"]), float(element.attrib["y"])
        self.right = self.left + float(element.attrib["width"])
        self.bottom = self.top + float(element.attrib["height"])
        title = element.find(f"{SVG}title")
        assert title is not None and title.text is not None
        self.name, self.about = title.text.split("\n", 1)


def drawn(svg: str) -> dict[str, Rectangle]:
    """The layers of a picture by their names; each is there once and inside."""
    root = ElementTree.fromstring(svg.encode())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    found: dict[str, Rectangle] = {}
    for element in root.iter(f"{SVG}rect"):
        if element.attrib.get("class", "").startswith("layer"):
            rectangle = Rectangle(element)
            assert rectangle.name not in found
            assert 0 <= rectangle.left < rectangle.right <= width
            assert 0 <= rectangle.top < rectangle.bottom <= height
            found[rectangle.name] = rectangle
    return found


def texts(svg: str) -> list[str]:
    return [
        element.text or "" for element in ElementTree.fromstring(svg.encode()).iter(f"{SVG}text")
    ]


def test_every_layer_has_its_place() -> None:
    found = drawn(draw(LAYERS, title="all"))
    l0, left, right, image, tombstone = (
        found[str(layer.name)] for layer in (L0, LEFT, RIGHT, IMPORT, TOMBSTONE)
    )
    assert len(found) == 5
    kinds = [rectangle.kind for rectangle in (l0, left, right, image, tombstone)]
    assert kinds == ["l0", "delta", "delta", "image", "tombstone"]
    # LSNs go upwards, keys to the right.
    assert l0.bottom == pytest.approx(left.top, abs=0.02)
    assert left.top == right.top
    assert left.bottom == pytest.approx(image.top, abs=0.02)
    assert left.top < tombstone.top < tombstone.bottom < left.bottom
    assert left.left < tombstone.left < tombstone.right == pytest.approx(left.right, abs=0.02)
    assert l0.left < left.left and l0.right > right.right
    # The many keys between them take no room, and more bytes more of it.
    assert right.left - left.right < (right.right - right.left)
    assert left.right - left.left > right.right - right.left
    assert left.about == "delta, LSN 0/11 to 0/40, 9.0 kB"
    assert tombstone.about == "tombstone (empty image), LSN 0/28, 280 bytes"


def test_texts() -> None:
    shown = texts(draw(LAYERS, title="a <b> & c"))
    assert "a <b> & c" in shown
    assert {"1 L0 delta, 1.0 kB", "2 deltas, 10.0 kB", "1 image, 50.0 kB"} <= set(shown)
    assert "1 tombstone (empty image), 280 bytes" in shown
    assert {"0/10", "0/28", "0/40", "0/50"} <= set(shown)
    assert {"00" * 18, key(1 << 100).hex().upper()} <= set(shown)


def test_marks() -> None:
    marks = [
        Mark(80, "disk consistent", MarkKind.CONSISTENT),
        Mark(40, "GC cutoff", MarkKind.CUTOFF),
        *(Mark(40, f"branch <{i}>", MarkKind.BRANCH) for i in range(3)),
    ]
    svg = draw(LAYERS, title="marks", marks=marks)
    root = ElementTree.fromstring(svg.encode())
    lines = {
        element.attrib["class"]: float(element.attrib["y1"])
        for element in root.iter(f"{SVG}line")
        if element.attrib["class"].startswith("mark")
    }
    found = drawn(svg)
    assert lines["mark consistent"] == pytest.approx(found[str(L0.name)].top, abs=0.01)
    # What is at the LSN lies below the line.
    assert lines["mark cutoff"] == pytest.approx(found[str(TOMBSTONE.name)].top, abs=0.01)
    assert lines["mark branch"] == lines["mark cutoff"]
    shown = texts(svg)
    assert {"0/50 disk consistent", "0/28 GC cutoff", "0/28 branch <0> and 2 more"} <= set(shown)


def test_labels() -> None:
    """One cell for neighbours with the same label, at each level."""

    def labeller(name: bytes) -> tuple[str, ...]:
        number = int.from_bytes(name, "big")
        return ("all", "few") if number < 5 else ("all", "many & more")

    svg = draw(LAYERS, title="labels", labeller=labeller)
    cells = [text for text in texts(svg) if text in ("all", "few", "many & more")]
    assert cells == ["all", "few", "many & more"]
    about = drawn(svg)[str(LEFT.name)].about
    assert about.endswith("\nfrom all / few to all / many & more")


@pytest.mark.parametrize("labeller", [None, key_labels])
def test_nothing_and_little(labeller: Labeller | None) -> None:
    for layers in ([], [L0], [IMPORT]):
        assert len(drawn(draw(layers, title="t", labeller=labeller))) == len(layers)


def test_thousands_of_layers() -> None:
    layers = [
        DrawnLayer(
            LayerName.delta(key(10 * i), key(10 * i + 10), 8 * j + 1, 8 * j + 9)
            if j % 3
            else LayerName.image(key(10 * i), key(10 * i + 10), 8 * j)
        )
        for i in range(100)
        for j in range(60)
    ]
    marks = [Mark(8 * j, f"branch {j}", MarkKind.BRANCH) for j in range(500)]
    svg = draw(layers, title="many", marks=marks)
    assert len(drawn(svg)) == len(layers)
    assert ElementTree.fromstring(svg.encode()).attrib["height"] < "2000"


def test_spread() -> None:
    assert spread([], 10, 0, 100) == []
    assert spread([0, 50, 100], 10, 0, 100) == [0, 50, 100]
    assert spread([40, 40, 41], 10, 0, 100) == [40, 50, 60]
    assert spread([95, 96, 97], 10, 0, 100) == [80, 90, 100]
    crowded = spread([50.0] * 30, 10, 0, 100)
    places = [place for place in crowded if place is not None]
    assert len(places) == 10
    assert all(b - a >= 10 for a, b in pairwise(places))


def test_sizes() -> None:
    texts = [size_text(size) for size in (0, 999, 1000, 12_345, 345_678, 5e6, 2e15)]
    assert texts == ["0 bytes", "999 bytes", "1.0 kB", "12.3 kB", "346 kB", "5.0 MB", "2000 TB"]


def test_a_timeline(tmp_path: Path) -> None:
    with support.opened(tmp_path) as repository:
        main = support.new_timeline(repository)
        support.put_layers(main, (24, 32), 1)
        support.delete_range(main, 40, 2, 4)
        support.put(main, 48, (1, IMAGE, b"new"))
        main.checkpoint()
        repository.branch_timeline(BRANCH, ancestor_id=MAIN, start_lsn=32)
        names = {MAIN: "main", BRANCH: "fix"}
        paths = {t: repository.timeline(t).directory.path for t in names}
        # A running repository may be drawn.
        picture = picture_of_timeline(paths[MAIN], names)
        branch = picture_of_timeline(paths[BRANCH], names)
    assert [(layer.kind, layer.name.start_lsn) for layer in picture.layers] == [
        ("image", 16),
        ("l0", 17),
        ("l0", 25),
        ("l0", 33),
        ("tombstone", 40),
    ]
    assert [(mark.lsn, mark.text) for mark in picture.marks] == [
        (48, "disk consistent"),
        (16, "GC cutoff"),
        (32, "branch fix"),
    ]
    assert len(drawn(picture.svg())) == 5
    assert branch.layers == []
    assert (32, "branched off main") in [(mark.lsn, mark.text) for mark in branch.marks]
    assert texts(branch.svg())[0] == f"fix, timeline {BRANCH}: 0 layers"
    (paths[MAIN] / "metadata").write_bytes(b"x")
    with pytest.raises(CorruptMetadataError):
        picture_of_timeline(paths[MAIN])
    (paths[MAIN] / "metadata").unlink()
    with pytest.raises(DrawError, match="it has no file 'metadata'"):
        picture_of_timeline(paths[MAIN])


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text(f"{L0.name}\n\n{IMPORT.name} 50000\n")
    picture = picture_of_names(path)
    assert picture.layers == [DrawnLayer(L0.name), IMPORT]
    for line in ("nonsense", f"{L0.name} x", f"{L0.name} 1 2"):
        path.write_text(f"{L0.name}\n{line}\n")
        with pytest.raises(DrawError, match="line 2: not a layer's name"):
            picture_of_names(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DrawError, match="not a text file"):
        picture_of_names(path)
    path.write_text("\n")
    with pytest.raises(DrawError, match="there is no name in it"):
        picture_of_names(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "names", tmp_path / "out.svg"
    path.write_text(f"{L0.name}\n")
    assert main([str(path), "-o", str(output)]) == 0
    assert len(drawn(output.read_text())) == 1
    assert main([str(tmp_path), "-o", str(output)]) == 1
    assert main([str(tmp_path / "nowhere"), "-o", str(output)]) == 1
    err = capsys.readouterr().err
    assert "not the directory of a timeline" in err
    assert "No such file" in err


def test_key_labels() -> None:
    rel = RelTag(1663, 5, 16384, 0)
    assert key_labels(rel_block_key(rel, 7)) == ("database 5", "16384")
    assert key_labels(rel_block_key(rel._replace(forknum=2), 0)) == ("database 5", "16384_vm")
    assert key_labels(rel_block_key(rel._replace(spcnode=1700), 0)) == (
        "database 5 in tablespace 1700",
        "16384",
    )
    assert key_labels(rel_block_key(RelTag(1664, 0, 1262, 0), 0)) == ("shared", "1262")
    assert key_labels(rel_size_key(rel)) == ("database 5", "sizes")
    assert key_labels(relmap_key(1663, 5)) == ("database 5", "relation map")
    assert key_labels(DATABASE_DIRECTORY_KEY) == ("databases",)
    assert key_labels(slru_block_key(SlruKind.CLOG, 0, 0)) == ("SLRU", "pg_xact")
    assert key_labels(CHECKPOINT_KEY) == ("control", "checkpoint")
    assert key_labels(next_key(TABLESPACES_KEY)) == ("tablespaces",)
    # Borders of layers are not always keys.
    for border in (MIN_KEY, MAX_KEY, b"\x01" + b"\xff" * 17, b"\x09" * 18, b"\x00" + b"\xee" * 17):
        assert key_labels(border)
