"""Settings that make ZeRO-3 treat a tiny model like a large one."""

FOUR_ZERO_SETTINGS = {
    # without these a tiny model is gathered once and never partitioned again
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
