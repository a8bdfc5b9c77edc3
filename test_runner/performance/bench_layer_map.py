"""Benchmark of the layer map: searches, changes and coverage.

Run as a script with --names, a file with one layer name a line (a directory listing of a real
timeline), or without for a made-up timeline of --layers layers. Prints microseconds per call.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from pageserver.layered_repository.layer_map import LayerMap
from pageserver.layered_repository.layer_name import MAX_KEY, MIN_KEY, LayerName

T = TypeVar("T")


def made_up(count: int) -> list[LayerName]:
    """Images of all parts at several LSNs, deltas between them, and L0 deltas on top."""
    rng = random.Random(1)
    parts = max(count // 24, 1)
    borders = [MIN_KEY, *sorted(rng.randbytes(18) for _ in range(parts - 1)), MAX_KEY]
    names: list[LayerName] = []
    lsn = 1 << 24
    while len(names) < count - 10:
        for start, end in pairwise(borders):
            names.append(LayerName.image(start, end, lsn + rng.randrange(1 << 20)))
            for i in range(3):
                first = lsn + ((i + 1) << 24)
                if parts > 1:
                    names.append(LayerName.delta(start, end, first, first + (1 << 24)))
        lsn += 1 << 26
    names += [LayerName.l0_delta(lsn + (i << 24), lsn + ((i + 1) << 24)) for i in range(10)]
    return names


def read_names(path: Path) -> list[LayerName]:
    """The layers of a listing; other files in it are ignored."""
    return [n for n in map(LayerName.parse, path.read_text().split()) if n is not None]


def each_us(call: Callable[[T], object], arguments: Iterable[T]) -> list[float]:
    """The time of every call in microseconds."""
    times = []
    for argument in arguments:
        begin = time.perf_counter()
        call(argument)
        times.append((time.perf_counter() - begin) * 1e6)
    return times


def report(title: str, times: Sequence[float]) -> None:
    """One line."""
    p99 = statistics.quantiles(times, n=100)[98] if len(times) > 1 else times[0]
    print(f"{title:34} p50 {statistics.median(times):9.2f} us   p99 {p99:9.2f} us")


def measure(names: list[LayerName], calls: int) -> None:
    """Everything about one map."""
    rng = random.Random(2)
    begin = time.perf_counter()
    layers = LayerMap(names)
    print(f"{'build from scratch':34} {(time.perf_counter() - begin) * 1e3:.1f} ms, {len(layers)}")
    top = max(name.end_lsn for name in names)
    low = min(name.start_lsn for name in names)
    ranged = [name for name in names if not name.is_l0]
    picked = rng.choices(ranged, k=calls)
    places = [(name.key_start, rng.randrange(low, top)) for name in picked]
    report("search (key, LSN)", each_us(lambda at: layers.search(*at), places))

    newest = [LayerName.delta(n.key_start, n.key_end, top, top + 8) for n in picked]
    report("add the newest layer", each_us(lambda name: layers.with_changes([name]), newest))
    l0s = [LayerName.l0_delta(top + 8 * i, top + 8 * i + 8) for i in range(calls)]
    report("add a new L0 delta", each_us(lambda name: layers.with_changes([name]), l0s))
    old = sorted(ranged, key=lambda name: name.end_lsn)[:calls]
    report("remove an old layer", each_us(lambda name: layers.with_changes((), [name]), old))

    wanted = [(n.key_start, n.key_end, n.end_lsn, top) for n in names]
    report("covering_images of a layer", each_us(lambda at: layers.covering_images(*at), wanted))
    spans = [(name.key_start, name.key_end) for name in picked[:500]]
    report("images of a layer's range", each_us(lambda span: layers.images(*span), spans))
    report("deltas of a layer's range", each_us(lambda span: layers.deltas(*span), spans))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=Path, help="file with the names of a timeline's layers")
    parser.add_argument("--layers", type=int, default=5000, help="layers of the made-up timeline")
    parser.add_argument("--calls", type=int, default=5000, help="calls measured of each kind")
    options = parser.parse_args()
    names = made_up(options.layers) if options.names is None else read_names(options.names)
    measure(names, options.calls)


if __name__ == "__main__":
    main()
