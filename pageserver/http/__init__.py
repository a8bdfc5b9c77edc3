"""The HTTP management API of the pageserver."""
