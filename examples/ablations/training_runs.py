"""One run: an image VAE, or an arm at one seed and one rate; stopped anywhere, it goes on where it was."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clips
import measuring
import torch
from arms import ARMS, Arm, build, image_network, reconstruct, temporal_layers
from coordinates import SliceCoordinates, slice_gradients
from settings import Settings, TrainingSettings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vc_vae_diffusers.training.losses import LPIPS, kl_loss, l1_loss


@dataclass(frozen=True)
class Task:
    """A run up to a step. `arm` is a name in ARMS, or "image" for the image VAEs of a seed."""

    arm: str
    seed: int
    rate: float
    steps: int

    @property
    def run(self) -> str:
        """The folder and file name of the run, whatever the step it has come to."""
        return f"{self.arm}-s{self.seed}" + ("" if self.arm == "image" else f"-r{self.rate:.3g}")


@dataclass
class Place:
    """Where things are: `results` are small and kept, `work` is what runs need to go on."""

    data: Path
    out: Path
    settings: Settings
    device: torch.device

    @property
    def results(self) -> Path:
        return self.out / "results"

    @property
    def work(self) -> Path:
        return self.out / "work"

    def image_vae(self, which: str, seed: int) -> str:
        given = getattr(self.settings.image, which)
        return given or str(self.work / f"image-s{seed}" / which)

    def result(self, run: str) -> dict[str, Any] | None:
        path = self.results / f"{run}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def progress(self, run: str) -> dict[str, Any]:
        path = self.work / run / "progress.json"
        return json.loads(path.read_text()) if path.exists() else {"step": 0, "seconds": 0.0}


def write_json(path: Path, values: Any) -> None:
    """Write a small JSON file whole or not at all, numbers to five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_rounded(values), separators=(",", ":")) + "\n")
    partial.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


# Averages and checkpoints ---------------------------------------------------------------------------------------------


class Average:
    """Exponential moving average of weights; young ones are averaged over what there is."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.values = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 9))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in model.parameters()], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the averages."""
        for value, parameter in zip(self.values, model.parameters(), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    def state_dict(self) -> dict:
        return {"count": self.count, "values": self.values}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)


class Clock:
    """Wall time and this process's CPU time of a run, over all its sittings; on a busy machine the two differ."""

    def __init__(self, records: dict[str, Any]):
        self.records = records
        self.starts = {"seconds": (time.monotonic, time.monotonic(), records["seconds"])}
        self.starts["cpu_seconds"] = (time.process_time, time.process_time(), records["cpu_seconds"])

    def stamp(self) -> None:
        for name, (now, began, before) in self.starts.items():
            self.records[name] = before + now() - began


class Checkpoint:
    """`state.pt` of a run: model, average, optimizer, step, records; replaced as a whole."""

    def __init__(self, folder: Path, parts: dict[str, Any]):
        self.path, self.parts = folder / "state.pt", parts
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, device: torch.device) -> dict[str, Any]:
        if not self.path.exists():
            return {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0}
        saved = torch.load(self.path, weights_only=True, map_location=device)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return saved["records"]

    def save(self, records: dict[str, Any]) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save({name: part.state_dict() for name, part in self.parts.items()} | {"records": records}, partial)
        partial.replace(self.path)
        write_json(self.path.with_name("progress.json"), {key: records[key] for key in ("step", "seconds")})


def _optimizer(arm: Arm, model: nn.Module, rate: float) -> torch.optim.Optimizer | SliceCoordinates:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if arm.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=rate)
        return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)

    if arm.coordinates is None:
        return make(list(model.parameters()))
    layers = temporal_layers(model).values()
    kernels = {id(layer.weight) for layer in layers}
    others = [parameter for parameter in model.parameters() if id(parameter) not in kernels]
    return SliceCoordinates(layers, others, arm.coordinates, make)


# Arms -----------------------------------------------------------------------------------------------------------------


class ArmRun:
    """The training and measuring of one arm at one seed and rate."""

    def __init__(self, place: Place, task: Task):
        self.place, self.task, self.arm = place, task, ARMS[task.arm]
        settings = place.settings
        self.training = settings.training
        source = self.arm.image_vae
        self.model = build(self.arm, settings, source and place.image_vae(source, task.seed), task.seed)
        self.model.to(place.device).train()
        if self.training.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.optimizer = _optimizer(self.arm, self.model, task.rate)
        self.average = Average(self.model, self.training.ema_decay)
        parts = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        self.checkpoint = Checkpoint(place.work / task.run, parts)
        self.records = {"curve": [], "gradients": [], "diverged": False} | self.checkpoint.load(place.device)
        self.lists = clips.split_clips(place.data, settings.clips)
        self.frames = clips.open_frames(place.data, place.work, settings.clips)
        self.lpips = LPIPS("vgg").to(place.device) if self.training.lpips_weight > 0 else None
        self.rebuild = measuring.rebuilder(self.model, place.device, self.training.autocast)

    def train(self) -> None:
        """Train up to the task's step, measuring and saving on the way."""
        settings, training, task = self.place.settings, self.training, self.task
        frames = frames_of(self.arm, training)
        batch = training.long_batch if self.arm.long else training.batch
        # One frame more than ours take: models with a separate first frame see it.
        data = clips.TrainingClips(
            self.frames, self.lists["train"], settings.clips, task.seed, clips.VIDEOS, frames + 1, batch
        )
        self._measure_if_due()
        clock = Clock(self.records)
        for video in data.batches(self.records["step"], task.steps, training.loader_workers):
            if self.records["diverged"]:
                break
            self._step(video)
            clock.stamp()
            if self.records["step"] % training.checkpoint_every == 0 or self.records["step"] == task.steps:
                self._measure_if_due()
                self.checkpoint.save(self.records)
            else:
                self._measure_if_due()

    def _step(self, video: torch.Tensor) -> None:
        step, training, device = self.records["step"], self.training, self.place.device
        warm = min(1.0, (step + 1) / max(1, training.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.rate * warm
        noise = torch.Generator().manual_seed(self.task.seed * 1_000_003 + step)
        video = (video if self.arm.separate else video[:, :, 1:]).to(device)
        with torch.autocast(device.type, torch.bfloat16) if training.autocast else nullcontext():
            sample, mean, logvar = reconstruct(self.model, video, noise)
        loss = l1_loss(sample, video) + training.kl_weight * kl_loss(mean, logvar)
        if self.lpips is not None:
            chosen = lpips_frames(self.task.seed, step, video.shape[0], frames_of(self.arm, training), training.lpips_frames)
            pair = [clip.transpose(1, 2)[chosen[0], chosen[1]][:, :, None] for clip in (sample, video)]
            loss = loss + training.lpips_weight * self.lpips(*pair)
        if not math.isfinite(loss.item()):
            self.records["diverged"] = True
            return
        loss.backward()
        if step % training.gradients_every == 0 and self.arm.peer is None:
            self._look_at_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model)
        self.records["step"] = step + 1

    def _look_at_gradients(self) -> None:
        layers = {name: layer for name, layer in temporal_layers(self.model).items() if layer.weight.shape[2] == 3}
        rows = {name: slice_gradients(layer, layer.differences) for name, layer in layers.items()}
        self.records["gradients"].append({"step": self.records["step"], "layers": rows})

    def _measure_if_due(self) -> None:
        step, settings = self.records["step"], self.place.settings
        measured = {row["step"] for row in self.records["curve"]}
        due = step in self.training.curve or step == self.training.sweep_steps
        if not due or step in measured or self.records["diverged"]:
            return
        with self._averaged():
            row = {"step": step}
            for name in ("test", "validation"):
                windows = [pair[-1] for pair in clips.test_windows(self.lists[name], settings.clips)]
                row[name] = measuring.quick(self.rebuild, self.arm.separate, self.frames, windows, settings.clips)
        self.records["curve"].append(row)

    def _averaged(self) -> Iterator[None]:
        return _Averaged(self.model, self.average)

    def measure(self) -> dict[str, Any]:
        """All metrics of the averaged weights on the test windows."""
        settings, device = self.place.settings.clips, self.place.device
        rows: dict[str, list] = {}
        with self._averaged():
            for windows in clips.test_windows(self.lists["test"], settings):
                per_window = [
                    measuring.of_window(self.rebuild, self.arm.separate, self.frames, window, settings, device)
                    for window in windows
                ]
                image = clips.window_frames(self.frames, windows[0], settings, settings.test_frames + 1)[:, :, :1]
                repeats = 9 if self.arm.separate else None
                of_image = measuring.of_image(self.rebuild, image, repeats, device) if self.arm.peer is None else {}
                for key in per_window[0]:
                    rows.setdefault(key, []).append([row[key] for row in per_window])
                for key, value in of_image.items():
                    rows.setdefault(key, []).append(value)
        by_frame = torch.tensor(rows.pop("psnr_by_frame"))  # (clips, windows, frames)
        return {"clips": self.lists["test"], "psnr_by_frame": by_frame.mean(dim=(0, 1)).tolist(), **rows}

    def flops(self) -> float:
        """Of one training step's forward pass, all convolutions and products counted as direct ones."""
        training = self.training
        frames = frames_of(self.arm, training)
        batch = training.long_batch if self.arm.long else training.batch
        return forward_flops(self.model, frames + int(self.arm.separate), batch, self.place.settings.clips.size)


class _Averaged:
    """Within it the model has the averaged weights and is in eval mode."""

    def __init__(self, model: nn.Module, average: Average):
        self.model, self.average = model, average

    def __enter__(self) -> None:
        self.average.swap(self.model)
        self.model.eval()

    def __exit__(self, *exc_info: object) -> None:
        self.average.swap(self.model)
        self.model.train()


def frames_of(arm: Arm, training: TrainingSettings) -> int:
    """Frames of a training clip, without the one in front that models with a separate first frame see."""
    return training.long_frames if arm.long else training.frames


def lpips_frames(seed: int, step: int, clips_: int, frames: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which frames of a batch LPIPS sees at a step: clips and places, counted from the clip's end, so that one more frame
    in front changes nothing. Apart from the latents' noise, whose amount differs between arms."""
    rng = torch.Generator().manual_seed((seed + 1) * 7_000_003 + step)
    drawn = torch.randperm(clips_ * frames, generator=rng)[:count]
    return drawn // frames, -1 - drawn % frames


def forward_flops(model: nn.Module, frames: int, batch: int, size: int) -> float:
    """Floating point operations of a reconstruction, counted on direct convolutions."""
    layers = [layer for layer in temporal_layers(model).values() if hasattr(layer, "evaluation")]
    kept = [layer.evaluation for layer in layers]
    device = next(model.parameters()).device
    for layer in layers:
        layer.evaluation = "direct"
    with FlopCounterMode(display=False) as counter:
        reconstruct(model, torch.zeros(batch, 3, frames, size, size, device=device), None)
    for layer, evaluation in zip(layers, kept, strict=True):
        layer.evaluation = evaluation
    return float(counter.get_total_flops())


def run_arm(place: Place, task: Task) -> None:
    """Train an arm to the task's step; at the last step measure it and write its result."""
    run = ArmRun(place, task)
    run.train()
    records = run.records
    result = {
        "arm": task.arm,
        "seed": task.seed,
        "rate": task.rate,
        "steps": records["step"],
        "diverged": records["diverged"],
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "forward_flops": run.flops(),
        "seconds": records["seconds"],
        "cpu_seconds": records["cpu_seconds"],
        "device": str(place.device),
        "torch": torch.__version__,
        "scale": place.settings.name,
        "curve": records["curve"],
    }
    if records["step"] >= run.training.steps and not records["diverged"]:
        result["final"] = run.measure()
        result["gradients"] = records["gradients"]
    write_json(place.results / f"{task.run}.json", result)


# Image VAEs -----------------------------------------------------------------------------------------------------------


def run_image(place: Place, task: Task) -> None:
    """Train the image VAE of a seed; its weaker self is saved on the way. L1 and KL, frames of the training clips."""
    settings, device = place.settings, place.device
    image = settings.image
    torch.manual_seed(task.seed)
    model = image_network(settings).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=image.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = Average(model, image.ema_decay)
    folder = place.work / task.run
    checkpoint = Checkpoint(folder, {"model": model, "average": average, "optimizer": optimizer})
    records = checkpoint.load(device)
    lists = clips.split_clips(place.data, settings.clips)
    frames = clips.open_frames(place.data, place.work, settings.clips)
    data = clips.TrainingClips(frames, lists["train"], settings.clips, task.seed, clips.IMAGES, 1, image.batch)
    clock = Clock(records)
    for batch in data.batches(records["step"], task.steps, settings.training.loader_workers):
        step = records["step"]
        pictures = batch[:, :, 0].to(device)
        for group in optimizer.param_groups:
            group["lr"] = image.learning_rate * min(1.0, (step + 1) / 100)
        sample, mean, logvar = reconstruct(model, pictures, torch.Generator().manual_seed(task.seed * 1_000_003 + step))
        loss = l1_loss(sample, pictures) + image.kl_weight * kl_loss(mean, logvar)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss.item()} at step {step} of {task.run}: lower image.learning_rate")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        records["step"] = step + 1
        clock.stamp()
        for which, at in (("weak", image.weak_steps), ("strong", image.steps)):
            if records["step"] == at:
                _save_image_vae(place, task, model, average, which, lists["test"], frames, records)
        if records["step"] % settings.training.checkpoint_every == 0 or records["step"] == task.steps:
            checkpoint.save(records)


def _save_image_vae(
    place: Place, task: Task, model: nn.Module, average: Average, which: str, names: list[str], frames: Any, clock: dict
) -> None:
    """Write the averaged weights as a diffusers folder, and their result on the test clips' first frames."""
    settings = place.settings.clips
    rows: dict[str, list] = {}

    @torch.no_grad()
    def rebuild(video: torch.Tensor) -> torch.Tensor:
        sample, _, _ = reconstruct(model, video[:, :, 0].to(place.device), None)
        return sample.clamp(*measuring.RANGE)[:, :, None].cpu()

    with _Averaged(model, average):
        model.save_pretrained(Path(place.image_vae(which, task.seed)))
        for windows in clips.test_windows(names, settings):
            image = clips.window_frames(frames, windows[0], settings, settings.test_frames + 1)[:, :, :1]
            for key, value in measuring.of_image(rebuild, image, None, place.device).items():
                rows.setdefault(key, []).append(value)
    shape = torch.zeros(place.settings.image.batch, 3, settings.size, settings.size, device=place.device)
    with FlopCounterMode(display=False) as counter:
        reconstruct(model, shape, None)
    steps = place.settings.image.steps if which == "strong" else place.settings.image.weak_steps
    result = {"arm": f"image_{which}", "seed": task.seed, "steps": steps}
    result |= {key: clock[key] for key in ("seconds", "cpu_seconds")}
    result |= {"forward_flops": float(counter.get_total_flops()), "scale": place.settings.name, "rate": None}
    result |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    write_json(place.results / f"image_{which}-s{task.seed}.json", result | {"final": {"clips": names, **rows}})


def run_task(place: Place, task: Task) -> None:
    """Carry out one task."""
    if task.arm == "image":
        run_image(place, task)
    else:
        run_arm(place, task)
