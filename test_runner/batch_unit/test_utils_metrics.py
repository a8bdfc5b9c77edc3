"""Histograms, the text format as Prometheus reads it, and versions."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from zenith_utils.histogram import HistogramCell
from zenith_utils.metrics import Metrics
from zenith_utils.version import VersionAction, commit_of


def test_histograms_are_what_prometheus_reads() -> None:
    """Cumulated buckets, count and sum for each label value; bounds belong to their bucket."""
    metrics = Metrics("pageserver")
    times = metrics.histogram("time", 'Of "all"', ["operation"], buckets=[0.1, 1])
    for value in (0.05, 0.1, 0.5, 7.0, float("nan")):
        times.labels('a"b').observe(value)
    times.labels("other").observe(1e-7)
    with pytest.raises(ValueError, match="has the labels"):
        times.labels()
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    found = {
        (s.name, *sorted(s.labels.items())): s.value for s in families["pageserver_time"].samples
    }
    name, label = "pageserver_time_bucket", ("operation", 'a"b')
    assert [found[name, ("le", le), label] for le in ("0.1", "1.0", "+Inf")] == [2, 3, 4]
    assert found["pageserver_time_count", label] == 4
    assert found["pageserver_time_sum", label] == pytest.approx(7.65)
    assert found["pageserver_time_sum", ("operation", "other")] == 1e-7


def test_histogram_counts_the_values_of_all_threads() -> None:
    cell = HistogramCell([1, 2])

    def observe() -> None:
        for _ in range(20_000):
            cell.observe(1.5)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cell.snapshot() == ([0, 80_000, 0], 120_000.0)
    for bounds in ([], [1, 1], [2, 1]):
        with pytest.raises(ValueError, match="ascend"):
            HistogramCell(bounds)


# ---- versions ----------------------------------------------------------------------------------


def test_version_is_that_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loose and packed refs, a detached HEAD, worktrees; GIT_VERSION of the environment wins."""
    commit, other = "1" * 40, "2" * 40
    git = tmp_path / ".git"
    assert commit_of(tmp_path) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(
        f"# pack-refs\n{other} refs/heads/main2\n{commit} refs/heads/main\n"
    )
    assert commit_of(tmp_path) == commit
    (git / "refs/heads/main").write_text(other + "\n")
    assert commit_of(tmp_path) == other
    worktree = tmp_path / "worktree"
    (git / "worktrees/w").mkdir(parents=True)
    worktree.mkdir()
    (worktree / ".git").write_text(f"gitdir: {git}/worktrees/w\n")
    (git / "worktrees/w/commondir").write_text("../..\n")
    (git / "worktrees/w/HEAD").write_text("ref: refs/heads/main2\n")
    assert commit_of(worktree) == other
    (git / "HEAD").write_text(commit + "\n")
    assert commit_of(tmp_path) == commit

    monkeypatch.setenv("GIT_VERSION", "abc")
    parser = argparse.ArgumentParser(prog="pageserver")
    parser.add_argument("--version", action=VersionAction)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "pageserver git-env:abc\n")
