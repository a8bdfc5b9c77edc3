"""Lazily opened files of a process whose children share its memory or have their own."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_unit.lazyfiles_process import Files, build_symbols, lazy_files

CHILD = """
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char page[8192];

static long
work(const char *call, int fd, int other, const char *path)
{
    if (strcmp(call, "close") == 0)
        return close(fd);
    if (strcmp(call, "close_range") == 0)
        return close_range(3, ~0u, 0);
    if (strcmp(call, "closefrom") == 0)
        return closefrom(3), 0;
    if (strcmp(call, "dup2") == 0)
        return dup2(other, fd);
    if (strcmp(call, "dup3") == 0)
        return dup3(other, fd, O_CLOEXEC);
    if (strcmp(call, "dup") == 0)
        return close(fd) < 0 ? -1 : dup(other);
    if (strcmp(call, "fcntl") == 0)
        return close(fd) < 0 ? -1 : fcntl(other, F_DUPFD, fd);
    if (strcmp(call, "open") == 0)
        return close(fd) < 0 ? -1 : open(path, O_RDWR);
    if (strcmp(call, "open to write") == 0)
        return open(path, O_WRONLY);
    if (strcmp(call, "pread") == 0)
        return pread(fd, page, sizeof(page), 8 * 8192);
    if (strcmp(call, "pwrite") == 0)
        return pwrite(fd, page, sizeof(page), 8 * 8192);
    if (strcmp(call, "ftruncate") == 0)
        return ftruncate(fd, 8192);
    _exit(1);
}

/* The error of a call in a child with our memory and its own descriptors; 0 if it succeeds. */
int
in_vfork_child(const char *call, int fd, int other, const char *path)
{
    static volatile int error;
    pid_t       pid;
    int         status;

    if ((pid = vfork()) == 0)
    {
        error = work(call, fd, other, path) < 0 ? errno : 0;
        _exit(0);
    }
    return pid > 0 && waitpid(pid, &status, 0) == pid && status == 0 ? error : -1;
}
"""

PROGRAM = """
import os, subprocess, threading
child = ctypes.CDLL(os.environ["TEST_CHILD"]).in_vfork_child
fd, other = os.open(PATH, os.O_RDWR), os.open("other", os.O_RDWR | os.O_CREAT)
blocks = iter(range(20, 300, 4))

def check(what):
    # The relation's file is still watched, and the other one is not.
    block, overwritten = next(blocks), next(blocks)
    assert os.pread(fd, BLOCK, block * BLOCK) == complete(PATH, block), what
    os.pwrite(other, bytes(BLOCK), overwritten * BLOCK)
    assert os.pread(fd, BLOCK, overwritten * BLOCK) == complete(PATH, overwritten), what
"""


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("libraries")
    child = directory / "child.so"
    command = ["gcc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", str(child), "-x", "c", "-"]
    subprocess.run(command, input=CHILD, text=True, check=True)
    return build_symbols(directory), child


@pytest.fixture
def files(tmp_path: Path, libraries: tuple[Path, Path]) -> Iterator[Files]:
    symbols, child = libraries
    with lazy_files(tmp_path, symbols) as files:
        files.environment["TEST_CHILD"] = str(child)
        yield files


def test_vfork_child_leaves_the_descriptors_alone(files: Files) -> None:
    files.run(
        PROGRAM
        + """
for call in "close close_range closefrom dup2 dup3 dup fcntl open".split():
    for one, another, path in ((fd, other, "PG_VERSION"), (other, fd, PATH)):
        error = child(call.encode(), one, another, path.encode())
        assert error == (1 if call == "open" and path == PATH else 0), (call, error)
        check((call, path))
"""
    )


def test_vfork_child_cannot_touch_absent_blocks(files: Files) -> None:
    files.run(
        PROGRAM
        + """
for call in "pread", "pwrite", "ftruncate", "open to write":
    assert child(call.encode(), fd, other, PATH.encode()) == 1, call
same(fd, PATH, 8)
assert child(b"pread", fd, other, b"") == 0, "a block that is there"
check("refused calls")
"""
    )


def test_programs_leave_the_descriptors_of_their_parent_alone(files: Files) -> None:
    files.run(
        PROGRAM
        + """
true = ["/bin/true"]
subprocess.run(true, check=True)
check("subprocess")
subprocess.run(true, check=True, pass_fds=[other], stdin=other, stdout=fd)
check("subprocess with descriptors")
actions = [(os.POSIX_SPAWN_OPEN, other, PATH, os.O_RDONLY, 0),
           (os.POSIX_SPAWN_DUP2, 0, fd), (os.POSIX_SPAWN_DUP2, other, 60),
           (os.POSIX_SPAWN_CLOSE, fd)]
assert os.waitpid(os.posix_spawn(true[0], true, {}, file_actions=actions), 0)[1] == 0
check("posix_spawn")
assert os.system("/bin/true") == 0
check("system")
libc = ctypes.CDLL(None)
libc.popen.restype = ctypes.c_void_p
assert libc.pclose(ctypes.c_void_p(libc.popen(b"/bin/true", b"r"))) == 0
check("popen")
"""
    )


def test_fork_child_and_threads_have_watched_descriptors(files: Files) -> None:
    files.run(
        PROGRAM
        + """
def exchange():
    # Each file under the number of the other one.
    global fd, other
    third = os.dup(fd)
    os.dup2(other, fd)
    os.dup2(third, other)
    os.close(third)
    fd, other = other, fd
    check("exchanged")
    os.close(fd)
    os.close(other)
    fd, other = os.open("other", os.O_RDWR), os.open(PATH, os.O_RDWR)
    fd, other = other, fd
    check("opened anew")

def in_a_child():
    for _ in range(5):      # blocks that the parent does not use after
        exchange()
in_child(in_a_child)
blocks = iter(range(21, 300, 4))
check("child")
for work in (exchange, lambda: in_child(exchange), lambda: subprocess.run(["/bin/true"])):
    thread = threading.Thread(target=work)
    failed = []
    threading.excepthook = failed.append
    thread.start()
    thread.join()
    assert not failed, failed
    if work is not exchange:
        next(blocks), next(blocks), next(blocks), next(blocks)
    check("thread")
"""
    )
