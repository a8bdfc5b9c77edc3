"""The safekeeper: keeps a timeline's WAL durable as one of a quorum, and streams it on."""
