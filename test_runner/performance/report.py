"""Report on the benchmark results of a directory: the last run beside the earlier ones, as a page.

The same as at the end of a run with --out-dir.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixtures import benchmark_page, benchmark_results


def main() -> int:
    """Print the tables and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="What --out-dir was.")
    directory = parser.parse_args().directory
    runs = benchmark_results.load(directory)
    if not runs:
        print(f"{directory} holds no benchmark results", file=sys.stderr)
        return 1
    print(benchmark_results.table(runs))
    print(f"report: {benchmark_page.write_page(directory, runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
