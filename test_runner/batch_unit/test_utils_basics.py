"""LSNs, ids, text forms, durable files, feedback, log filters and metrics."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenith_utils import durable
from zenith_utils.cache_dir import cache_dir
from zenith_utils.conninfo import (
    ConninfoError,
    format_conninfo,
    options_from_startup,
    parse_conninfo,
    redact,
    redact_start,
)
from zenith_utils.duration import DurationError, format_duration, parse_duration
from zenith_utils.errors import render_error
from zenith_utils.ids import IdParseError, TenantId, TenantTimelineId, TimelineId
from zenith_utils.log import TRACE, apply_filter, init_logging, parse_filter
from zenith_utils.lsn import Lsn, LsnParseError, align8, lsn_text
from zenith_utils.metrics import IntegerFamily, Metrics
from zenith_utils.zenith_feedback import FeedbackError, ZenithFeedback

U64 = st.integers(0, 2**64 - 1)

# ---- LSN and ids -------------------------------------------------------------------------------


@given(U64)
def test_lsn_text_round_trip(value: int) -> None:
    lsn = Lsn(value)
    assert str(lsn) == lsn_text(value) == f"{value >> 32:X}/{value & 0xFFFFFFFF:X}"
    assert Lsn.parse(str(lsn)) == value
    assert Lsn.parse(str(lsn).lower()) == value
    assert f"{lsn:016X}" == f"{value:016X}"


NOT_LSNS = (
    *("", "/", "1/", "/1", "1", "1/2/3", "g/1", "1 /2", " 1/2", "1/2\n", "-1/2", "0x1/2", "+1/2"),
    *("100000000/0", "0/100000000", "1_0/0", "\u0661/\u0662"),
)


@pytest.mark.parametrize("text", NOT_LSNS)
def test_lsn_parse_refuses(text: str) -> None:
    with pytest.raises(LsnParseError, match="invalid LSN"):
        Lsn.parse(text)


@given(st.integers(0, 2**64 - 16))
def test_lsn_alignment_and_segments(value: int) -> None:
    lsn = Lsn(value)
    assert lsn.align8() == align8(value) == -(-value // 8) * 8
    assert lsn.align8().is_aligned()
    segment = 16 * 1024 * 1024
    assert lsn.segment_number() * segment + lsn.segment_offset() == value


def test_lsn_range_and_formatting() -> None:
    assert f"{Lsn(0x16B9188)} [{Lsn(26):>6}] {Lsn(26)!r}" == "0/16B9188 [  0/1A] Lsn('0/1A')"
    for value in (-1, 2**64):
        with pytest.raises(ValueError, match="64 bits"):
            Lsn(value)


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_ids(a: bytes, b: bytes) -> None:
    tenant, timeline = TenantId(a), TimelineId(b)
    assert TenantId.parse(str(tenant).upper()) == tenant
    assert str(tenant) == a.hex()
    assert (tenant == TenantId(b)) is (a == b)
    assert (TenantId(a) < TenantId(b)) is (a < b)
    assert len({tenant, TimelineId(a)}) == 2
    assert str(TenantTimelineId(tenant, timeline)) == f"{a.hex()}-{b.hex()}"


def test_ids_refuse_other_forms() -> None:
    good = "0123456789abcdef0123456789abcdef"
    for text in ("", good[1:], good + "0", "g" + good[1:], good + "\n", " " + good[1:]):
        with pytest.raises(IdParseError):
            TenantId.parse(text)
    with pytest.raises(IdParseError, match="timeline id"):
        TimelineId.parse("01234567-89ab-cdef-0123-456789abcdef")
    with pytest.raises(ValueError, match="16 bytes"):
        TenantId(b"short")
    assert TenantId.generate() != TenantId.generate()


# ---- connection strings, durations, errors -----------------------------------------------------


@given(
    st.dictionaries(
        st.text("abc_", min_size=1, max_size=4),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
        max_size=4,
    )
)
def test_conninfo_round_trip(params: dict[str, str]) -> None:
    assert parse_conninfo(format_conninfo(params)) == params


def test_conninfo_forms() -> None:
    assert parse_conninfo(r"host = a port=5 options='-c x=\'y\' z' user=b\ c password=''") == {
        "host": "a",
        "port": "5",
        "options": "-c x='y' z",
        "user": "b c",
        "password": "",
    }
    assert parse_conninfo("postgresql://u%40:p%3Aw@[::1]:55/d%20b?options=-c%20a%3Db&x=") == {
        "user": "u@",
        "password": "p:w",
        "host": "::1",
        "port": "55",
        "dbname": "d b",
        "options": "-c a=b",
        "x": "",
    }
    assert parse_conninfo("postgres://no_user:$ZENITH_AUTH_TOKEN@localhost:64000") == {
        "user": "no_user",
        "password": "$ZENITH_AUTH_TOKEN",
        "host": "localhost",
        "port": "64000",
    }
    assert parse_conninfo("postgresql://") == parse_conninfo(" ") == {}
    for text in ("host", "=x", "a='b", "a='b'c", "postgres://[::1", "postgres://h?x"):
        with pytest.raises(ConninfoError):
            parse_conninfo(text)


def test_passwords_are_redacted() -> None:
    text = "callmemaybe a b postgresql://u:secret@h:1 host=x password='se cret' port=1"
    assert "cret" not in redact(text)
    assert "postgresql://u:***@h:1 host=x password=*** port=1" in redact(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://u:p@ss@h/db?x=a@b", "postgres://u:***@h/db?x=a@b"),
        ("postgres://u:p@h?x=a@b", "postgres://u:***@h?x=a@b"),
        ("postgres://u:p?w@h", "postgres://u:***@h"),
        ("postgres://h/db?password=a'b&x=y", "postgres://h/db?password=***&x=y"),
        ("postgres://h/db?x=y&sslpassword=ab&x=y", "postgres://h/db?x=y&sslpassword=***&x=y"),
        (r"password=a\ b host=h", "password=*** host=h"),
        ("password=ab&cd host=h", "password=*** host=h"),
        ("password=a'b host=h", "password=*** host=h"),
        (r"password = 'a\' b' host=h", "password = *** host=h"),
        ("password='ab cd", "password=***"),
        ("password='ab\\", "password=***"),
    ],
)
def test_passwords_of_odd_forms_are_redacted_whole(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "unit",
    ["-eyJ", "eyJ.", "a.", "eyJ.a-", "eyJ..", "postgres://a:b", "password ", "password='\\", "?&x"],
)
def test_redaction_takes_time_in_proportion(unit: str) -> None:
    """What looks like the beginning of a token a million times: quadratic would take days."""
    text = "eyJ postgres password " + unit * 300_000
    assert redact(text).startswith("eyJ postgres password ")


def test_the_start_of_a_text_shows_no_half_of_a_secret() -> None:
    token = "eyJhbGciOiJSUzI1NiJ9.eyJzY29wZSI6InQifQ.c2lnbmF0dXJl"
    for secret in (f"Bearer {token}", f"postgres://u:{token}@h", "password='se cr et'"):
        for cut in range(30, 30 + len(secret) + 1):
            shown = redact_start("x" * 20 + " " + secret + " and so on " * 20, cut)
            assert "eyJ" not in shown and "se" not in shown and len(shown) <= cut + 3
    assert redact_start("as it is", 8) == "as it is"
    assert redact_start("cut behind a word", 12) == "cut behind a..."
    assert redact_start("cut behind a word", 10) == "cut behind..."
    assert redact_start("cut behind a word", 9) == "cut..."


def test_startup_options() -> None:
    params = {"user": "u", "options": r"-c ztenantid=ab  --x=1 -cy=2 junk s=a\ b", "y": "3"}
    assert options_from_startup(params) == {
        "user": "u",
        "ztenantid": "ab",
        "x": "1",
        "y": "3",
        "s": "a b",
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1 s", 1), ("1 second", 1), ("100ms", 0.1), ("1h 30min", 5400), ("2d3h", 183600), ("0", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "1", "s", "1 parsec", "-1 s", "1.5 s", "1 s x", "101 y", "9" * 5000 + "ns"]
)
def test_durations_refused(text: str) -> None:
    with pytest.raises(DurationError, match="invalid duration"):
        parse_duration(text)


def test_error_chain() -> None:
    try:
        try:
            try:
                raise OSError("disk is full")
            except OSError as error:
                raise RuntimeError("cannot write layer") from error
        except RuntimeError as error:
            raise KeyError("k") from error
    except KeyError as error:
        text = render_error(error)
    assert text == (
        "Error: KeyError: 'k'\n\nCaused by:\n    0: cannot write layer\n    1: disk is full"
    )
    assert render_error(ValueError("alone")) == "Error: alone"


def test_a_cause_is_not_told_twice() -> None:
    """What a message took over from its cause does not come again below it; other causes do."""
    refused = ConnectionRefusedError(111, "Connection refused")
    unreachable = RuntimeError("cannot reach http://h:1/: [Errno 111] Connection refused")
    unreachable.__cause__ = refused
    assert render_error(unreachable) == f"Error: {unreachable}"
    outer = RuntimeError("the pageserver does not answer")
    outer.__cause__ = unreachable
    assert render_error(outer) == f"Error: {outer}\n\nCaused by:\n    0: {unreachable}"
    unopened = RuntimeError("Error opening workdir 'x'")
    unopened.__cause__ = FileNotFoundError(2, "No such file or directory", "x")
    assert "0: [Errno 2] No such file or directory: 'x'" in render_error(unopened)


# ---- files -------------------------------------------------------------------------------------


def test_durable_write_replaces_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "control"
    durable.write_file_durably(path, b"one")
    assert path.stat().st_mode & 0o777 == 0o600
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        calls.append("fsync " + Path(f"/proc/self/fd/{fd}").readlink().name.partition(".")[0])
        real_fsync(fd)

    def replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        assert path.read_bytes() == b"one"
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    durable.write_file_durably(path, memoryview(b"two"))
    assert path.read_bytes() == b"two"
    assert calls == ["fsync control", "rename", f"fsync {tmp_path.name}"]


def test_failed_durable_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "control"
    path.write_bytes(b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_file_durably(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["control"]
    assert path.read_bytes() == b"old"


def test_durable_write_that_gets_no_descriptor_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is the directory that cannot be opened."""
    path = tmp_path / "control"
    path.write_bytes(b"old")
    real_open = os.open

    def no_directory(name: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECTORY:
            raise OSError(24, "Too many open files")
        return real_open(name, flags, mode)

    monkeypatch.setattr(os, "open", no_directory)
    with pytest.raises(OSError, match="Too many open files"):
        durable.write_file_durably(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["control"]
    assert path.read_bytes() == b"old"


def test_cache_dir_is_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENITH_CACHE_DIR", str(tmp_path / "a" / "b"))
    old = os.umask(0o077)
    try:
        assert cache_dir().stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(old)


# ---- feedback ----------------------------------------------------------------------------------


@given(U64, U64, U64, U64, st.integers(-(2**63), 2**63 - 1))
def test_feedback_round_trip(size: int, write: int, flush: int, apply: int, at: int) -> None:
    feedback = ZenithFeedback(size, write, flush, apply, at)
    assert ZenithFeedback.parse(feedback.encode()) == feedback


def test_feedback_bytes_and_unknown_keys() -> None:
    raw = ZenithFeedback(1, 2, 3, 4, 5).encode()
    assert raw.startswith(b"\5current_timeline_size\0\0\0\0\x08\0\0\0\0\0\0\0\1ps_writelsn\0")
    keys = re.findall(rb"[a-z_]{5,}", raw)
    assert keys[2:] == [b"ps_flushlsn", b"ps_applylsn", b"ps_replytime"]
    newer = b"\6future\0\0\0\0\3abc" + raw[1:]
    assert ZenithFeedback.parse(memoryview(newer)) == ZenithFeedback(1, 2, 3, 4, 5)


@given(st.data())
def test_feedback_survives_garbage(data: st.DataObject) -> None:
    raw = bytearray(ZenithFeedback(1, 2, 3, 4, 5).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    try:
        ZenithFeedback.parse(raw[:cut])
    except FeedbackError:
        return


# ---- logging -----------------------------------------------------------------------------------


@pytest.fixture
def restored_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = ["", *list(logging.Logger.manager.loggerDict)]
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    monkeypatch.setattr("sys.excepthook", None)
    monkeypatch.setattr("threading.excepthook", None)
    yield
    logging.captureWarnings(False)
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        root.addHandler(handler)
    for name in [*logging.Logger.manager.loggerDict, ""]:
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))


@pytest.mark.usefixtures("restored_logging")
def test_filter_sets_levels() -> None:
    def enabled(name: str) -> int:
        return logging.getLogger(name).getEffectiveLevel()

    assert apply_filter("debug,pageserver::walreceiver=trace,safekeeper=off,aiohttp.web=info") == []
    assert enabled("pageserver.page_service") == logging.DEBUG
    assert enabled("pageserver.walreceiver.connection") == TRACE
    assert enabled("pageserver.walreceiver2") == logging.DEBUG
    assert enabled("safekeeper.main") > logging.CRITICAL
    assert enabled("some_library") == logging.WARNING
    assert enabled("aiohttp.web") == logging.INFO


def test_filter_syntax() -> None:
    assert parse_filter("WARN") == (logging.WARNING, {}, [])
    assert parse_filter("") == (logging.INFO, {}, [])
    assert parse_filter(" a::b = Error , c") == (
        logging.ERROR,
        {"a.b": logging.ERROR, "c": TRACE},
        [],
    )
    assert parse_filter("info,x=loud,a-b=info") == (logging.INFO, {}, ["x=loud", "a-b=info"])


@pytest.mark.usefixtures("restored_logging")
def test_log_file(tmp_path: Path) -> None:
    target = tmp_path / "x.log"
    target.write_text("kept\n")
    init_logging(target, "info,nonsense=x")
    logger = logging.getLogger("pageserver.test")
    logger.debug("hidden")
    logger.warning("shown %d", 7)
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("with traceback")
    text = target.read_text()
    assert text.startswith("kept\n")
    assert "ignored 'nonsense=x' in RUST_LOG" in text
    line = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z  WARN MainThread pageserver\.test: shown 7$"
    assert re.search(line, text, re.MULTILINE)
    assert "ValueError: inner" in text
    assert "hidden" not in text
    assert "\x1b" not in text


@pytest.mark.usefixtures("restored_logging")
def test_lost_log_directory_does_not_fail_the_caller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    init_logging(directory / "x.log")
    (directory / "x.log").rename(tmp_path / "moved.log")
    directory.rmdir()
    logging.getLogger("pageserver").info("into the void")
    assert "FileNotFoundError" in capsys.readouterr().err
    directory.mkdir()
    logging.getLogger("pageserver").info("back again")
    assert "back again" in (directory / "x.log").read_text()


# ---- metrics -----------------------------------------------------------------------------------


def test_metrics_text() -> None:
    metrics = Metrics("safekeeper")
    lsn = 2**64 - 1

    def lsns() -> list[IntegerFamily]:
        labels = ("tenant_id", "timeline_id")
        families = [IntegerFamily(f"safekeeper_{n}_lsn", n, labels) for n in ("commit", "flush")]
        for family in families:
            family.add(lsn, "ab", 'c"d\\')
        return families

    metrics.add_source(lsns)
    live = metrics.gauge("live_connections_count", "Live", ["connection_kind"])
    live.inc("page_service")
    live.inc("page_service", by=2)
    metrics.histogram("wal_seconds", "Time", buckets=[0.1, 1]).labels().observe(0.5)
    lines = metrics.render().decode().splitlines()
    assert f'safekeeper_flush_lsn{{tenant_id="ab",timeline_id="c\\"d\\\\"}} {lsn}' in lines
    positions = [next(i for i, li in enumerate(lines) if li.startswith(p)) for p in
                 ("safekeeper_commit_lsn{", "safekeeper_flush_lsn{")]  # fmt: skip
    assert positions == sorted(positions)
    assert 'safekeeper_live_connections_count{connection_kind="page_service"} 3' in lines
    assert 'safekeeper_wal_seconds_bucket{le="1.0"} 1' in lines
    assert "safekeeper_serve_metrics_count 1" in lines
    text = "\n".join(lines)
    assert re.search(r'^safekeeper_disk_io_bytes\{io_operation="write"\} \d+$', text, re.M)
    assert re.search(r"^safekeeper_maxrss_kb [1-9]\d*$", text, re.M)
    assert "_created" not in text
    assert "safekeeper_serve_metrics_count 2" in metrics.render().decode()
