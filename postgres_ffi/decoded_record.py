"""A WAL record as Python sees it; the hot path works on the structs of `wal_decoder.pxd`."""

from dataclasses import dataclass

from .relfile import RelTag
from .wal_format import XLR_RMGR_INFO_MASK


@dataclass(frozen=True, slots=True)
class DecodedBlock:
    """A block reference. `image` is the full-page image as logged (hole left out), `data` the
    resource manager's bytes for this block (b"" if none)."""

    id: int
    rel: RelTag
    blkno: int
    will_init: bool
    apply_image: bool
    compressed: bool
    bimg_info: int
    hole_offset: int
    hole_length: int
    image: bytes | None
    data: bytes


@dataclass(frozen=True, slots=True)
class DecodedRecord:
    """`end_lsn` is rounded up to 8; `raw` is the whole record without page headers."""

    start_lsn: int
    end_lsn: int
    prev: int
    xid: int
    toplevel_xid: int
    rmid: int
    info: int
    origin: int
    blocks: tuple[DecodedBlock, ...]
    main_data: bytes
    raw: bytes

    @property
    def rmgr_info(self) -> int:
        """The bits of `info` that the resource manager defines."""
        return self.info & XLR_RMGR_INFO_MASK
