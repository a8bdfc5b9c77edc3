"""Who a safekeeper is: the id it was given, and the instance of its data directory.

The id names a place in a configuration and may be given again to an empty directory. The instance
is random and comes with the directory: a configuration that pins it notices that a disk was lost,
and does not take the promises of a directory without memory for those of the one before it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zenith_utils.durable import write_file_durably

ID_FILE_NAME: Final = "safekeeper.id"
INSTANCE_FILE_NAME: Final = "safekeeper.instance"
INSTANCE_SIZE: Final = 16


class IdentityError(Exception):
    """The data directory cannot be used as that of this safekeeper; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A node id, which fits 64 bits, and an instance of INSTANCE_SIZE bytes."""

    id: int
    instance: bytes


def load_or_create(directory: Path, given_id: int | None) -> Identity:
    """The identity stored in a data directory; an empty one gets it now, durably.

    `given_id` is the id of an empty directory, and must be the one of any other. Raises
    IdentityError, OSError.
    """
    known_id = _read_id(directory)
    if known_id is None:
        if given_id is None:
            raise IdentityError("safekeeper id is not specified")
        if not 0 <= given_id < 1 << 64:
            raise IdentityError(f"safekeeper id {given_id} does not fit 64 bits")
    elif given_id not in (None, known_id):
        raise IdentityError(
            f"safekeeper already initialized with id {known_id}, can't set {given_id}"
        )
    # The instance is first: where an id stands there is one, unless the directory was made by a
    # version without instances. That one gets its instance now.
    instance = _read_instance(directory)
    if instance is None:
        instance = secrets.token_bytes(INSTANCE_SIZE)
        write_file_durably(directory / INSTANCE_FILE_NAME, instance.hex().encode())
    if known_id is None:
        assert given_id is not None
        write_file_durably(directory / ID_FILE_NAME, b"%d" % given_id)
        known_id = given_id
    return Identity(known_id, instance)


def _read_id(directory: Path) -> int | None:
    path = directory / ID_FILE_NAME
    try:
        text = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not text.isdecimal():
        raise IdentityError(f"{path} does not hold a number: {text!r}")
    return int(text)


def _read_instance(directory: Path) -> bytes | None:
    path = directory / INSTANCE_FILE_NAME
    try:
        text = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    try:
        instance = bytes.fromhex(text)
    except ValueError:
        instance = b""
    if len(instance) != INSTANCE_SIZE:
        raise IdentityError(
            f"{path} does not hold {2 * INSTANCE_SIZE} hexadecimal digits: {text!r}; write the "
            "instance there that the environment's config has for this safekeeper"
        )
    return instance
