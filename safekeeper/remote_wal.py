"""Complete WAL segments in object storage: stored once and verified, fetched and verified.

A segment is an object ``<tenant>/<timeline>/<segment file name>`` with the file's bytes. Beside
it lies ``….crc32c``, text: the CRC-32C of these bytes in hex, a blank, their number. It is written
last, after the object has been read back: a segment is stored when it is there. All safekeepers
of a timeline share the objects, as committed WAL is the same on all of them; the first one that
gets there stores a segment, the others find it. Bytes that differ are never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from urllib.parse import unquote, urlsplit

from postgres_ffi.wal_format import WAL_SEGMENT_SIZE, wal_file_name
from safekeeper.wal_files import WalMissingError, WalStorageError
from zenith_utils.crc32c import crc32c
from zenith_utils.durable import fsync_dir, fsync_file
from zenith_utils.ids import TenantTimelineId

if TYPE_CHECKING:
    from obstore.store import ObjectStore

CHECKSUM_SUFFIX: Final = ".crc32c"
SCHEMES: Final = ("file", "s3", "gs", "az")
TTL_BUCKET: Final = "zenith-testbucket"
TTL_PREFIX: Final = "walarchive"

_TLI: Final = 1
_CHUNK: Final = 1 << 20
_CHECKSUM_MAX: Final = 64
_CLIENT: Final[dict[str, Any]] = {"connect_timeout": "5s", "timeout": "60s", "allow_http": True}
# What fails is tried again by whoever needs it, with pauses of its own.
_RETRIES: Final[dict[str, Any]] = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}


class RemoteWalUrlError(Exception):
    """The place for WAL cannot be used; the message says why."""


class RemoteWalError(WalStorageError):
    """The object storage does not answer, or refuses; later it may do."""


class RemoteWalDamagedError(WalStorageError):
    """An object is not what its checksum says, or not the WAL that is here."""


class RemoteWal:
    """The segments of all timelines below one place of an object storage. For any thread."""

    def __init__(self, store: ObjectStore, shown: str, root: Path | None = None) -> None:
        """`shown` names the place in messages; `root` is its directory if it is a local one."""
        self._store = store
        self._shown = shown
        self._root = root
        self._device = None if root is None else root.stat().st_dev

    def __str__(self) -> str:
        return self._shown

    @classmethod
    def open(cls, url: str) -> RemoteWal:
        """The place a URL names: file:///directory, s3://bucket/prefix, gs://…, az://….

        Credentials are taken from the environment, as usual with each kind of storage. Nothing is
        contacted. Raises RemoteWalUrlError.
        """
        from obstore.exceptions import BaseError
        from obstore.store import LocalStore, from_url

        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or "://" not in url:
            raise RemoteWalUrlError(
                f"cannot keep WAL in {url!r}: expected a URL such as s3://bucket/prefix or "
                "file:///directory"
            )
        try:
            if parts.scheme == "file":
                root = Path(unquote(parts.path))
                # Not created: it may be the mount point of a disk that is not there.
                if parts.netloc or not root.is_dir():
                    raise RemoteWalUrlError(f"cannot keep WAL in {url}: no directory {root}")
                return cls(LocalStore(root), url, root)
            # Nothing else of the URL: it might hold a password.
            shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
            options: dict[str, Any] = {"client_options": _CLIENT, "retry_config": _RETRIES}
            return cls(from_url(url, **options), shown)
        except (BaseError, ValueError) as e:
            raise RemoteWalUrlError(f"cannot keep WAL in {url}: {_first_line(e)}") from e

    @classmethod
    def open_for_ttl(cls, environment: dict[str, str]) -> RemoteWal:
        """The bucket of the option --ttl, with the credentials ``S3_*``.

        Raises RemoteWalUrlError.
        """
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        config: dict[str, Any] = {}
        for key, name in (
            ("region", "S3_REGION"),
            ("endpoint", "S3_ENDPOINT"),
            ("access_key_id", "S3_ACCESSKEY"),
            ("secret_access_key", "S3_SECRET"),
        ):
            value = environment.get(name)
            if not value and key != "endpoint":
                raise RemoteWalUrlError(f"--ttl: the environment variable {name} is not set")
            if value:
                config[key] = value
        client: Any = _CLIENT
        retries: Any = _RETRIES
        try:
            store = S3Store(
                TTL_BUCKET,
                prefix=TTL_PREFIX,
                config=config,  # type: ignore[arg-type]
                client_options=client,
                retry_config=retries,
            )
        except (BaseError, ValueError) as e:
            raise RemoteWalUrlError(f"--ttl: {_first_line(e)}") from e
        return cls(store, f"s3://{TTL_BUCKET}/{TTL_PREFIX}")

    def key(self, timeline_id: TenantTimelineId, segno: int) -> str:
        """Name of a segment's object."""
        return f"{timeline_id.tenant_id}/{timeline_id.timeline_id}/{wal_file_name(_TLI, segno)}"

    def checksum(self, timeline_id: TenantTimelineId, segno: int) -> int | None:
        """CRC-32C of a stored segment, None if it is not stored.

        Raises RemoteWalError, RemoteWalDamagedError.
        """
        key = self.key(timeline_id, segno) + CHECKSUM_SUFFIX
        with self._errors("read", key):
            try:
                result = self._store.get(key)
            except FileNotFoundError:
                return None
            text = bytes(result.bytes()) if result.meta["size"] <= _CHECKSUM_MAX else b""
        try:
            crc, size = text.split()
            if int(size) == WAL_SEGMENT_SIZE:
                return int(crc, 16)
        except ValueError:
            pass
        raise RemoteWalDamagedError(
            f"{self}/{key} is no checksum of a WAL segment; remove it to have it written again"
        )

    def size(self, timeline_id: TenantTimelineId, segno: int) -> int | None:
        """Bytes of a segment's object, None if there is none. Raises RemoteWalError."""
        key = self.key(timeline_id, segno)
        with self._errors("look for", key):
            try:
                return self._store.head(key)["size"]
            except FileNotFoundError:
                return None

    def put(self, timeline_id: TenantTimelineId, segno: int, data: bytes, crc: int) -> None:
        """Store a segment whose CRC-32C is known; on return it is stored, and as durable as can be.

        A stop in the middle leaves it not stored. Raises RemoteWalError, RemoteWalDamagedError.
        """
        key = self.key(timeline_id, segno)
        with self._errors("write", key):
            self._store.put(key, data, use_multipart=False)
            self._sync(key)
        found = 0
        for chunk in self._read(key):
            found = crc32c(chunk, found)
        if found != crc:
            raise RemoteWalDamagedError(f"{self}/{key} differs from what was written")
        checksum = key + CHECKSUM_SUFFIX
        with self._errors("write", checksum):
            self._store.put(checksum, b"%08x %d\n" % (crc, len(data)), use_multipart=False)
            self._sync(checksum)

    def fetch(
        self,
        timeline_id: TenantTimelineId,
        segno: int,
        file: BinaryIO,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a stored segment to a file; `progress` is called again and again meanwhile.

        Raises WalMissingError (not stored), RemoteWalError, RemoteWalDamagedError, OSError.
        """
        expected = self.checksum(timeline_id, segno)
        key = self.key(timeline_id, segno)
        if expected is None:
            raise WalMissingError(f"WAL segment {wal_file_name(_TLI, segno)} is not in {self}")
        progress()
        found = size = 0
        for chunk in self._read(key):
            found = crc32c(chunk, found)
            size += len(chunk)
            file.write(chunk)
            progress()
        file.flush()
        if (found, size) != (expected, WAL_SEGMENT_SIZE):
            raise RemoteWalDamagedError(
                f"damaged WAL in {self}/{key}: {size} bytes with the checksum {found:08x}, "
                f"expected {WAL_SEGMENT_SIZE} with {expected:08x}; remove it and its "
                f"{CHECKSUM_SUFFIX} to have a safekeeper that has the segment store it again"
            )

    def _read(self, key: str) -> Iterator[bytes]:
        with self._errors("read", key):
            chunks = iter(self._store.get(key).stream(min_chunk_size=_CHUNK))
        while True:
            with self._errors("read", key):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield bytes(chunk)

    def _sync(self, key: str) -> None:
        """Make a local object durable; other storages have done so before they answer."""
        if self._root is not None:
            path = self._root / key
            fsync_file(path)
            while path != self._root:
                path = path.parent
                fsync_dir(path)

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            # The library would make the directory, on whatever disk its parent is, and an unmounted
            # disk must not look like one without WAL.
            if self._root is not None and self._root.stat().st_dev != self._device:
                raise OSError(f"{self._root} is on another disk than before")
            yield
        except (BaseError, OSError, ValueError) as e:
            raise RemoteWalError(f"cannot {verb} {self}/{key}: {_first_line(e)}") from e


def _first_line(error: Exception) -> str:
    """The message of an object storage's error, without the dump of its cause."""
    return str(error).split("\n", 1)[0]
