"""Benchmark results: what is read from pgbench, files of runs, their comparison and its page."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fixtures import benchmark_results
from fixtures.benchmark_fixture import MetricReport, PgBenchRunResult, ZenithBenchmarker
from fixtures.benchmark_page import write_page

PGBENCH_15 = """pgbench (15.20 (Debian 15.20-0+deb12u1))
starting vacuum...end.
transaction type: <builtin: TPC-B (sort of)>
scaling factor: 7
query mode: prepared
number of clients: 4
number of threads: 2
maximum number of tries: 1
number of transactions per client: 250
number of transactions actually processed: 1000/1000
number of failed transactions: 0 (0.000%)
latency average = 0.717 ms
latency stddev = 1.402 ms
initial connection time = 250.000 ms
tps = 2000.000000 (without initial connection time)
"""
PGBENCH_13 = """starting vacuum...end.
transaction type: <builtin: TPC-B (sort of)>
scaling factor: 7
query mode: simple
number of clients: 4
number of threads: 2
number of transactions per client: 250
number of transactions actually processed: 1000/1000
latency average = 0.717 ms
tps = 1500.000000 (including connections establishing)
tps = 2000.000000 (excluding connections establishing)
"""
TIMES = {
    "init_duration": 1.5,
    "init_start_timestamp": 10,
    "init_end_timestamp": 12,
    "run_duration": 0.75,
    "run_start_timestamp": 13,
    "run_end_timestamp": 14,
}


@pytest.mark.parametrize(
    ("text", "including", "stddev"),
    [
        (PGBENCH_15, pytest.approx(1000 / 0.75), 1.402),
        (PGBENCH_13, 1500.0, None),
        (PGBENCH_13.replace("including connections establishing", "including reconnection times")
         .replace("excluding connections establishing", "-"), 1500.0, None),
    ],
    ids=["15", "13", "reconnecting"],
)  # fmt: skip
def test_pgbench_output(text: str, including: float, stddev: float | None) -> None:
    """Of every version and mode: the rates mean what their names say."""
    result = PgBenchRunResult.parse_from_output(text, **TIMES)  # type: ignore[arg-type]
    assert (result.scale, result.number_of_clients, result.number_of_threads) == (7, 4, 2)
    assert result.number_of_transactions_actually_processed == 1000
    assert (result.latency_average, result.latency_stddev) == (0.717, stddev)
    assert result.tps_including_connection_time == including
    assert result.tps_excluding_connection_time in (2000.0, 1500.0)
    assert result.run_duration == 0.75


def test_pgbench_output_of_a_process() -> None:
    """A finished process does as well as its text; what is no output of pgbench is told."""
    done = subprocess.CompletedProcess(["pgbench"], 0, stdout=PGBENCH_15)
    assert PgBenchRunResult.parse_from_output(done, 1, 2, 3, 4, 5, 6).scale == 7
    with pytest.raises(ValueError, match="number of transactions"):
        PgBenchRunResult.parse_from_output("no such thing", 1, 2, 3, 4, 5, 6)


def test_recorded_properties() -> None:
    """Each figure is a property with its kind; a missing deviation is none."""
    recorded: dict[str, Any] = {}
    benchmarker = ZenithBenchmarker(recorded.__setitem__)
    with benchmarker.record_duration("step"):
        pass
    benchmarker.record_pg_bench_result(
        PgBenchRunResult.parse_from_output(PGBENCH_13, 1, 2, 3, 4, 5, 6)
    )
    assert recorded["zenith_benchmarker_step"]["unit"] == "s"
    assert recorded["zenith_benchmarker_scale"] == {
        "name": "scale",
        "value": 7,
        "unit": "",
        "report": "test_param",
    }
    assert "zenith_benchmarker_latency_stddev" not in recorded
    assert len(recorded) == 14


def results(seconds: float, rate: float, zenith: float = 2.0) -> list[dict[str, Any]]:
    """The results of one run."""

    def item(name: str, value: float, unit: str, report: MetricReport) -> dict[str, Any]:
        return {"name": name, "value": value, "unit": unit, "report": str(report)}

    lower, higher = MetricReport.LOWER_IS_BETTER, MetricReport.HIGHER_IS_BETTER
    data = [
        item("load", seconds, "s", lower),
        item("rate", rate, "MB/s", higher),
        item("scale", 10, "", MetricReport.TEST_PARAM),
    ]
    pairs = [
        {"suit": f"p/t.py::test_b[{name}]", "total_duration": 2, "data": [item("q", v, "s", lower)]}
        for name, v in (("vanilla", 1.0), ("zenith", zenith))
    ]
    return [{"suit": "p/t.py::test_a", "total_duration": 1, "data": data}, *pairs]


def write_runs(directory: Path, *runs: list[dict[str, Any]]) -> list[benchmark_results.Run]:
    for day, run in enumerate(runs, 1):
        benchmark_results.write(directory, run, datetime(2026, 1, day, tzinfo=UTC))
    return benchmark_results.load(directory)


def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name and content are what tools that collect results rely on."""
    monkeypatch.setenv("GITHUB_SHA", "abc123")
    monkeypatch.setenv("PLATFORM", "laptop")
    path = benchmark_results.write(
        tmp_path / "new", results(1, 2), datetime(2026, 1, 1, tzinfo=UTC)
    )
    assert path.name == f"{int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())}_abc123.json"
    content = json.loads(path.read_text())
    assert (content["revision"], content["platform"]) == ("abc123", "laptop")
    assert content["result"] == results(1, 2)
    monkeypatch.delenv("GITHUB_SHA")
    monkeypatch.delenv("PLATFORM")
    local = json.loads(benchmark_results.write(tmp_path, [], datetime.now(UTC)).read_text())
    assert (local["revision"], local["platform"]) == ("local", "local")


def test_changes(tmp_path: Path) -> None:
    """Better and worse are told by the kind of the figure, and from noise."""
    runs = write_runs(tmp_path, results(1.0, 100), results(1.1, 104), results(2.0, 200))
    found = {change.metric.name: change for change in benchmark_results.changes(runs)}
    assert found["load"].verdict == "worse"
    assert found["load"].earlier == pytest.approx(1.05)
    assert found["rate"].verdict == "better"
    assert found["q"].verdict == "same"
    assert "scale" not in found
    found = {change.metric.name: change for change in benchmark_results.changes(runs[:2])}
    assert (found["load"].verdict, found["rate"].verdict) == ("worse", "same")
    assert benchmark_results.changes(runs[:1]) == []


def test_other_platforms_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's figures say nothing."""
    write_runs(tmp_path, results(1.0, 100))
    monkeypatch.setenv("PLATFORM", "other")
    benchmark_results.write(tmp_path, results(9.0, 100), datetime(2026, 2, 1, tzinfo=UTC))
    assert benchmark_results.changes(benchmark_results.load(tmp_path)) == []


def test_table(tmp_path: Path) -> None:
    """Before, now, ratio; and Zenith beside stock Postgres."""
    table = benchmark_results.table(write_runs(tmp_path, results(1.0, 100), results(2.0, 100, 0.5)))
    lines = [line.split() for line in table.splitlines()]
    assert ["test_a", "load", "1", "2", "s", "2.00", "worse"] in lines
    assert ["test_b", "q", "1", "0.5", "s", "0.50"] in lines


def test_page(tmp_path: Path) -> None:
    """One file with tables and the plot in it, and the plot as a picture."""
    path = write_page(tmp_path, write_runs(tmp_path, results(1.0, 100), results(2.0, 100)))
    text = path.read_text()
    assert text.count("<svg") == 1
    assert "<span class=worse>worse</span>" in text
    assert "src=" not in text
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    """It is named, if it is called like one of ours; others are left alone."""
    (tmp_path / "package.json").write_text("{}")
    assert benchmark_results.load(tmp_path) == []
    (tmp_path / "17_x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"17_x\.json holds no benchmark results"):
        benchmark_results.load(tmp_path)
