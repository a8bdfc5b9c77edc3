"""PostgreSQL's on-disk and WAL formats, per major version, and finding its installation."""
