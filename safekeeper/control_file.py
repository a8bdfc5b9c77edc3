"""The control file: an acceptor's durable state, replaced atomically.

Layout, little-endian: u32 magic, u32 version, body, u32 CRC-32C of everything before it. Lengths
and counts in the body are u64; ids are 32 hex characters with their length in front. Version 4,
which is still read, ends before the generation.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any, Final

from safekeeper.consensus import ControlState, PeerInfo, ServerInfo
from zenith_utils.crc32c import crc32c
from zenith_utils.durable import fsync_dir, fsync_file, write_all
from zenith_utils.ids import TenantId, TimelineId
from zenith_utils.safekeeper_messages import TermLsn, check_history

CONTROL_FILE_NAME: Final = "safekeeper.control"
MAGIC: Final = 0xCAFECEEF
VERSION: Final = 5
_OLDEST_VERSION: Final = 4

_HEADER = struct.Struct("<II")
_CRC = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_TERM_LSN = struct.Struct("<QQ")
_SERVER = struct.Struct("<IQI")
_LSNS = struct.Struct("<QQQQ")
_PEER = struct.Struct("<QQQQQ")
_MEMBERSHIP = struct.Struct("<QQB")
_ID_LENGTH: Final = 32


class ControlFileError(Exception):
    """The control file is damaged, of an unknown version, or another timeline's."""


class ControlFileDamagedError(ControlFileError):
    """The control file is not what was written."""


def encode(state: ControlState) -> bytes:
    """The whole file."""
    parts = [
        _HEADER.pack(MAGIC, VERSION),
        _hex_id(state.tenant_id.raw),
        _hex_id(state.timeline_id.raw),
        _U64.pack(state.term),
        _U64.pack(len(state.term_history)),
        *(_TERM_LSN.pack(*entry) for entry in state.term_history),
        _SERVER.pack(state.server.pg_version, state.server.system_id, state.server.wal_seg_size),
        _hex_id(state.proposer_uuid),
        _LSNS.pack(
            state.commit_lsn,
            state.s3_wal_lsn,
            state.peer_horizon_lsn,
            state.remote_consistent_lsn,
        ),
        _U64.pack(len(state.peers)),
    ]
    for node, peer in state.peers:
        parts.append(_PEER.pack(node, peer.s3_wal_lsn, peer.term, peer.flush_lsn, peer.commit_lsn))
    parts.append(_MEMBERSHIP.pack(state.generation, state.established, state.recovering))
    content = b"".join(parts)
    return content + _CRC.pack(crc32c(content))


def decode(data: bytes) -> ControlState:
    """Decode and verify a whole file. Raises ControlFileError."""
    if len(data) < _HEADER.size + _CRC.size:
        raise ControlFileDamagedError(f"safekeeper control file has only {len(data)} bytes")
    content = data[: -_CRC.size]
    (stored,) = _CRC.unpack_from(data, len(content))
    computed = crc32c(content)
    if stored != computed:
        raise ControlFileDamagedError(
            f"safekeeper control file checksum mismatch: expected {computed} got {stored}"
        )
    magic, version = _HEADER.unpack_from(content)
    if magic != MAGIC:
        raise ControlFileDamagedError(f"bad control file magic: {magic:#X}, expected {MAGIC:#X}")
    if not _OLDEST_VERSION <= version <= VERSION:
        raise ControlFileError(
            f"unsupported safekeeper control file version {version}, "
            f"this program reads versions {_OLDEST_VERSION} to {VERSION}"
        )
    try:
        return _decode_body(content, version)
    except (struct.error, ValueError) as e:
        raise ControlFileDamagedError(f"malformed safekeeper control file: {e}") from e


def load(path: Path, *, sync: bool = False) -> ControlState:
    """Read the file. Raises ControlFileError, or OSError (FileNotFoundError: no such timeline).

    With `sync` it is made durable first: a process that died between renaming and fsync left it
    in the page cache only, and what it says must not be forgotten once it has been acted upon.
    """
    if sync:
        fsync_file(path)
        fsync_dir(path.parent)
    try:
        data = path.read_bytes()
    except OSError as e:
        if e.errno == errno.EIO:
            raise ControlFileDamagedError(f"cannot read {path}: {e.strerror}") from e
        raise
    try:
        return decode(data)
    except ControlFileError as e:
        raise type(e)(f"{e} ({path})") from e


def store(directory: Path, state: ControlState, *, sync: bool) -> None:
    """Replace the control file in `directory`: temporary file, fsync, rename, fsync directory."""
    partial = directory / f"{CONTROL_FILE_NAME}.partial"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, encode(state))
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    partial.rename(directory / CONTROL_FILE_NAME)
    if sync:
        fsync_dir(directory)


def to_json(state: ControlState) -> dict[str, Any]:
    """The state as a JSON object: hex ids, LSNs as plain integers."""
    return {
        "tenant_id": str(state.tenant_id),
        "timeline_id": str(state.timeline_id),
        "acceptor_state": {
            "term": state.term,
            "term_history": [{"term": e.term, "lsn": e.lsn} for e in state.term_history],
        },
        "server": {
            "pg_version": state.server.pg_version,
            "system_id": state.server.system_id,
            "wal_seg_size": state.server.wal_seg_size,
        },
        "proposer_uuid": state.proposer_uuid.hex(),
        "commit_lsn": state.commit_lsn,
        "s3_wal_lsn": state.s3_wal_lsn,
        "peer_horizon_lsn": state.peer_horizon_lsn,
        "remote_consistent_lsn": state.remote_consistent_lsn,
        "peers": [
            [
                node,
                {
                    "s3_wal_lsn": peer.s3_wal_lsn,
                    "term": peer.term,
                    "flush_lsn": peer.flush_lsn,
                    "commit_lsn": peer.commit_lsn,
                },
            ]
            for node, peer in state.peers
        ],
        "generation": state.generation,
        "established": state.established,
        "recovering": state.recovering,
    }


class _Cursor:
    """Reads the body front to back; struct.error or ValueError when it ends too early."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position

    def take(self, codec: struct.Struct) -> tuple[int, ...]:
        values = codec.unpack_from(self._data, self._position)
        self._position += codec.size
        return values

    def take_many(self, codec: struct.Struct) -> list[tuple[int, ...]]:
        (count,) = self.take(_U64)
        if count * codec.size > len(self._data) - self._position:
            raise ValueError(f"{count} entries do not fit the file")
        return [self.take(codec) for _ in range(count)]

    def take_id(self) -> bytes:
        (length,) = self.take(_U64)
        text = self._data[self._position : self._position + _ID_LENGTH]
        if length != _ID_LENGTH or len(text) != _ID_LENGTH:
            raise ValueError(f"an id of {length} characters")
        self._position += _ID_LENGTH
        return bytes.fromhex(text.decode("ascii"))

    def finish(self) -> None:
        if self._position != len(self._data):
            raise ValueError(f"{len(self._data) - self._position} bytes too many")


def _decode_body(content: bytes, version: int) -> ControlState:
    cursor = _Cursor(content, _HEADER.size)
    tenant_id, timeline_id = TenantId(cursor.take_id()), TimelineId(cursor.take_id())
    (term,) = cursor.take(_U64)
    history = tuple(TermLsn(*entry) for entry in cursor.take_many(_TERM_LSN))
    check_history(history)
    server = ServerInfo(*cursor.take(_SERVER))
    proposer_uuid = cursor.take_id()
    commit_lsn, s3_wal_lsn, peer_horizon_lsn, remote_consistent_lsn = cursor.take(_LSNS)
    peers = tuple((peer[0], PeerInfo(*peer[1:])) for peer in cursor.take_many(_PEER))
    generation = established = recovering = 0
    if version >= 5:
        generation, established, recovering = cursor.take(_MEMBERSHIP)
        if recovering > 1:
            raise ValueError(f"recovering is {recovering}, neither 0 nor 1")
    cursor.finish()
    return ControlState(
        tenant_id,
        timeline_id,
        term,
        history,
        server,
        proposer_uuid,
        commit_lsn,
        s3_wal_lsn,
        peer_horizon_lsn,
        remote_consistent_lsn,
        peers,
        generation,
        established,
        bool(recovering),
    )


def _hex_id(raw: bytes) -> bytes:
    return _U64.pack(_ID_LENGTH) + raw.hex().encode("ascii")
