"""Help texts: each command says what it does and shows an example; typos are understood."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from batch_unit.cli_support import zenith
from click.testing import CliRunner
from zenith_cli import main as cli_main  # type: ignore[import-untyped]


def commands() -> Iterator[tuple[str, click.Command]]:
    """All commands by their full names, groups too."""
    top = cli_main.cli
    with click.Context(top) as ctx:
        todo = [(name, top.get_command(ctx, name)) for name in top.list_commands(ctx)]
    while todo:
        name, command = todo.pop()
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            todo += [(f"{name} {inner}", c) for inner, c in command.commands.items()]


ALL = sorted(name for name, _ in commands())


@pytest.mark.parametrize("name", ["", *ALL])
def test_help(name: str) -> None:
    result = CliRunner().invoke(cli_main.cli, [*name.split(), "--help"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("Usage: ")
    assert all(len(line) <= 100 for line in lines)
    assert lines[2].strip(), "says what it does"
    example = f"zenith {name}".strip()
    shown = [line for line in lines[2:] if example in line]
    assert shown, f"no example of {example}"


def test_options_say_what_they_are() -> None:
    for name, command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, f"{name} {option.opts}"


def test_the_list_of_commands_needs_no_import() -> None:
    """What `zenith --help` and `zenith pg --help` take to start is kept small."""
    heavy = "('rich', 'psycopg2', 'http.client', 'pageserver', 'aiohttp', 'compute_tools.datadir')"
    for arguments, imported in (("--help",), False), (("pg", "--help"), True):
        code = (
            "import sys\n"
            f"sys.argv = ['zenith', *{arguments!r}]\n"
            "from zenith_cli.main import main\n"
            "assert main() == 0\n"
            f"heavy = [m for m in {heavy} if m in sys.modules]\n"
            f"assert not set(heavy) - {{'http.client'}} if {imported} else not heavy, heavy\n"
        )
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        (["strat"], "'start'"),
        (["timelime"], "Did you mean 'timeline'?"),
        (["pg", "lst"], "list"),
        (["stop", "--stop-mod", "fast"], "--stop-mode"),
    ],
)
def test_did_you_mean(typo: list[str], meant: str) -> None:
    done = subprocess.run(zenith(*typo), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert meant in done.stderr
