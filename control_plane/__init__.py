"""The local environment: its configuration, its daemons and its computes on this machine."""
