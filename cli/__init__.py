"""The `zenith` command."""
