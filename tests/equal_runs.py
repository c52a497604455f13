"""What equal runs may differ in."""

# Keys of log.txt.
TIMING_KEYS = ("images_per_second", "data_wait_share", "epoch_seconds", "peak_memory_mib", "mfu")
