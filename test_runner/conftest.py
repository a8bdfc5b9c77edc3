"""Plugins of the test framework."""

pytest_plugins = (
    "fixtures.session",
    "fixtures.zenith_fixtures",
    "fixtures.benchmark_fixture",
    "fixtures.compare_fixtures",
    "fixtures.proposer_postgres",
    "fixtures.slow",
)
