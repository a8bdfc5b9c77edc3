from safekeeper.consensus import Session
from safekeeper.timeline import Timeline
from zenith_utils.postgres_connection import Connection

class PushStream:
    def __init__(self, conn: Connection, session: Session, timeline: Timeline) -> None: ...
    def next_message(self) -> bytes | None: ...
