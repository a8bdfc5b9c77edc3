"""Groups of commands whose modules are imported when one of them is run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


COMPLETE_VARIABLE = "_ZENITH_COMPLETE"
"""Through which a shell asks for completions."""


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command is defined, and its line in the list of commands."""

    module: str
    help_line: str


class LazyGroup(click.Group):
    """A group that knows the names and help lines of its commands without importing them.

    Start-up time is felt in scripts and in shell completion.
    """

    def __init__(self, name: str, lazy: dict[str, LazyCommand], **attributes: object) -> None:
        super().__init__(name, **attributes)  # type: ignore[arg-type]
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which they are of use."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself, imported now."""
        known = self.lazy.get(cmd_name)
        if known is None:
            return None
        module = importlib.import_module(f".{known.module}", __package__)
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in the base class, with the names of the table for "did you mean"."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as e:
            raise click.exceptions.NoSuchCommand(
                e.command_name, possibilities=self.lazy, ctx=ctx
            ) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, known.help_line) for name, known in self.lazy.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands, from the table; options as any command has them."""
        from click.shell_completion import CompletionItem

        items = [
            CompletionItem(name, help=known.help_line)
            for name, known in self.lazy.items()
            if name.startswith(incomplete)
        ]
        return items + click.Command.shell_complete(self, ctx, incomplete)
