"""train(config): set up, the loop, tear down; to be read from top to bottom."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_tools.errors import (
    EXIT_AGAIN,
    EXIT_DONE,
    CheckpointError,
    LaunchError,
    LecternError,
)
from data_tools.stream.executor import Executor, StepBatches
from data_tools.stream.faults import HoleCounter
from data_tools.stream.hashing import hash_key
from data_tools.stream.planner import DataState
from train.checkpoint import (
    CheckpointSaver,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
)
from train.checkpoint.settings import base_identity, save_settings
from train.collectives import gather_json, on_main
from train.config import Config, write_config
from train.data import DataPath, describe, open_data, prepare
from train.engine import build_engine, start_distributed
from train.evaluate import Evaluator
from train.modeling.packed import layout_of
from train.monitor import Monitor, start_logging
from train.presence import Presence, appear
from train.ranks import Ranks
from train.shards import Shards
from train.signals import StopSignal
from train.stages import CollapseGuard, EarlyStopping, estimate_steps, lr_factor
from train.statistics import StepStatistics, gradient_norms
from train.status import read_status

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 5  # steps in a row without a finite gradient


def train(config: Config, shards: Shards, ranks: Ranks, stop: StopSignal) -> int:
    """Train a stage from where it stands; return the exit code.

    Raises:
        LecternError: for what the user must change, on every rank alike.
    """
    start_logging(ranks.rank)
    if read_status(config.folder).get("state") == "done":
        if ranks.is_main:
            logger.info(
                "%s is done; `python -m train.export %s` makes its folder, a fresh run.dir trains "
                "again",
                config.folder,
                config.folder,
            )
        return EXIT_DONE
    device = start_distributed(config, ranks)
    presence = appear(config, ranks, stop)
    checkpoint = newest_checkpoint(config.folder / "checkpoints")
    presence.heart.phase("preparing the data")
    data = prepare_data(config, shards, ranks, checkpoint)
    presence.heart.phase("loading the model")
    trainer = Trainer(config, data, build_engine(config, device), ranks, device, presence)
    trainer.resume(checkpoint)
    try:
        code = trainer.run()
    except BaseException as error:
        with contextlib.suppress(LaunchError):  # another start has taken over: nothing is written
            trainer.monitor.status(state="failed", error=str(error) or type(error).__name__)
        raise
    finally:
        trainer.monitor.close()
    presence.heart.close()
    dist.destroy_process_group()
    return code


def prepare_data(config: Config, shards: Shards, ranks: Ranks, checkpoint: Path | None) -> DataPath:
    """Prepare the data on rank 0 while the others wait, then open it everywhere."""

    def prepare_once() -> None:
        config.folder.mkdir(parents=True, exist_ok=True)
        saved = None
        if checkpoint is not None:
            saved = DataState.from_json(read_manifest(checkpoint).state["data"])
        prepare(config, shards, saved)

    on_main(prepare_once)
    data = open_data(config)
    if ranks.is_main:
        for line in describe(data, ranks.world_size):
            logger.info(line)
    return data


@dataclass(frozen=True)
class _Agreement:
    """What all ranks must know before a step: its total weight, and whether to stop."""

    weight_sum: float
    must_stop: bool


class Trainer:
    """One stage in motion."""

    def __init__(
        self,
        config: Config,
        data: DataPath,
        engine: Any,
        ranks: Ranks,
        device: torch.device,
        presence: Presence,
    ) -> None:
        self.config, self.data, self.engine = config, data, engine
        self.ranks, self.device = ranks, device
        self.presence, self.heart = presence, presence.heart
        self.layout = layout_of(engine.module.model.config)
        self.total_steps = estimate_steps(config, data.num_samples, data.samples_per_pack())
        self.step = 0
        self.state: DataState = data.first_state()
        self.stopping = EarlyStopping(config.stage.early_stopping)
        self.guard = CollapseGuard(config.stage.collapse, config.optim.lr)
        self.evaluator = Evaluator(config, data, self.layout, ranks, device)
        self.holes = HoleCounter(config.data.max_hole_share)
        self.executor: Executor = None  # type: ignore[assignment] # made by run()
        self.statistics = StepStatistics(ranks, device)
        self.monitor: Monitor = None  # type: ignore[assignment] # made by resume()
        # For dropout in adapters, the only draw that training makes by itself.
        torch.manual_seed(hash_key(config.run.seed, "dropout", ranks.rank) >> 1)
        self._num_bad_steps = 0
        self._saved_step = self._evaluated_step = -1
        self._owes_evaluation = False  # given up for a signal
        self._base = base_identity(config)
        self.saver = CheckpointSaver(
            engine,
            config.folder / "checkpoints",
            save_settings(config),
            base=self._base,
            extra={"config": config.model_dump(mode="json")},
            check_owner=presence.check_owner,
        )

    def resume(self, checkpoint: Path | None) -> None:
        """Take up a checkpoint, if there is one."""
        if checkpoint is not None:
            self.heart.phase("loading the checkpoint")
            wanted = [dict(group) for group in self.engine.optimizer.param_groups]
            state = load_checkpoint(self.engine, checkpoint, base=self._base, is_checked=True)
            self._check_adapter(state)
            self._apply_optim(wanted)
            self.step = self._saved_step = state["step"]
            saved = DataState.from_json(state["data"])
            self.state = self.data.plan.check(saved, self.data.sources)
            self.stopping.restore(state["stopping"])
            self.guard.restore(state["guard"])
            self._owes_evaluation = state.get("owes_evaluation", False)
            if self.ranks.is_main:
                logger.info("resumed at step %d from %s", self.step, checkpoint)
        if self.ranks.is_main:
            write_config(self.config, self.config.folder / "config.yaml")
            self.data.plan.write(self.config.folder)
        self.monitor = Monitor(
            self.config.folder,
            is_main=self.ranks.is_main,
            start_step=self.step,
            total_steps=self.total_steps,
            check_owner=self.presence.check_owner,
        )
        self.monitor.status(best_step=self.stopping.best_step)

    def run(self) -> int:
        """Train to the end of the stage, or to a signal; return the exit code."""
        pin = self.device.type != "cpu"
        self.executor = self.data.executor(self.state, self.layout, self.ranks, pin)
        self.presence.stop.defer()
        if self._owes_evaluation:
            self._evaluate()
        with contextlib.closing(self.executor.steps()) as steps:
            return self._run(steps)

    def _run(self, steps: Iterator[StepBatches]) -> int:
        max_steps = self.config.stage.max_steps or math.inf
        while self.step < max_steps and not self.stopping.is_over:
            self.heart.begin_step()
            with self.statistics.waiting():
                step = next(steps, None)
            if step is None:
                break
            self.heart.phase("agreeing on the step")
            agreement = self._agree(step)
            if agreement.must_stop:
                return self._stop_for_signal()
            if self.guard.is_due(self.step):
                self.heart.phase("evaluating")
                with self.statistics.aside():
                    self.guard.update(self.step, self.evaluator.loss(self.engine))
            self._train_step(step, agreement.weight_sum)
            self.step, self.state = self.step + 1, step.state
            self._report(step)
            self.heart.end_step(self.step)
            with self.statistics.aside():
                self._evaluate_and_save()
        return self._finish()

    def _train_step(self, step: StepBatches, weight_sum: float) -> None:
        """Forward and backward of every micro-step, then the optimizer.

        The loss is divided by the weights of the whole step on all ranks, so it does not depend on
        world size, accumulation or packing. DeepSpeed averages over ranks, hence `world_size`.
        """
        factor = lr_factor(self.step, self.total_steps, self.config.optim)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.heart.phase("forward and backward")
        for batch in step.batches:
            output = self.engine(batch.to(self.device))
            loss = output.weighted_sum * (self.ranks.world_size / weight_sum)
            self.engine.backward(loss, scale_wrt_gas=False)
            self.statistics.add(batch, output)
        if self._is_log_step(self.step + 1):
            self.statistics.norms = gradient_norms(self.engine)
        self.heart.phase("optimizer step")
        self.engine.step()
        self._check_finite()

    def _agree(self, step: StepBatches) -> _Agreement:
        """Compare the plan over the ranks, add up the weights, and hear who was signalled."""
        plan = step.step.plan_hash
        signalled = int(self.presence.stop.has_come())
        numbers = torch.tensor([plan, -plan, signalled], dtype=torch.int64, device=self.device)
        weights = torch.tensor(
            sum(batch.weight_sum for batch in step.batches),
            dtype=torch.float64,
            device=self.device,
        )
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        dist.all_reduce(weights)
        high, low, must_stop = numbers.tolist()
        if high != -low:
            raise LaunchError(
                f"step {self.step}: the ranks plan different samples; the shards or the code are "
                "not the same on all nodes"
            )
        return _Agreement(max(float(weights), 1.0), bool(must_stop))

    def _is_log_step(self, step: int) -> bool:
        return step == 1 or step % self.config.monitor.log_every == 0

    def _report(self, step: StepBatches) -> None:
        """Tell what the step was made of, and every few steps how it went."""
        holes = [hole for batch in step.batches for hole in batch.holes]
        holes = [hole for part in gather_json(holes) for hole in part]
        self.monitor.step(self.step, step.step, holes)
        self.holes.add(sum(len(pack) for pack in step.step.packs), holes)
        if not self._is_log_step(self.step):
            return
        values = self.statistics.collect(self.engine)
        values["train/epoch"] = self.data.epoch(self.state)
        values |= self._data_counts()
        line = self.statistics.line(self.step, self.total_steps, values)
        self.monitor.scalars(self.step, values, line)
        self.monitor.status(
            step=self.step,
            epoch=round(values["train/epoch"], 3),
            loss=round(values["train/loss"], 4),
            tokens_per_s=round(values["speed/tokens_per_s"]),
        )

    def _data_counts(self) -> dict[str, float]:
        """Return what went wrong with the data since the start, over all ranks."""
        counters = gather_json(self.executor.counters)
        values = {f"data/holes_{kind}": float(n) for kind, n in self.holes.by_kind.items()}
        values["data/holes"] = float(self.holes.num_holes)
        for name in ("retries", "workers_replaced"):
            values[f"data/{name}"] = float(sum(part.get(name, 0) for part in counters))
        return values

    def _evaluate_and_save(self) -> None:
        """Do what is due after a step; the checkpoint comes last, so that it knows the rest."""
        is_best = False
        if self.step % self.config.evaluation.every_steps == 0:
            is_best = self._evaluate()
        if is_best or self.step % self.config.checkpoint.every_steps == 0:
            self._save()

    def _evaluate(self) -> bool:
        """Evaluate; return whether this is the best step so far under early stopping.

        A signal gives it up; the next start makes up for it before its first step.
        """
        self.heart.phase("evaluating")
        found = self.evaluator.run(self.engine, self._must_stop_reading)
        self._owes_evaluation = found is None
        if found is None:
            return False
        self._evaluated_step = self.step
        metric = self.config.evaluation.metric
        value = found.loss if metric == "loss" else found.text.cer.micro.value
        is_best = self.stopping.update(self.step, value)
        cer = found.text.cer.micro
        self.monitor.scalars(
            self.step,
            found.scalars(),
            f"step {self.step}: validation loss {found.loss:.3f}, CER {cer.value:.4f} "
            f"[{cer.low:.4f}, {cer.high:.4f}], {found.text.num_documents} samples",
        )
        pages = [
            (sample.key, found.images[sample.key], sample.prediction, sample.truth)
            for sample in found.samples
            if sample.key in found.images
        ]
        self.monitor.pages(self.step, pages[: self.config.monitor.num_images])
        self.monitor.status(
            metrics={name: round(value, 5) for name, value in found.scalars().items()},
            metrics_step=self.step,
            best_step=self.stopping.best_step,
        )
        if self.stopping.is_over and self.ranks.is_main:
            logger.info(
                "early stopping at step %d: best %s %.4f at step %d, which is kept",
                self.step,
                metric,
                self.stopping.best,
                self.stopping.best_step,
            )
        return is_best

    def _must_stop_reading(self) -> bool:
        """Show a sign of progress after each token; return whether a signal has come."""
        self.heart.phase("evaluating")
        return self.presence.stop.has_come()

    def _finish(self) -> int:
        if self._evaluated_step != self.step:
            self._evaluate()
        if self._owes_evaluation:
            return self._stop_for_signal()
        self._save()
        self.saver.close()
        self.monitor.status(state="done", step=self.step)
        if self.ranks.is_main:
            logger.info("%s: done after %d steps", self.config.folder, self.step)
        return EXIT_DONE

    def _stop_for_signal(self) -> int:
        self._save()
        self.saver.close()
        self.monitor.status(state="interrupted", step=self.step)
        if self.ranks.is_main:
            logger.info("signal: saved at step %d, start me again to go on", self.step)
        return EXIT_AGAIN

    def _save(self) -> None:
        if self.step in (0, self._saved_step):  # nothing has been trained, or nothing since
            return
        self.heart.phase("saving")
        self._saved_step = self.step
        state = {
            "step": self.step,
            "data": self.state.to_json(),
            "stopping": self.stopping.state(),
            "guard": self.guard.state(),
            "owes_evaluation": self._owes_evaluation,
            "adapter": self.config.model_dump(mode="json")["model"]["adapter"],
        }
        self.saver.save(self.step, state, best_step=self.stopping.best_step)
        self.monitor.scalars(
            self.step,
            {"checkpoint/blocked_s": self.saver.blocked_s},
            f"step {self.step}: checkpoint, training waited {self.saver.blocked_s:.2f} s",
        )

    def _check_adapter(self, state: dict[str, Any]) -> None:
        adapter = self.config.model_dump(mode="json")["model"]["adapter"]
        if state["adapter"] != adapter:
            raise CheckpointError(
                f"{self.config.folder}: the checkpoint's model.adapter is {state['adapter']}, now "
                f"{adapter}. Use the old one or a fresh run.dir"
            )

    def _apply_optim(self, wanted: list[dict[str, Any]]) -> None:
        """Let the configuration decide the hyper-parameters, and say where they changed."""
        for group, new in zip(self.engine.optimizer.param_groups, wanted, strict=True):
            for key in ("peak_lr", "weight_decay", "betas", "eps"):
                if tuple_of(group[key]) != tuple_of(new[key]) and self.ranks.is_main:
                    logger.info("%s: %s %s -> %s", group["name"], key, group[key], new[key])
                group[key] = new[key]

    def _check_finite(self) -> None:
        """Stop when steps in a row had no finite gradient (DeepSpeed skips such steps)."""
        is_bad = bool(getattr(self.engine.optimizer, "overflow", False))
        self._num_bad_steps = self._num_bad_steps + 1 if is_bad else 0
        if self._num_bad_steps >= MAX_BAD_STEPS:
            raise LecternError(
                f"{MAX_BAD_STEPS} steps in a row up to step {self.step} had no finite gradient; "
                "lower optim.lr and start again: it goes on from the newest checkpoint"
            )


def tuple_of(value: Any) -> Any:
    """Return lists as tuples, so that a setting equals itself after JSON."""
    return tuple(value) if isinstance(value, list) else value
