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
from train.modeling.adapters import add_adapter
from train.modeling.attention import choose_attention, decoding_attention
from train.modeling.build import build_model, pixel_normalizer
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
    attention = choose_attention(config.model.attention, device.type)
    model = build_stage_model(config, attention, zero=deepspeed_config(config))
    packed = PackedModel(model, pixel_normalizer(config.model.path))
    if config.parallel.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Blocks as units of gathering: fewer, larger gathers, and none repeated for the recompute.
        deepspeed.utils.set_z3_leaf_modules(model, BLOCKS)
    buffers = {name: buffer.clone() for name, buffer in packed.named_buffers()}
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim), betas=(optim.beta1, optim.beta2), foreach=False
    )
    engine, *_ = deepspeed.initialize(
        model=packed, optimizer=optimizer, config=deepspeed_config(config)
    )
    _restore_buffers(engine.module, buffers)
    return engine


def build_stage_model(
    config: Config, attention: dict[str, str], zero: dict[str, Any] | None
) -> Any:
    """Return the model with its adapter, frozen as the stage wants it.

    Args:
        config: of the stage.
        attention: implementation of `text_config` and `vision_config`.
        zero: the DeepSpeed configuration to partition the weights with while they are read; None
            builds a plain model.
    """
    section = config.model
    # transformers partitions at birth while such an object is alive. Random weights are drawn
    # unpartitioned, so that a seed gives the same model at any world size.
    alive = HfDeepSpeedConfig(zero) if zero and section.init == "pretrained" else None
    model = build_model(
        section.path,
        init=section.init,
        precision=config.parallel.precision,
        attention=attention,
        seed=config.run.seed,
    )
    del alive
    if section.adapter is None:
        freeze(model, config.stage)
        return model
    torch.manual_seed(config.run.seed)
    settings = section.adapter.model_dump()
    return add_adapter(model, stage=config.stage.number, **settings)


def plain_copy(config: Config, device: torch.device) -> Any:
    """Return an unhooked model of the stage's shape for decoding, its weights still random."""
    scratch = config.model.model_copy(update={"init": "scratch"})
    attention = decoding_attention(device.type, config.parallel.precision)
    config = config.model_copy(update={"model": scratch})
    return build_stage_model(config, attention, zero=None).to(device).eval()


def _restore_buffers(module: torch.nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Undo the cast of float32 buffers: rotary frequencies lose too much in bf16."""
    for name, buffer in buffers.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        current = getattr(owner, name.rpartition(".")[2])
        setattr(owner, name.rpartition(".")[2], buffer.to(current.device))
