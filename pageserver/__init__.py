"""The pageserver: turns WAL into page versions and serves pages, base backups and branches."""
