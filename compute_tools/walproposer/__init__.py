"""The proposer: pushes a compute's WAL to a quorum of safekeepers and acknowledges its commits."""
