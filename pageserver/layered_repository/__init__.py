"""The value store: values by key and LSN, in memory and in layer files. It knows no Postgres."""
