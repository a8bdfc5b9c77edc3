"""The tests of docs/testing.md: what newcomers copy from there works as it stands."""

from __future__ import annotations

import re
import types
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[types.ModuleType]:
    """The blocks of Python, each a module; their lines are those of the page."""
    text = PAGE.read_text()
    modules = []
    for match in _BLOCK.finditer(text):
        module = types.ModuleType(f"{PAGE.name}:{text.count(chr(10), 0, match.start()) + 1}")
        above = "\n" * (text.count("\n", 0, match.start()) + 1)
        exec(compile(above + match[1], PAGE, "exec"), module.__dict__)
        modules.append(module)
    return modules


for block in blocks():
    found = {name: item for name, item in vars(block).items() if name.startswith("test_")}
    assert found, f"{block.__name__} has no test"
    assert not found.keys() & globals().keys(), f"{block.__name__} has a test of another's name"
    globals().update(found)
