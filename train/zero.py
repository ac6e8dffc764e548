"""The DeepSpeed configuration, derived from ours; DeepSpeed sees no data and no schedule."""

from typing import Any

from train.config import Config


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize`.

    The trainer decides when a step ends (`managed_gradient_accumulation` off), sets learning rates
    itself, and scales losses by the step's weight, so batch sizes here are formalities.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": config.parallel.precision == "bf16"},
        # In bf16 the sum over micro-steps would lose what each of them adds.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        }
        | config.parallel.zero,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
