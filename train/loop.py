"""train(config): set up, the loop, tear down; to be read from top to bottom."""

import logging
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_tools.errors import EXIT_AGAIN, EXIT_DONE, CheckpointError, LaunchError, LecternError
from data_tools.stream.executor import StepBatches
from data_tools.stream.faults import HoleCounter
from data_tools.stream.hashing import hash_key
from data_tools.stream.planner import DataState
from train.checkpoint import load_checkpoint, newest_valid, save_checkpoint
from train.config import Config, write_config
from train.data import DataPath, describe, measure, open_data
from train.engine import build_engine, start_distributed
from train.evaluate import Evaluation, Evaluator, gather_json
from train.modeling.packed import layout_of
from train.monitor import Monitor, start_logging
from train.ranks import Ranks
from train.shards import Shards
from train.stages import CollapseGuard, EarlyStopping, estimate_steps, lr_factor
from train.statistics import StepStatistics, gradient_norms
from train.status import read_status

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 5  # steps in a row without a finite gradient


def train(config: Config, shards: Shards, ranks: Ranks) -> int:
    """Train a stage from where it stands; return the exit code.

    Raises:
        LecternError: for what the user must change, on every rank alike.
    """
    start_logging(ranks.rank)
    if is_done(config.folder):
        if ranks.is_main:
            logger.info("%s is done; `python -m train.export` makes its folder", config.folder)
        return EXIT_DONE
    device = start_distributed(config, ranks)
    data = prepare_data(config, shards, ranks)
    engine = build_engine(config, device)
    trainer = Trainer(config, data, engine, ranks, device)
    trainer.resume()
    try:
        code = trainer.run()
    finally:
        trainer.monitor.close()
    dist.destroy_process_group()
    return code


def is_done(folder: Path) -> bool:
    """Return whether the stage has been trained to its end."""
    return read_status(folder).get("state") == "done"


def prepare_data(config: Config, shards: Shards, ranks: Ranks) -> DataPath:
    """Measure lengths on rank 0 while the others wait, then open the sources everywhere."""
    failure = None
    if ranks.is_main:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_config(config, config.folder / "config.yaml")
        try:
            measure(config, shards)
        except LecternError as error:
            failure = str(error)
    failures = [message for message in gather_json(failure, _device_of_group()) if message]
    if failures:
        raise LaunchError(failures[0])
    data = open_data(config, shards)
    if ranks.is_main:
        for line in describe(data):
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
        self, config: Config, data: DataPath, engine: Any, ranks: Ranks, device: torch.device
    ) -> None:
        self.config, self.data, self.engine = config, data, engine
        self.ranks, self.device = ranks, device
        self.layout = layout_of(engine.module.model.config)
        self.total_steps = estimate_steps(config, data.num_tokens, data.num_patches)
        self.step = 0
        self.state: DataState = data.first_state()
        self.stopping = EarlyStopping(config.stage.early_stopping)
        self.guard = CollapseGuard(config.stage.collapse, config.optim.lr)
        self.evaluator = Evaluator(config, data, self.layout, ranks, device)
        self.holes = HoleCounter(config.data.max_hole_share)
        self.statistics = StepStatistics(config, ranks, device)
        self.monitor: Monitor = None  # type: ignore[assignment] # made by resume()
        self._signal: int | None = None
        # For dropout in adapters, the only draw that training makes by itself.
        torch.manual_seed(hash_key(config.run.seed, "dropout", ranks.rank) >> 1)
        self._num_bad_steps = 0
        self._saved_step = -1
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._on_signal)

    def resume(self) -> None:
        """Take up the newest valid checkpoint, if there is one."""
        found = gather_json(self._newest_checkpoint(), self.device)[0]
        if found is not None:
            state = load_checkpoint(self.engine, Path(found))
            self._check_fingerprint(state)
            self.step = self._saved_step = state["step"]
            self.state = DataState.from_json(state["data"])
            self.stopping.restore(state["stopping"])
            self.guard.restore(state["guard"])
            if self.ranks.is_main:
                logger.info("resumed at step %d from %s", self.step, found)
        self.monitor = Monitor(
            self.config.folder,
            is_main=self.ranks.is_main,
            start_step=self.step,
            total_steps=self.total_steps,
        )

    def run(self) -> int:
        """Train to the end of the stage, or to a signal; return the exit code."""
        stage = self.config.stage
        pin = self.device.type != "cpu"
        steps = iter(self.data.executor(self.state, self.layout, self.ranks, pin))
        while self.step < (stage.max_steps or math.inf):
            if self.guard.is_due(self.step):
                self.guard.update(self.step, self.evaluator.loss(self.engine))
            with self.statistics.waiting():
                step = next(steps, None)
            if step is None:
                break
            agreement = self._agree(step)
            if agreement.must_stop:
                return self._stop_for_signal()
            self._train_step(step, agreement.weight_sum)
            self.step, self.state = self.step + 1, step.state
            self._after_step(step)
            if self._evaluate_if_due():
                break
        return self._finish()

    def _train_step(self, step: StepBatches, weight_sum: float) -> None:
        """Forward and backward of every micro-step, then the optimizer.

        The loss is divided by the weights of the whole step on all ranks, so it does not depend on
        world size, accumulation or packing. DeepSpeed averages over ranks, hence `world_size`.
        """
        factor = lr_factor(self.step, self.total_steps, self.config.optim)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        for batch in step.batches:
            output = self.engine(batch.to(self.device))
            loss = output.weighted_sum * (self.ranks.world_size / weight_sum)
            self.engine.backward(loss, scale_wrt_gas=False)
            self.statistics.add(batch, output)
        if self._is_log_step(self.step + 1):
            self.statistics.norms = gradient_norms(self.engine)
        self.engine.step()
        self._check_finite()

    def _agree(self, step: StepBatches) -> _Agreement:
        """Compare the plan over the ranks, add up the weights, and hear who was signalled."""
        plan = step.step.plan_hash
        signalled = int(self._signal is not None)
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

    def _after_step(self, step: StepBatches) -> None:
        holes = [hole for batch in step.batches for hole in batch.holes]
        if any(gather_counts(len(holes), self.device)):
            holes = [hole for part in gather_json(holes, self.device) for hole in part]
        self.monitor.step(self.step, step.step.plan_hash, holes, self.state.to_json())
        self.holes.add(sum(len(pack) for pack in step.step.packs), holes)
        if self._is_log_step(self.step):
            values = self.statistics.collect(self.engine)
            values["train/epoch"] = self.data.epoch(self.state)
            line = self.statistics.line(self.step, self.total_steps, values)
            self.monitor.scalars(self.step, values, line)
            self.monitor.status(
                step=self.step,
                epoch=round(values["train/epoch"], 3),
                loss=round(values["train/loss"], 4),
                tokens_per_s=round(values["speed/tokens_per_s"]),
            )
        if self.step % self.config.checkpoint.every_steps == 0:
            self._save()

    def _evaluate_if_due(self) -> bool:
        """Evaluate at the configured steps; return whether the stage should end here."""
        if self.step % self.config.evaluation.every_steps:
            return False
        return self._evaluate()

    def _evaluate(self) -> bool:
        evaluation = self.evaluator.run(self.engine)
        metric = self.config.evaluation.metric
        value = evaluation.loss if metric == "loss" else evaluation.report.cer.micro.value
        should_stop = self.stopping.update(self.step, value)
        self._show(evaluation)
        if should_stop and self.ranks.is_main:
            logger.info(
                "early stopping at step %d: best %s %.4f at step %d",
                self.step,
                metric,
                self.stopping.best,
                self.stopping.best_step,
            )
        return should_stop

    def _show(self, evaluation: Evaluation) -> None:
        report = evaluation.report
        values = {
            "validation/loss": evaluation.loss,
            "validation/cer": report.cer.micro.value,
            "validation/wer": report.wer.micro.value,
            "validation/character_accuracy": report.character_accuracy,
            "validation/exact_match": report.exact_match.value,
        }
        line = (
            f"step {self.step}: validation loss {evaluation.loss:.3f}, "
            f"CER {report.cer.micro.value:.4f} [{report.cer.micro.low:.4f}, "
            f"{report.cer.micro.high:.4f}], {report.num_documents} samples"
        )
        self.monitor.scalars(self.step, values, line)
        pages = [
            (r.key, evaluation.images[r.key], r.prediction, r.truth)
            for r in evaluation.readings
            if r.key in evaluation.images
        ]
        self.monitor.pages(self.step, pages[: self.config.monitor.num_images])
        self.monitor.status(metrics={name: round(v, 5) for name, v in values.items()})

    def _finish(self) -> int:
        if self.step % self.config.evaluation.every_steps:
            self._evaluate()
        self._save()
        self.monitor.status(state="done", step=self.step)
        if self.ranks.is_main:
            logger.info("%s: done after %d steps", self.config.folder, self.step)
        return EXIT_DONE

    def _stop_for_signal(self) -> int:
        self._save()
        self.monitor.status(state="interrupted", step=self.step)
        if self.ranks.is_main:
            logger.info("signal: saved at step %d, start me again to go on", self.step)
        return EXIT_AGAIN

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        state = {
            "step": self.step,
            "data": self.state.to_json(),
            "stopping": self.stopping.state(),
            "guard": self.guard.state(),
        }
        save_checkpoint(
            self.engine,
            self.config.folder / "checkpoints",
            self.step,
            state,
            keep_last=self.config.checkpoint.keep_last,
            base={"path": self.config.model.path},
        )

    def _newest_checkpoint(self) -> str | None:
        """Return the newest valid checkpoint (rank 0 looks; it reads every byte)."""
        if not self.ranks.is_main:
            return None
        found = newest_valid(self.config.folder / "checkpoints")
        return None if found is None else str(found)

    def _check_fingerprint(self, state: dict[str, Any]) -> None:
        saved = state["data"]["fingerprint"]
        if saved != self.data.mark:
            raise CheckpointError(
                f"{self.config.folder}: the checkpoint was made with other data settings "
                f"(fingerprint {saved}, now {self.data.mark}): shards, seed, tokenizer, templates, "
                "pixel limits, transforms, budgets or selected lengths differ. Use the old ones or "
                "a fresh run.dir"
            )

    def _check_finite(self) -> None:
        """Stop when steps in a row had no finite gradient (DeepSpeed skips such steps)."""
        is_bad = bool(getattr(self.engine.optimizer, "overflow", False))
        self._num_bad_steps = self._num_bad_steps + 1 if is_bad else 0
        if self._num_bad_steps >= MAX_BAD_STEPS:
            raise LecternError(
                f"{MAX_BAD_STEPS} steps in a row up to step {self.step} had no finite gradient; "
                "lower optim.lr or look at the samples in data.jsonl"
            )

    def _on_signal(self, number: int, frame: object) -> None:
        """Note the signal; all ranks agree on it before the next step."""
        self._signal = number


def gather_counts(count: int, device: torch.device) -> list[int]:
    """Return every rank's count, by rank."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return counts.tolist()


def _device_of_group() -> str:
    return "cpu" if dist.get_backend() == "gloo" else "cuda"
