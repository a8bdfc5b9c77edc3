"""On-demand build of the C modules against the headers of a Postgres distribution.

Each module is one folder of this package; all its ``.c`` files become ``<name>.so``, and what makes
an extension of it (``.control``, ``.sql``) is put beside that. Builds are
cached in ``cache_dir()/modules/<version_num>-<hash>/``; the hash covers everything that decides
the result: sources, flags, compiler and the distribution's ``pg_config.h``. A cached build is
therefore never stale, and a new one never replaces a file that a running server has mapped.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from postgres_ffi.distrib import PgDistrib
from zenith_utils.cache_dir import cache_dir
from zenith_utils.os_user import postgres_user
from zenith_utils.reachable import closed_part

SOURCE_ROOT = Path(__file__).resolve().parent

_COMMON_FLAGS = (
    *("-std=gnu99", "-O2", "-g", "-fPIC", "-shared", "-D_GNU_SOURCE", "-fstack-protector-strong"),
    *("-Wall", "-Wextra", "-Wpointer-arith", "-Wvla"),
    *("-Wno-unused-parameter", "-Wno-sign-compare", "-Wno-missing-field-initializers"),
    "-Wl,-z,relro,-z,now",
)

# The flags Postgres itself is built with and its headers rely on. Releases before 16 leave
# PGDLLEXPORT empty, so it is given a value that survives -fvisibility=hidden.
_SERVER_FLAGS = (
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fexcess-precision=standard",
    "-fvisibility=hidden",
    '-DPGDLLEXPORT=__attribute__((visibility("default")))',
)


class ModuleBuildError(Exception):
    """A C module cannot be built or used; the message is one line that names the remedy."""


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """How one module is built."""

    server: bool
    """Whether it is loaded by the server and so compiled against the server's headers."""
    libs: tuple[str, ...] = ()
    """Linker options that follow the objects."""
    shared: tuple[str, ...] = ()
    """Sources of other modules that it is made of, too, from the folder of all modules."""


MODULES = {
    "walredo": ModuleSpec(server=True),
    "zenith": ModuleSpec(server=True),
    "zenith_test_utils": ModuleSpec(
        server=True, shared=("lazyfiles/connection.c", "lazyfiles/lazyfiles.h")
    ),
    "lazyfiles": ModuleSpec(server=False, libs=("-ldl", "-lpthread", "-Wl,-z,defs")),
}


@dataclass(frozen=True, slots=True)
class PgModules:
    """Absolute paths of the built shared libraries.

    The files of an extension lie beside its library.
    """

    walredo: Path
    lazyfiles: Path
    zenith: Path
    zenith_test_utils: Path


def build_modules(distrib: PgDistrib) -> PgModules:
    """Build (or find in the cache) every module for this distribution.

    Raises ModuleBuildError.
    """
    compiler = find_compiler()
    return PgModules(**{name: build_module(distrib, name, compiler=compiler) for name in MODULES})


@dataclass(frozen=True, slots=True)
class Compiler:
    """The C compiler's command line, and its name and version."""

    command: tuple[str, ...]
    version: str


def build_module(
    distrib: PgDistrib,
    name: str,
    *,
    source_root: Path = SOURCE_ROOT,
    compiler: Compiler | None = None,
) -> Path:
    """Build (or find in the cache) one module; returns the path of ``<name>.so``.

    The file is world readable: Postgres runs as another user when Zenith runs as root. `compiler`
    is for a caller of several builds, who has asked for it already. Safe against concurrent
    builders. Raises ModuleBuildError.
    """
    spec = MODULES[name]
    sources = [*_sources(source_root / name), *(source_root / path for path in spec.shared)]
    data = _extension_files(source_root / name)
    compiler = compiler or find_compiler()
    flags = _flags(distrib, spec)
    modules_dir = _modules_dir()
    command = [*compiler.command, compiler.version, *flags]
    digest = _digest(distrib, name, spec, [*sources, *data], command)
    target = modules_dir / f"{distrib.version_num}-{digest}" / f"{name}.so"
    if not target.exists():
        with _locked(modules_dir, target.parent.name):
            if not target.exists():
                _compile(target, [*compiler.command, *flags], sources, data, spec)
    _check_reachable(target)
    return target


def _sources(folder: Path) -> list[Path]:
    """The C sources and headers of a module folder, sorted."""
    sources = sorted([*folder.glob("*.c"), *folder.glob("*.h")])
    if not any(path.suffix == ".c" for path in sources):
        raise ModuleBuildError(f"{folder} holds no C sources: the installation is incomplete")
    return sources


def _extension_files(folder: Path) -> list[Path]:
    """Control file and scripts of the extension whose functions a module holds, sorted."""
    return sorted([*folder.glob("*.control"), *folder.glob("*.sql")])


def find_compiler() -> Compiler:
    """The compiler of $CC, else gcc. Raises ModuleBuildError if it does not work."""
    command = os.environ.get("CC", "gcc").split()
    try:
        version = subprocess.run(
            [*command, "--version"],
            capture_output=True,
            check=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError) as e:
        raise ModuleBuildError(
            f"no working C compiler {' '.join(command)!r}: install gcc and libc6-dev"
            " (Debian: apt-get install gcc libc6-dev) or set CC"
        ) from e
    return Compiler(tuple(command), version.stdout.partition("\n")[0])


def _flags(distrib: PgDistrib, spec: ModuleSpec) -> list[str]:
    flags = list(_COMMON_FLAGS)
    if spec.server:
        flags += [*_SERVER_FLAGS, f"-I{_server_headers(distrib)}"]
    return flags


def _server_headers(distrib: PgDistrib) -> Path:
    headers = distrib.include_server_dir
    if headers is None or not (headers / "postgres.h").is_file():
        raise ModuleBuildError(
            f"the server headers of PostgreSQL {distrib.major} are missing: install them"
            f" (Debian: apt-get install postgresql-server-dev-{distrib.major})"
        )
    return headers


def _digest(
    distrib: PgDistrib, name: str, spec: ModuleSpec, files: list[Path], command: list[str]
) -> str:
    """Hash of all that decides the build's result, 16 hex digits.

    Short because the library path of a background worker is (BGW_MAXLEN in bgworker.h).
    """
    inputs = [(path.name, path.read_bytes()) for path in files]
    if spec.server:
        config = _server_headers(distrib) / "pg_config.h"
        inputs.append((config.name, config.read_bytes()))
    digest = hashlib.sha256("\0".join([name, *command, *spec.libs]).encode())
    for label, content in inputs:
        digest.update(f"\0{label}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _modules_dir() -> Path:
    """The cache of built modules, made if absent."""
    try:
        modules_dir = cache_dir() / "modules"
        _make_dir(modules_dir)
    except OSError as e:
        raise _not_writable(e) from e
    if not can_be_preloaded(modules_dir):
        raise ModuleBuildError(
            f"modules cannot be loaded from {modules_dir}, which has a blank or a colon in it: "
            "set ZENITH_CACHE_DIR to a directory that has none"
        )
    return modules_dir


def can_be_preloaded(path: Path) -> bool:
    """Whether LD_PRELOAD can name a file there: it is split at blanks and colons (ld.so(8))."""
    return not set(" :") & set(str(path))


def _make_dir(path: Path) -> None:
    """Make a directory that every user can read, whatever the umask."""
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        path.chmod(0o755)


def _not_writable(error: OSError) -> ModuleBuildError:
    return ModuleBuildError(
        f"the module cache is not writable ({error}): set ZENITH_CACHE_DIR to a directory that is"
    )


@contextlib.contextmanager
def _locked(modules_dir: Path, build: str) -> Iterator[None]:
    """Hold the lock of one build; different builds do not wait for each other."""
    try:
        _make_dir(modules_dir / "locks")
        fd = os.open(modules_dir / "locks" / build, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise _not_writable(e) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _compile(
    target: Path, command: list[str], sources: list[Path], data: list[Path], spec: ModuleSpec
) -> None:
    """Compile into a temporary directory and publish the result as ``target`` by one rename.

    What belongs beside it is there before. For the holder of the build's lock.
    """
    modules_dir, prefix = target.parent.parent, f"build-{target.parent.name}-"
    for left in modules_dir.glob(f"{prefix}*"):
        # Of a builder that was killed; its compiler may still run, so the name is not used again.
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=modules_dir, prefix=prefix))
    try:
        output = scratch / target.name
        units = [str(path) for path in sources if path.suffix == ".c"]
        result = subprocess.run(
            [*command, "-o", str(output), *units, *spec.libs],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if result.returncode != 0:
            raise ModuleBuildError(
                f"compiling {sources[0].parent} failed: {_first_error(result.stdout)}"
                " (check that libc6-dev is installed and the headers match the server)"
            )
        _make_dir(target.parent)
        for path in data:
            _publish(Path(shutil.copyfile(path, scratch / path.name)), target.with_name(path.name))
        _publish(output, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(path: Path, target: Path) -> None:
    """Move a file to where it belongs; a crash must not leave a truncated one there."""
    path.chmod(0o644)
    _fsync_file(path)
    path.rename(target)


def _fsync_file(path: Path) -> None:
    """Make the content of a file durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _first_error(output: str) -> str:
    """The compiler's first complaint, or its last line if it names none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line or "undefined reference" in line]
    return (errors or lines[-1:] or ["the compiler was killed"])[0]


def _check_reachable(target: Path) -> None:
    """Fail now, with the remedy, if the unprivileged user could not open the library."""
    closed, user = closed_part(target), postgres_user()
    if closed is not None and user is not None:
        raise ModuleBuildError(
            f"{closed} is closed to user {user.pw_name}, who must load {target.name}:"
            " set ZENITH_CACHE_DIR to a directory open to that user"
        )
