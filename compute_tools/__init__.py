"""The compute side: a stock Postgres started on a timeline's state at an LSN, and supervised."""
