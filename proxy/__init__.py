"""The proxy: Postgres clients log in through it, and go on to the server behind it."""
