"""Typed access to the values of a TOML table, with errors that name the option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zenith_utils.duration import DurationError, parse_duration

_MAX_INTEGER = (1 << 63) - 1


class ConfigError(Exception):
    """The configuration is wrong; the message names the key, ``__cause__`` may say more."""


class ConfigTable:
    """A TOML table; remembers which keys were asked for. Getters raise ConfigError."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._known: set[str] = set()

    def _get(self, key: str) -> Any:
        self._known.add(key)
        return self._values.get(key)

    def string(self, key: str, default: str | None = None) -> str | None:
        """A text, ``default`` if the key is absent."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ConfigError(f"configure option {self._prefix}{key} is not a string")
        return value

    def required_string(self, key: str, default: str) -> str:
        """A text that is not empty."""
        return self.string(key) or default

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of a few texts."""
        value = self.string(key)
        if value is None:
            return default
        if value not in allowed:
            raise ConfigError(f"invalid {self._prefix}{key} '{value}', expected one of {allowed}")
        return value

    def integer(self, key: str, default: int, *, minimum: int = 0) -> int:
        """A number from ``minimum`` (at least 0) on."""
        value = self._get(key)
        if value is None:
            return default
        name = f"{self._prefix}{key}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"configure option {name} is not an integer")
        if value < 0:
            raise ConfigError(f"configure option {name} cannot be negative")
        if value < minimum:
            raise ConfigError(f"configure option {name} must be at least {minimum}")
        if value > _MAX_INTEGER:
            raise ConfigError(f"configure option {name} must be at most {_MAX_INTEGER}")
        return value

    def duration(self, key: str, default: float) -> float:
        """Seconds, given as a text such as ``10 s``."""
        text = self.string(key)
        if text is None:
            return default
        try:
            return parse_duration(text)
        except DurationError as error:
            raise ConfigError(f"configure option {self._prefix}{key}") from error

    def strings(self, key: str) -> tuple[str, ...]:
        """An array of texts, empty if the key is absent."""
        value = self._get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"configure option {self._prefix}{key} is not an array of strings")
        return tuple(value)

    def table(self, key: str) -> ConfigTable | None:
        """A table within the table."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"configure option {self._prefix}{key} is not a table")
        return ConfigTable(value, f"{self._prefix}{key}.")

    def refuse_unknown(self, kind: str = "pageserver") -> None:
        """Raises ConfigError if there is a key that was never asked for."""
        for key in self._values:
            if key not in self._known:
                raise ConfigError(f"unrecognized {kind} option '{self._prefix}{key}'")
