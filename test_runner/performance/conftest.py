"""Options of the tests in this folder."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--scale."""
    parser.addoption(
        "--scale",
        type=float,
        default=1.0,
        help="Share of the full sizes that the slow tests of test_scale.py go to.",
    )
