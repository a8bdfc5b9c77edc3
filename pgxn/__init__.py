"""C modules for a stock Postgres, and the code that builds them."""
