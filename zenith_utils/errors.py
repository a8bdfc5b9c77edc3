"""Rendering of an exception together with its causes, for people."""

from __future__ import annotations


def error_chain(error: BaseException) -> list[str]:
    """Messages from the outermost error down its causes (``raise ... from ...``).

    A cause that the message above it already contains is left out.
    """
    messages: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if not messages or _detail(current) not in messages[-1]:
            messages.append(error_message(current))
        current = current.__cause__
    return messages


def error_message(error: BaseException) -> str:
    """The message of one error; its type where that alone says what is wrong."""
    text = str(error)
    if isinstance(error, KeyError | AssertionError) or not text:
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def _detail(error: BaseException) -> str:
    """What an error says, of those of the operating system without number and file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return error_message(error)


def render_error(error: BaseException, prefix: str = "Error: ") -> str:
    """The message and, below ``Caused by:``, the numbered causes; no newline at the end."""
    outermost, *causes = error_chain(error)
    text = f"{prefix}{outermost}"
    if causes:
        lines = [f"    {number}: {_indented(cause)}" for number, cause in enumerate(causes)]
        text += "\n\nCaused by:\n" + "\n".join(lines)
    return text


def _indented(text: str) -> str:
    return text.replace("\n", "\n       ")
