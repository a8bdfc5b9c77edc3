"""Requests to the HTTP services of the local daemons.

With http.client: commands start sooner without a larger library, and no proxy of the user's
environment comes between processes of one machine.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any

from control_plane.errors import ControlPlaneError


class UnreachableError(ControlPlaneError):
    """Nobody answers, or not in HTTP."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP status, and the JSON document of the body (None without one)."""

    url: str
    status: int
    document: Any

    @property
    def ok(self) -> bool:
        """Whether the request was carried out."""
        return self.status < 300

    @property
    def error(self) -> str:
        """What an error answer says."""
        if isinstance(self.document, dict) and "msg" in self.document:
            return f"Error: {self.document['msg']}"
        return f"Error: Http error ({self.status}) at {self.url}."


def request(
    address: tuple[str, int],
    method: str,
    path: str,
    body: object = None,
    *,
    timeout: float,
    token: str = "",
) -> Answer:
    """Send a request, with `body` as JSON, and wait for the answer. Raises UnreachableError.

    `token` proves to the server who we are, if there is one.
    """
    host, port = address
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, body=text, headers=headers)
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as e:
        raise UnreachableError(f"cannot reach {url}: {str(e) or repr(e)}") from e
    finally:
        connection.close()
    try:
        document = json.loads(content) if content else None
    except ValueError:
        document = None
    return Answer(url, response.status, document)
