"""Transaction status and multixacts of a stopped compute against those in storage."""

from __future__ import annotations

import contextlib
import io
import tarfile
import uuid
from pathlib import Path

from fixtures.zenith_env import ZenithEnv

SLRU_DIRECTORIES = ("pg_xact", "pg_multixact/offsets", "pg_multixact/members")


def compare_slrus(env: ZenithEnv, pgdata: Path, timeline: uuid.UUID, lsn: str) -> int:
    """Compare the SLRU files of a cleanly stopped compute with a base backup at its last LSN.

    Returns the number of bytes compared; fails on the first file that differs.
    """
    served = _served_slrus(env, timeline, lsn)
    local = {
        f"{directory}/{path.name}": path.read_bytes()
        for directory in SLRU_DIRECTORIES
        for path in (pgdata / directory).iterdir()
    }
    assert sorted(served) == sorted(local)
    for name, content in local.items():
        theirs = served[name]
        pairs = enumerate(zip(content, theirs, strict=False))
        offsets = [i for i, (ours, other) in pairs if ours != other]
        assert content == theirs, (
            f"{name}: {len(content)} bytes, pageserver {len(theirs)}; "
            f"{len(offsets)} differ, first at {offsets[:8]}"
        )
    return sum(map(len, local.values()))


def _served_slrus(env: ZenithEnv, timeline: uuid.UUID, lsn: str) -> dict[str, bytes]:
    archive = io.BytesIO()
    query = f"basebackup {env.initial_tenant.hex} {timeline.hex} {lsn}"
    with contextlib.closing(env.pageserver.connect(autocommit=True)) as conn, conn.cursor() as cur:
        cur.copy_expert(query, archive)
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        return {
            member.name: _content(tar, member)
            for member in tar.getmembers()
            if member.isfile() and member.name.rpartition("/")[0] in SLRU_DIRECTORIES
        }


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
