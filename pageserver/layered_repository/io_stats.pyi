from zenith_utils.histogram import HistogramCell

class IoStats:
    def __init__(
        self,
        open_time: HistogramCell,
        read_time: HistogramCell,
        write_time: HistogramCell,
        fsync_time: HistogramCell,
    ) -> None: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
