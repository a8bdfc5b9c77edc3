"""The cache of built C modules."""

import ctypes
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from pgxn import build
from postgres_ffi.distrib import PgDistrib, find_distrib
from zenith_utils.reachable import closed_part


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; not below a directory that is closed to other users."""
    path = tmp_path / "cache"
    monkeypatch.setenv("ZENITH_CACHE_DIR", str(path))
    monkeypatch.setattr(build, "closed_part", lambda _path: None)
    return path


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Module sources of two functions in two files."""
    folder = tmp_path / "pgxn" / "lazyfiles"
    folder.mkdir(parents=True)
    (folder / "answer.h").write_text("#define ANSWER 41\nint offset(void);\n")
    (folder / "offset.c").write_text('#include "answer.h"\nint offset(void) { return 1; }\n')
    (folder / "answer.c").write_text(
        '#include "answer.h"\nint answer(void) { return ANSWER + offset(); }\n'
    )
    return folder.parent


def build_it(sources: Path) -> Path:
    return build.build_module(find_distrib(), "lazyfiles", source_root=sources)


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_builds_once_and_finds_it_again(cache: Path, sources: Path) -> None:
    first = build_it(sources)
    made = first.stat().st_mtime_ns
    assert answer(first) == 42
    assert build_it(sources) == first
    assert first.stat().st_mtime_ns == made


def test_others_may_read_what_was_built(cache: Path, sources: Path) -> None:
    library = build_it(sources)
    assert stat.S_IMODE(library.stat().st_mode) == 0o644
    for folder in (library.parent, library.parent.parent, cache):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["answer.c", "answer.h"])
def test_a_changed_source_is_another_build(cache: Path, sources: Path, name: str) -> None:
    before = build_it(sources)
    path = sources / "lazyfiles" / name
    path.write_text(path.read_text().replace("41", "51").replace("ANSWER +", "10 + ANSWER +"))
    after = build_it(sources)
    assert after != before
    assert (answer(before), answer(after)) == (42, 52)


def test_the_compiler_is_part_of_the_key(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_it(sources)
    monkeypatch.setenv("CC", "gcc -DUNUSED")
    assert build_it(sources) != before


def test_concurrent_builders_share_one_build(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_really = build._compile

    def count(*args: object) -> None:
        compiled.append(args)
        compile_really(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "_compile", count)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(build_it(sources))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert len(set(results)) == 1
    assert len(compiled) == 1
    assert answer(results[0]) == 42
    assert not list((cache / "modules").glob("build-*"))


@pytest.mark.parametrize("name", ["a b", "a:b"])
def test_a_cache_that_cannot_be_preloaded_from(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("ZENITH_CACHE_DIR", str(cache.parent / name))
    with pytest.raises(build.ModuleBuildError, match="or a colon in it: set ZENITH_CACHE_DIR"):
        build_it(sources)


def test_a_failed_build_leaves_nothing(cache: Path, sources: Path) -> None:
    (sources / "lazyfiles" / "answer.c").write_text("int answer(void) { return MISSING; }\n")
    with pytest.raises(build.ModuleBuildError, match=r"lazyfiles failed: .*MISSING") as caught:
        build_it(sources)
    assert "\n" not in str(caught.value)
    assert not list((cache / "modules").rglob("*.so"))
    assert not list((cache / "modules").glob("build-*"))


def test_a_killed_build_is_cleaned_up_by_the_next(cache: Path, sources: Path) -> None:
    library = build_it(sources)
    shutil.rmtree(library.parent)
    scratch = cache / "modules" / f"build-{library.parent.name}-x"
    scratch.mkdir()
    (scratch / library.name).write_text("half of it")
    assert answer(build_it(sources)) == 42
    assert not list((cache / "modules").glob("build-*"))


def test_missing_compiler(cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.ModuleBuildError, match=r"no-such-compiler.*install gcc"):
        build_it(sources)


def test_missing_server_headers(cache: Path) -> None:
    found = find_distrib()
    headless = PgDistrib(found.bin_dir, found.pkglib_dir, None, found.version_num, found.major)
    with pytest.raises(build.ModuleBuildError, match=f"postgresql-server-dev-{found.major}"):
        build.build_module(headless, "walredo")


def test_a_cache_closed_to_the_server_user(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs Postgres as another user")
    monkeypatch.setenv("ZENITH_OS_USER", "nobody")
    monkeypatch.setattr(build, "closed_part", closed_part)
    cache.mkdir(mode=0o700)
    with pytest.raises(build.ModuleBuildError, match=r"closed to user nobody.*ZENITH_CACHE_DIR"):
        build_it(sources)


def test_the_tree_s_own_modules_build_without_warnings(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_COMMON_FLAGS", (*build._COMMON_FLAGS, "-Werror"))
    shutil.copytree(build.SOURCE_ROOT / "walredo", sources / "walredo")
    assert build.build_module(find_distrib(), "walredo", source_root=sources).is_file()
