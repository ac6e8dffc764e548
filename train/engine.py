"""The process group and the DeepSpeed engine of a stage."""

import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from train.config import Config
from train.initial_load import load_model
from train.modeling.adapters import add_adapter
from train.modeling.attention import choose_attention, decoding_attention
from train.modeling.build import build_empty_model, build_random_model, pixel_normalizer
from train.modeling.packed import PackedModel
from train.ranks import Ranks
from train.stages import freeze, parameter_groups
from train.zero import deepspeed_config

BLOCKS = [qwen.Qwen2_5_VLDecoderLayer, qwen.Qwen2_5_VLVisionBlock]


def start_distributed(config: Config, ranks: Ranks) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.utils.logger.setLevel("WARNING")
    accelerator = get_accelerator()
    is_cpu = accelerator.device_name() == "cpu"
    if is_cpu:
        # A C++ op that would be compiled at the first start; training gains nothing from it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(ranks.local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="gloo" if is_cpu else None,
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=config.parallel.timeout_s),
        )
    return torch.device("cpu" if is_cpu else accelerator.current_device_name())


def build_engine(config: Config, device: torch.device) -> Any:
    """Build the stage's model and wrap it: `engine.module.model` is the Hugging Face model."""
    model = build_stage_model(config, device, zero=deepspeed_config(config))
    packed = PackedModel(model, pixel_normalizer(config.model.path))
    if config.parallel.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Blocks as units of gathering: fewer, larger gathers, and none repeated for the recompute.
        deepspeed.utils.set_z3_leaf_modules(model, BLOCKS)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim), betas=(optim.beta1, optim.beta2), foreach=False
    )
    engine, *_ = deepspeed.initialize(
        model=packed, optimizer=optimizer, config=deepspeed_config(config)
    )
    engine.train()  # in evaluation mode there is no recompute, no dropout
    return engine


def build_stage_model(
    config: Config, device: torch.device, zero: dict[str, Any] | None = None
) -> Any:
    """Return the model with its adapter, frozen as the stage wants it.

    Args:
        config: of the stage.
        device: decides which attention runs.
        zero: the DeepSpeed configuration to partition the weights with while they are read; None
            builds a plain model.
    """
    section, precision = config.model, config.parallel.precision
    attention = choose_attention(section.attention, device.type, precision)
    if section.init == "scratch":
        # Drawn unpartitioned, so that a seed gives the same model at any world size.
        model = build_random_model(
            section.path, precision=precision, attention=attention, seed=config.run.seed
        )
    else:
        # transformers partitions at birth while such an object is alive.
        alive = HfDeepSpeedConfig(zero) if zero else None
        model = load_model(section.path, precision=precision, attention=attention)
        del alive
    return prepare_parameters(model, config)


def prepare_parameters(model: Any, config: Config) -> Any:
    """Add the stage's adapter to a model, or freeze what the stage does not train."""
    if config.model.adapter is None:
        freeze(model, config.stage)
        return model
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        settings = config.model.adapter.model_dump()
        return add_adapter(model, stage=config.stage.number, **settings)


def plain_copy(config: Config, device: torch.device) -> Any:
    """Return an unhooked model of the stage's shape for decoding, its weights still unset."""
    precision = config.parallel.precision
    attention = decoding_attention(config.model.attention, device.type, precision)
    model = build_empty_model(
        config.model.path, precision=precision, attention=attention, device=device
    )
    return prepare_parameters(model, config).to(device).eval()
