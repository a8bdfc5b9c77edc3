"""Start-up packets and the messages of a login (protocol.sgml, "Message Formats"), as bytes.

Names and values of start-up parameters stay bytes: their encoding is known to client and target
only, and they have to reach the target as they came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from zenith_utils.pq_framing import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    PROTOCOL_3_0,
    SSL_REQUEST,
    ProtocolError,
    cstring,
)

AUTHENTICATION_OK: Final = b"R\0\0\0\x08\0\0\0\0"
CLEARTEXT_PASSWORD_REQUEST: Final = b"R\0\0\0\x08\0\0\0\3"

_PROTOCOL_OPTION: Final = b"_pq_."


class SessionError(Exception):
    """The session is over; the client is told why in an ErrorResponse.

    `response` is that message if somebody else has made it: the error of the target, whole.
    """

    def __init__(self, message: str, sqlstate: str, *, response: bytes | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.response = response or error_response(message, sqlstate)


@dataclass(frozen=True, slots=True)
class Startup:
    """What a client asks for: StartupMessage."""

    parameters: Mapping[bytes, bytes]
    """Without the options of the protocol itself."""
    negotiation: bytes
    """NegotiateProtocolVersion, if the client asked for more than version 3.0 has; else empty."""

    def required(self, name: bytes, what: str) -> bytes:
        """A parameter that must be there. Raises SessionError, which calls it `what`."""
        value = self.parameters.get(name)
        if not value:
            raise SessionError(f"no {what} specified in startup packet", "28000")
        return value


def message(kind: bytes, payload: bytes) -> bytes:
    """A message: type, length, payload."""
    return kind + (len(payload) + 4).to_bytes(4, "big") + payload


def error_response(text: str, sqlstate: str) -> bytes:
    """ErrorResponse of severity FATAL."""
    # A NUL would end the field.
    shown = text.replace("\0", "?").encode("utf-8", "backslashreplace")
    fields = b"SFATAL\0VFATAL\0C" + sqlstate.encode() + b"\0M" + shown + b"\0\0"
    return message(b"E", fields)


def error_text(payload: bytes) -> tuple[str, str]:
    """Message and SQLSTATE of an ErrorResponse or NoticeResponse, for the log."""
    fields = {field[:1]: field[1:] for field in payload.split(b"\0") if field}
    text = fields.get(b"M", b"unknown error").decode("utf-8", "backslashreplace")
    return text, fields.get(b"C", b"XX000").decode("ascii", "replace")


def request_code(packet: bytes) -> int:
    """The number a start-up packet (without its length) begins with: version or request."""
    return int.from_bytes(packet[:4], "big")


def is_encryption_request(code: int) -> bool:
    """Whether a client asks to encrypt the connection before anything else."""
    return code in (SSL_REQUEST, GSSENC_REQUEST)


def parse_startup(packet: bytes) -> Startup:
    """StartupMessage, without its length. Raises ProtocolError, SessionError."""
    version = request_code(packet)
    if version >> 16 != PROTOCOL_3_0 >> 16:
        raise SessionError(
            f"unsupported frontend protocol {version >> 16}.{version & 0xFFFF}: "
            "the proxy supports 3.0",
            "0A000",
        )
    fields = packet[4:].split(b"\0")
    # "a\0b\0\0" splits into a, b and two empty strings.
    names, values, rest = fields[:-2:2], fields[1:-2:2], fields[-2:]
    if rest != [b"", b""] or len(names) != len(values) or not all(names):
        raise ProtocolError("invalid startup packet layout")
    unknown = [name for name in names if name.startswith(_PROTOCOL_OPTION)]
    parameters = {
        name: value for name, value in zip(names, values, strict=True) if name not in unknown
    }
    more = bool(version & 0xFFFF or unknown)
    return Startup(parameters, _negotiation(unknown) if more else b"")


def _negotiation(unknown: list[bytes]) -> bytes:
    """NegotiateProtocolVersion: the newest version there is here, and the options not understood.

    All of the version, 3.0, as SendNegotiateProtocolVersion (postmaster.c) sends it.
    """
    names = b"".join(name + b"\0" for name in unknown)
    version = PROTOCOL_3_0.to_bytes(4, "big")
    return message(b"v", version + len(unknown).to_bytes(4, "big") + names)


def startup_packet(parameters: Mapping[bytes, bytes]) -> bytes:
    """StartupMessage of version 3.0 with its length."""
    body = b"".join(name + b"\0" + value + b"\0" for name, value in parameters.items())
    packet = PROTOCOL_3_0.to_bytes(4, "big") + body + b"\0"
    return (len(packet) + 4).to_bytes(4, "big") + packet


def cancel_packet(key: bytes) -> bytes:
    """CancelRequest for the process and secret of a BackendKeyData."""
    packet = CANCEL_REQUEST.to_bytes(4, "big") + key
    return (len(packet) + 4).to_bytes(4, "big") + packet


def parse_password(payload: bytes) -> bytes:
    """The password of a PasswordMessage. Raises ProtocolError, SessionError."""
    if not payload or payload.find(b"\0") != len(payload) - 1:
        raise ProtocolError("invalid password packet size")
    if len(payload) == 1:
        raise SessionError("empty password returned by client", "28P01")
    return payload[:-1]


def parameter_name(payload: bytes) -> str:
    """Which setting a ParameterStatus is about."""
    return payload.partition(b"\0")[0].decode("utf-8", "replace")


def sasl_initial_response(mechanism: str, data: str) -> bytes:
    """SASLInitialResponse."""
    raw = data.encode()
    return message(b"p", cstring(mechanism) + len(raw).to_bytes(4, "big") + raw)
