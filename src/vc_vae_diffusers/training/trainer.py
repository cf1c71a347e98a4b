"""The core of every training program: learners, the loop, resume, stop, save and log.

A program (:mod:`.vcvae`, :mod:`.latte`, :mod:`.image_vae`) is a :class:`Trainer` with its own model, data and step.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor

from ..extras import load_yaml
from ..files import write_whole
from . import memory
from .checkpoints import (
    CheckpointError,
    any_process,
    checkpoint_to_resume,
    ema_weights,
    load_checkpoint,
    save_checkpoint,
    save_model,
)
from .log import JsonlLog, StopSignal, progress_bar, row_text
from .machine import checkpoints_of
from .options import Config

logger = logging.getLogger(__name__)

Terms = dict[str, torch.Tensor]


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite. The weights are still those of the step before."""


@dataclass
class Learner:
    """A model that learns, with its optimizer and its schedule; ``max_norm`` is where its gradients are clipped now."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    max_norm: float


class Trainer(ABC):
    """One run: what is trained, on what, and how far it got.

    A subclass makes its learners in ``__init__`` (:meth:`learner`, the averaged one by :meth:`main_learner`), and says what
    a step reads (:meth:`batches`), what it lowers (:meth:`backward`) and how its memory is told (:meth:`trial`,
    :meth:`loads`). What else must survive a stop, with a
    ``state_dict`` of plain numbers, goes into ``stateful``.
    """

    project: ClassVar[str]  # name of the run in trackers
    result: ClassVar[str] = "vae"  # folder of the trained model under the output
    validate_every: int = 0

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.output = Path(config.run.output)
        self.step = 0
        self.stopped_by = 0  # the signal that a run stopped for before its end
        self.pending: dict[str, list[float]] = {}
        self.stateful: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------- given by a program

    @abstractmethod
    def batches(self) -> Iterator[list[dict]]:
        """The micro-batches of each step from the current one on; each has ``clips``, the names of what it holds."""

    @abstractmethod
    def backward(self, batch: dict, share: float) -> Terms:
        """Add ``share`` times the gradients of a micro-batch, under :meth:`accumulating`; return its terms, ``loss`` too."""

    @abstractmethod
    def frames(self, batches: list[dict]) -> int:
        """How many frames a step trains on, for the speed."""

    @abstractmethod
    def trial(self) -> memory.Trial:
        """A step on one small sample, without launchers' wrappers, with everything that a step computes."""

    @abstractmethod
    def loads(self) -> list[memory.Load]:
        """The kinds of micro-batches that the run has."""

    def active(self) -> list[Learner]:
        """The learners that take part in this step."""
        return [self.main]

    def validate(self) -> dict[str, float]:
        """Figures of the averaged weights, every ``validate_every`` steps."""
        return {}

    def extras(self, batches: list[dict]) -> dict[str, Any]:
        """What a row of the log says besides the terms."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint says besides: JSON-able. To be called by every process."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take :meth:`state` back."""

    def summary(self) -> dict[str, str]:
        """What the run is about, for the first lines."""
        count, precision = self.accelerator.num_processes, self.accelerator.mixed_precision.replace("no", "float32")
        where = f"{count} process{'es' * (count > 1)}, {self.accelerator.device}, {precision}"
        return {"output": str(self.output), "steps": f"{self.config.optim.steps:,} on {where}"}

    def save_result(self, folder: Path) -> None:
        """Write what was trained; the averaged weights are in the model. To be called by every process."""
        save_model(self.accelerator, self.main.model, folder)

    # ----------------------------------------------------------------------------------------------------- learners

    def learner(self, name: str, model: nn.Module, learning_rate: float) -> Learner:
        """AdamW and its schedule for the parameters of ``model`` that learn, prepared for all processes."""
        optim = self.config.optim
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            weight_decay=optim.weight_decay,
        )
        scheduler = get_scheduler(
            optim.lr_scheduler, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=optim.steps
        )
        self.stateful[f"{name}_scheduler"] = scheduler
        model, optimizer = self.accelerator.prepare(model, optimizer)
        return Learner(name, model, optimizer, scheduler, optim.max_grad_norm)

    def main_learner(self, model: nn.Module) -> Learner:
        """The learner whose weights are averaged, validated and saved."""
        learner = self.learner("model", model, self.config.optim.learning_rate)
        self.main = learner
        self.ema = EMAModel(
            learner.model.parameters(), decay=self.config.optim.ema_decay, foreach=not self.accelerator.is_fsdp2
        )
        return learner

    @property
    def model(self) -> nn.Module:
        """The averaged model, as accelerate wrapped it."""
        return self.main.model

    # -------------------------------------------------------------------------------------------- the training step

    def train_step(self, batches: list[dict]) -> dict[str, float]:
        """One optimizer step on micro-batches; returns the means of their terms over all processes."""
        totals: Terms = {}
        learners = self.active()
        for index, batch in enumerate(batches):
            self.accelerator.sync_gradients = index == len(batches) - 1
            for name, value in self.backward(batch, 1 / len(batches)).items():
                totals[name] = totals.get(name, 0) + value.detach().float() / len(batches)
        for learner in learners:
            norm = clip_gradients(self.accelerator, learner.model, learner.max_norm)
            self.require_finite(norm, *batches)
            totals["grad_norm" if learner is self.main else f"{learner.name}_grad_norm"] = norm
        for learner in learners:
            learner.optimizer.step()
            learner.scheduler.step()
            learner.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        self.step += 1
        values = torch.stack([torch.as_tensor(value, device=self.accelerator.device).float() for value in totals.values()])
        return dict(zip(totals, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def to_device(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch where the model wants it."""
        return batch.to(self.accelerator.device, non_blocking=True)

    def accumulating(self, model: nn.Module):
        """Average gradients over processes at the last micro-batch only."""
        return nullcontext() if self.accelerator.sync_gradients else self.accelerator.no_sync(model)

    def require_finite(self, value: torch.Tensor, *batches: dict) -> None:
        """Stop all processes if ``value`` is NaN or infinite on any of them; the one concerned names its files."""
        value = torch.as_tensor(value).detach()
        finite = bool(torch.isfinite(value))
        if any_process(self.accelerator, not finite):
            files = "; ".join(clip for batch in batches for clip in batch["clips"])
            where = f"step {self.step}: loss or gradient is {float(value)}" if not finite else "another process"
            raise NonFiniteError(f"non-finite value, {where}; clips: {files}; no weight was changed")

    # -------------------------------------------------------------------------------------------------- the whole run

    def run(self) -> Path | None:
        """Train from the last checkpoint, or from the start, to the end; return the model's folder, None if stopped."""
        self.begin()
        run, steps = self.config.run, self.config.optim.steps
        log = JsonlLog(self.output / "log.jsonl", self.step) if self.accelerator.is_main_process else None
        started = time.perf_counter()
        shown = run.progress and self.accelerator.is_main_process
        with StopSignal() as stop, progress_bar(shown, self.step, steps) as progress:
            for batches in self.batches():
                terms = self.train_step(batches)
                for name, value in terms.items():
                    self.pending.setdefault(name, []).append(value)
                progress.update(terms, self.frames(batches) * self.accelerator.num_processes)
                done = self.step == steps
                stopping = any_process(self.accelerator, stop.requested)
                if self.step % run.log_every == 0 or done:
                    self.report(self.row(batches, started), log)
                if self.step % run.checkpoint_every == 0 or done or stopping:
                    self.save(must=done or stopping)
                if self.validate_every and (self.step % self.validate_every == 0 or done) and (figures := self.validate()):
                    self.report({"step": self.step, **figures}, log)
                if stopping:
                    logger.warning("stopped at step %d; the same command goes on from there", self.step)
                    break
        self.stopped_by = stop.number if self.step < steps else 0
        folder = self.finish() if self.step == steps else None
        self.accelerator.end_training()
        return folder

    def begin(self) -> None:
        """Record the options, say what the run is about, and go on from the last checkpoint."""
        self.record_options()
        for name, value in self.summary().items():
            logger.info("%-9s %s", name, value)
        self.tell_memory()
        torch.manual_seed(self.config.run.seed + self.accelerator.process_index)
        checkpoint = checkpoint_to_resume(checkpoints_of(self.config.run), self.config.run.resume)
        if checkpoint:
            self.resume(load_checkpoint(self.accelerator, self.model, self.ema, checkpoint, self.stateful))
            logger.info("resumed from %s", checkpoint)

    def tell_memory(self) -> None:
        """Say what each kind of micro-batch needs, and which will not fit. Nothing where the launcher shards models."""
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return
        needs = memory.measure(self.trial(), self.accelerator.device)
        for load in self.loads():
            logger.info("%-9s %s", "memory", needs.tell(load))
            needs.warn(load, self.accelerator.device)

    def record_options(self) -> None:
        """Write them to ``config.yaml``, and begin the tracker's run with them."""
        options = self.config.flat()
        if self.accelerator.is_main_process:
            write_whole(self.output / "config.yaml", load_yaml("train").safe_dump(options, sort_keys=False))
        values = {name: value if isinstance(value, int | float) else str(value) for name, value in options.items()}
        self.accelerator.init_trackers(self.project, config=values)

    def finish(self) -> Path:
        """Write the averaged weights."""
        folder = self.output / self.result
        with ema_weights(self.ema, self.model):
            self.save_result(folder)
        logger.info("the model is in %s", folder)
        return folder

    def row(self, batches: list[dict], started: float) -> dict:
        """Means since the last row, and how the run is doing."""
        row: dict[str, Any] = {
            "step": self.step,
            **{name: sum(values) / len(values) for name, values in self.pending.items()},
        }
        self.pending = {}
        row |= {**self.extras(batches), "learning_rate": self.main.scheduler.get_last_lr()[0]}
        return row | {"seconds": round(time.perf_counter() - started, 1)}

    def report(self, row: dict, log: JsonlLog | None) -> None:
        """To the JSON log, the tracker and the console."""
        if log is not None:
            log.write(row)
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
            self.accelerator.log(numbers, step=row["step"])
            logger.info("%s", row_text(row))

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self, must: bool) -> None:
        """Write a checkpoint. A failed one is reported and training goes on, unless the run ends here (``must``)."""
        state = {"step": self.step, "pending": self.pending, "config": self.config.flat(), **self.state()}
        # In JSON, not by accelerate's register_for_checkpointing, which would unpickle whatever it finds when it resumes.
        state["parts"] = {name: _to_json(part.state_dict()) for name, part in self.stateful.items()}
        folder, keep = checkpoints_of(self.config.run), self.config.run.keep_checkpoints
        try:
            path = save_checkpoint(self.accelerator, self.model, self.ema, state, folder, keep)
            logger.info("saved %s", path)
        except CheckpointError as error:
            if must:
                raise
            logger.error("%s; training goes on", error)

    def resume(self, state: dict) -> None:
        """Take over what a checkpoint's state says, and name every option that changed since."""
        self.step, self.pending = state["step"], state["pending"]
        for name, part in self.stateful.items():
            part.load_state_dict(_from_json(state["parts"][name], part.state_dict()))
        self.restore(state)
        for name, value in json.loads(json.dumps(self.config.flat())).items():
            if state["config"].get(name) != value:
                logger.warning("option %s was %r, is %r now", name, state["config"].get(name), value)


def _to_json(state: dict) -> dict:
    return {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def _from_json(state: dict, like: dict) -> dict:
    """A state with tensors where ``like`` has some."""
    return {
        name: torch.tensor(value, dtype=like[name].dtype) if isinstance(like.get(name), torch.Tensor) else value
        for name, value in state.items()
    }


def clip_gradients(accelerator: Accelerator, module: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients of ``module`` down to ``max_norm`` and return the norm that they had, a plain scalar."""
    norm = accelerator.clip_grad_norm_(module.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


def in_steps(batches: Iterable[dict], count: Callable[[dict], int]) -> Iterator[list[dict]]:
    """Group micro-batches by step; ``count`` tells how many make the step of a batch."""
    step: list[dict] = []
    for batch in batches:
        step.append(batch)
        if len(step) == count(batch):
            yield step
            step = []
