"""Plugins of the test framework."""

pytest_plugins = (
    "fixtures.zenith_fixtures",
    "fixtures.benchmark_fixture",
    "fixtures.proposer_postgres",
    "fixtures.compare_fixtures",
    "fixtures.slow",
)
