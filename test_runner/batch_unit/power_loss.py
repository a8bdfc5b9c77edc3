"""A disk that knows what a power failure would leave of it.

`RecordingFiles` does what the store asks for in a scratch directory and keeps a list of it. `Disk`
is that list applied: beside what processes see it knows what is durable. The content of a file is
that of its last fsync, the entries of a directory are those of its last fsync. Of what came later
anything may be lost and anything may be kept, in any combination; `outcomes` gives the worst ones.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from typing_extensions import Buffer

from pageserver.layered_repository.files import Files

SECTOR = 512

Tree = dict[str, "bytes | Tree"]
"""A directory: bytes of a file, or a directory, by name."""


class Create(NamedTuple):
    """A file was opened for writing, new or emptied."""

    path: str
    handle: int


class Write(NamedTuple):
    """Bytes were written to a file that is open."""

    handle: int
    offset: int
    data: bytes


class Fsync(NamedTuple):
    """The content of a file that is open became durable."""

    handle: int


class Mkdir(NamedTuple):
    """A directory was made."""

    path: str


class Rename(NamedTuple):
    """A file or directory got another name in its directory."""

    source: str
    target: str


class Remove(NamedTuple):
    """A file or an empty directory was removed."""

    path: str


class FsyncDir(NamedTuple):
    """The entries of a directory became durable."""

    path: str


Operation = Create | Write | Fsync | Mkdir | Rename | Remove | FsyncDir


@dataclass(eq=False)
class FileNode:
    """A file, whatever its names."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


class Change(NamedTuple):
    """A change of a directory that is not durable yet: one name goes, one comes, or both."""

    gone: str | None
    new: str | None
    node: FileNode | DirNode

    @property
    def removes(self) -> bool:
        """Whether a file goes by it."""
        return self.new is None

    def apply(self, entries: dict[str, FileNode | DirNode]) -> None:
        """Make the change, as far as it still means anything."""
        if self.gone is not None and entries.get(self.gone) is self.node:
            del entries[self.gone]
        if self.new is not None:
            entries[self.new] = self.node


@dataclass(eq=False)
class DirNode:
    """A directory."""

    entries: dict[str, FileNode | DirNode] = field(default_factory=dict)
    durable: dict[str, FileNode | DirNode] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        """Make a change that may be lost."""
        change.apply(self.entries)
        self.pending.append(change)

    def sync(self) -> None:
        """Make all changes durable."""
        self.durable = dict(self.entries)
        self.pending.clear()


class Outcome(NamedTuple):
    """One way in which things can end."""

    name: str
    keeps: Callable[[Change, int], bool]
    """Whether a change stays that so many came after."""
    content: Callable[[FileNode], bytes]


class Disk:
    """Files and directories, and what of them is durable."""

    def __init__(self) -> None:
        self._root = DirNode()
        self._open: dict[int, FileNode] = {}

    @classmethod
    def of(cls, tree: Tree) -> Disk:
        """A disk with these files, all durable."""
        disk = cls()
        _fill(disk._root, tree)
        return disk

    def apply(self, operation: Operation) -> None:
        """Do what a process did."""
        match operation:
            case Create(path, handle):
                parent, name = self._parent(path)
                node = parent.entries.get(name)
                if not isinstance(node, FileNode):
                    node = FileNode()
                    parent.change(Change(None, name, node))
                node.content.clear()
                self._open[handle] = node
            case Write(handle, offset, data):
                content = self._open[handle].content
                content.extend(bytes(max(offset - len(content), 0)))
                content[offset : offset + len(data)] = data
            case Fsync(handle):
                node = self._open[handle]
                node.durable = bytes(node.content)
            case Mkdir(path):
                parent, name = self._parent(path)
                assert name not in parent.entries
                parent.change(Change(None, name, DirNode()))
            case Rename(source, target):
                parent, old = self._parent(source)
                other, new = self._parent(target)
                assert parent is other, "a rename from one directory to another"
                parent.change(Change(old, new, parent.entries[old]))
            case Remove(path):
                parent, name = self._parent(path)
                parent.change(Change(name, None, parent.entries[name]))
            case FsyncDir(path):
                self._directory(path).sync()

    def copy(self) -> Disk:
        """The disk of this moment."""
        return copy.deepcopy(self)

    @property
    def uncertain(self) -> bool:
        """Whether a directory that can be reached has changes that may be lost."""
        waiting = [self._root]
        while waiting:
            directory = waiting.pop()
            if directory.pending:
                return True
            waiting += [node for node in directory.entries.values() if isinstance(node, DirNode)]
        return False

    def seen(self) -> Tree:
        """What processes see."""
        return _tree(self._root, Outcome("seen", _all, _written))

    def outcomes(self, seed: int) -> Iterator[tuple[str, Tree]]:
        """What a power failure may leave: a name for it, and the files."""
        rng = random.Random(seed)
        for outcome in (
            Outcome("nothing unsynced", lambda change, later: False, _synced),
            Outcome("everything", _all, _written),
            Outcome("names without data", _all, _synced),
            Outcome("names with a part of the data", _all, _torn(rng)),
            Outcome("removals only", lambda change, later: change.removes, _synced),
            Outcome("no removals", lambda change, later: not change.removes, _beginning(rng)),
            Outcome("some changes", lambda change, later: rng.random() < 0.5, _torn(rng)),
            Outcome("the last change", lambda change, later: not later, _written),
        ):
            yield outcome.name, _tree(self._root, outcome)

    def _directory(self, path: str) -> DirNode:
        directory = self._root
        for name in filter(None, path.split("/")):
            node = directory.entries[name]
            assert isinstance(node, DirNode)
            directory = node
        return directory

    def _parent(self, path: str) -> tuple[DirNode, str]:
        parent, _, name = path.rpartition("/")
        return self._directory(parent), name


def _fill(directory: DirNode, tree: Tree) -> None:
    for name, node in tree.items():
        if isinstance(node, dict):
            directory.entries[name] = child = DirNode()
            _fill(child, node)
        else:
            directory.entries[name] = FileNode(bytearray(node), node)
    directory.sync()


def _tree(directory: DirNode, outcome: Outcome) -> Tree:
    entries = dict(directory.durable)
    for number, change in enumerate(directory.pending, 1):
        if outcome.keeps(change, len(directory.pending) - number):
            change.apply(entries)
    return {
        name: outcome.content(node) if isinstance(node, FileNode) else _tree(node, outcome)
        for name, node in entries.items()
    }


def _all(change: Change, later: int) -> bool:
    return True


def _synced(node: FileNode) -> bytes:
    return node.durable


def _written(node: FileNode) -> bytes:
    return bytes(node.content)


def _torn(rng: random.Random) -> Callable[[FileNode], bytes]:
    """Some sectors have what was written since the last fsync, the others what was there."""

    def content(node: FileNode) -> bytes:
        torn = bytearray(node.content)
        for start in range(0, len(torn), SECTOR):
            stop = min(start + SECTOR, len(torn))
            if rng.random() < 0.5:
                torn[start:stop] = node.durable[start:stop].ljust(stop - start, b"\0")
        return bytes(torn)

    return content


def _beginning(rng: random.Random) -> Callable[[FileNode], bytes]:
    """The file ends somewhere in what was written since the last fsync."""

    def content(node: FileNode) -> bytes:
        if node.content == node.durable:
            return node.durable
        return bytes(node.content[: rng.randrange(len(node.content) + 1)])

    return content


def write_tree(tree: Tree, path: Path) -> None:
    """Make a directory with these files."""
    path.mkdir()
    for name, node in tree.items():
        if isinstance(node, dict):
            write_tree(node, path / name)
        else:
            (path / name).write_bytes(node)


class RecordingFiles(Files):
    """Works below `root`, and keeps a list of what it did.

    `observe` is called before each operation. Nothing is synced really: what is durable is what
    `Disk` says.
    """

    def __init__(self, root: Path) -> None:
        self.operations: list[Operation] = []
        self.observe: Callable[[], None] = lambda: None
        self._prefix = f"{root}/"
        self._handles: dict[int, int] = {}
        self._lock = threading.RLock()

    def create(self, path: str | Path) -> int:
        """See Files."""
        with self._lock:
            self.observe()
            fd = super().create(path)
            self._handles[fd] = len(self.operations)
            self.operations.append(Create(self._inside(path), len(self.operations)))
            return fd

    def write(self, fd: int, path: str | Path, data: Buffer, offset: int) -> None:
        """See Files."""
        with self._lock:
            self.observe()
            super().write(fd, path, data, offset)
            self.operations.append(Write(self._handles[fd], offset, bytes(data)))

    def fsync(self, fd: int, path: str | Path) -> None:
        """See Files."""
        with self._lock:
            self.observe()
            self.operations.append(Fsync(self._handles[fd]))

    def mkdir(self, path: str | Path) -> None:
        """See Files."""
        with self._lock:
            self.observe()
            super().mkdir(path)
            self.operations.append(Mkdir(self._inside(path)))

    def rename(self, source: str | Path, target: str | Path) -> None:
        """See Files."""
        with self._lock:
            self.observe()
            super().rename(source, target)
            self.operations.append(Rename(self._inside(source), self._inside(target)))

    def unlink(self, path: str | Path) -> None:
        """See Files."""
        with self._lock:
            self.observe()
            super().unlink(path)
            self.operations.append(Remove(self._inside(path)))

    def rmtree(self, path: str | Path) -> None:
        """One entry after the other."""
        for entry in sorted(Path(path).iterdir()):
            if entry.is_dir():
                self.rmtree(entry)
            else:
                self.unlink(entry)
        with self._lock:
            self.observe()
            Path(path).rmdir()
            self.operations.append(Remove(self._inside(path)))

    def fsync_dir(self, path: str | Path) -> None:
        """See Files."""
        with self._lock:
            self.observe()
            self.operations.append(FsyncDir(self._inside(path)))

    def _inside(self, path: str | Path) -> str:
        inside = f"{path}/".removeprefix(self._prefix)
        return inside.rstrip("/")
