RECORD_REASONS: dict[int, str]
