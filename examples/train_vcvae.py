"""Train VC-VAE, or fine-tune any diffusers video VAE, by the paper's two-stage recipe (Sec. 4.1, Table 7).

    accelerate launch examples/train_vcvae.py --config examples/configs/stage1.yaml --data DIR --output DIR

Every option has a line in the dataclasses below; values come from them, then from the YAML file, then from the command
line. A run that was stopped, killed or interrupted goes on from its last checkpoint when the same command is given
again, and gives the weights that an unbroken run would give. docs/training.md tells more.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from vc_vae_diffusers import data as vdata
from vc_vae_diffusers import losses, shards, training
from vc_vae_diffusers.discriminator import PatchDiscriminator3D
from vc_vae_diffusers.metrics import frame
from vc_vae_diffusers.video import VideoReadError, VideoWriter, to_uint8

logger = logging.getLogger("train_vcvae")


@dataclass
class ModelConfig:
    """Exactly one of model, from_image_vae and model_config."""

    model: str | None = None  # folder or hub id of a VC-VAE or of any diffusers video VAE
    from_image_vae: str | None = None  # folder, file or hub id of an image VAE to inflate (Sec. 3.2)
    model_config: str | None = None  # JSON file of a VC-VAE configuration, to train from random weights
    subfolder: str | None = None  # of model or from_image_vae
    model_options: str = "{}"  # JSON, configuration of the inflated model: '{"temporal_operator": "conv"}'
    train: str = "encoder,decoder"  # parts that learn
    gradient_checkpointing: bool = False
    channels_last: bool = False  # channels_last_3d weights and clips
    compile: bool = False  # torch.compile of encoder, decoder and discriminator


@dataclass
class DataConfig:
    data: str | None = None  # folder, list file, CSV file, or webdataset shards "shards-{0000..0127}.tar"
    include: list[str] = field(default_factory=list)  # patterns, or @LIST, or @LIST:SECTION
    exclude: list[str] = field(default_factory=list)
    holdout: list[str] = field(default_factory=list)  # never trained on; validation reads these
    validation_data: str | None = None  # a folder or list of its own for validation, instead of holdout
    buckets: list[str] = field(default_factory=lambda: ["size=256 frames=16 fps=24 batch=8"])
    scale_jitter: float = 0.0  # 0: crops of the whole short side; 1: anything down to native pixels, log-uniform
    flip: bool = True
    cache_in_memory: bool = False  # keep decoded clips as uint8: for small collections and num_workers=0
    cache_short_side: int | None = None  # shrink what is cached to this short side
    num_workers: int = 0
    max_unreadable: float = 0.5  # stop when a larger part of the videos cannot be read
    shuffle_buffer: int = 256  # samples held for shuffling, shards only


@dataclass
class LossConfig:
    """Means over all elements; L1 has weight 1 (Table 7)."""

    lpips_weight: float = 0.1
    lpips_net: Literal["vgg", "alex"] = "vgg"
    lpips_frames: int = 0  # frames of a clip drawn for LPIPS; 0 takes all
    kl_weight: float = 1e-8
    gan_weight: float = 0.0
    gan_start: int = 0  # first step with the discriminator
    gan_warmup_steps: int = 0  # steps over which the generator's GAN weight then rises to gan_weight
    adaptive_gan_weight: bool = False  # VQGAN's ratio of gradient norms on top of gan_weight
    lecam_weight: float = 0.0
    discriminator_channels: int = 64
    discriminator_layers: int = 3


@dataclass
class OptimConfig:
    steps: int = 500_000
    learning_rate: float = 1e-5
    discriminator_learning_rate: float | None = None  # learning_rate if not given
    lr_scheduler: str = "constant_with_warmup"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999


@dataclass
class RunConfig:
    output: str | None = None
    resume: bool = True  # go on from the last checkpoint under output
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "bf16"  # autocast; the weights stay float32
    cpu: bool = False  # train on the CPU though there is a GPU
    num_threads: int = 0  # CPU threads of this process; 0 leaves torch's choice
    deterministic: bool = False  # deterministic CUDA kernels, for exact resume on GPUs
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    validate_every: int = 1000
    validation_size: int = 256
    validation_frames: int = 16
    validation_clips: int = 64
    validation_videos: int = 4
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"
    benchmark_loader: int = 0  # read this many steps of clips, print the throughput, train nothing


@dataclass
class Config:
    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    run: RunConfig

    def flat(self) -> dict:
        """All options in one dictionary, as they stand in a YAML file."""
        return {key: value for part in dataclasses.asdict(self).values() for key, value in part.items()}


def parse_config(argv: list[str]) -> Config:
    """Dataclass defaults, overridden by --config FILE.yaml, overridden by the command line."""
    parser = HfArgumentParser([ModelConfig, DataConfig, LossConfig, OptimConfig, RunConfig], description=__doc__)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    parser.add_argument("--config", type=Path, help="YAML file of these options")
    config_file = first.parse_known_args(argv)[0].config
    base = Path()
    if config_file is not None:
        values = yaml.safe_load(config_file.read_text()) or {}
        known = {action.dest: action for action in parser._actions}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{config_file}: unknown options {unknown}; --help lists all")
        for key, value in values.items():
            if isinstance(known[key].default, float) and isinstance(value, (int, str)):
                values[key] = float(value)  # YAML reads 1e-5 as text
        if isinstance(values.get("model_options"), dict):
            values["model_options"] = json.dumps(values["model_options"])
        parser.set_defaults(**values)
        base = config_file.parent
    *parts, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    config = Config(*parts)
    for patterns in (config.data.include, config.data.exclude, config.data.holdout):
        patterns[:] = vdata.expand_patterns(patterns, base)
    for name in ("data", "output"):
        if config.flat()[name] is None:
            raise ValueError(f"--{name} is required")
    return config


def build_vae(config: ModelConfig):
    """Load or inflate the VAE that is to be trained, float32, with everything but config.train frozen."""
    given = [name for name in ("model", "from_image_vae", "model_config") if getattr(config, name)]
    if len(given) != 1:
        raise ValueError(f"give exactly one of --model, --from_image_vae and --model_config, not {given}")
    options = json.loads(config.model_options)
    if config.model:
        vae = training.load_vae(config.model, config.subfolder)
    elif config.from_image_vae:
        vae = training.AutoencoderKLVCVAE.from_image_vae(config.from_image_vae, subfolder=config.subfolder, **options)
    else:
        file = json.loads(Path(config.model_config).read_text())
        vae = training.AutoencoderKLVCVAE.from_config(file, **options)
    vae.float().train()
    training.select_parts(vae, config.train.split(","))
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if config.channels_last:
        vae.to(memory_format=torch.channels_last_3d)
    return vae


class Trainer:
    """One run: what is trained, on what, and how far it got."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.output = Path(config.run.output)
        self.buckets = vdata.parse_buckets(config.data.buckets)
        self.plan = vdata.ClipPlan(self.buckets, config.run.seed)
        vae = build_vae(config.model)
        self.gan = config.loss.gan_weight > 0
        if self.gan and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"gan_weight={config.loss.gan_weight} does not go with {accelerator.distributed_type.value}: they shard one "
                "model, and the discriminator is a second; train Stage II with DDP and gradient_checkpointing"
            )
        lengths = [bucket.num_frames for bucket in self.buckets] + [config.run.validation_frames]
        self.model = training.TrainableVAE(vae, lengths)
        self.optimizer = self._adamw(self.model, config.optim.learning_rate)
        self.scheduler = self._scheduler(self.optimizer)
        self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        if self.gan:
            torch.manual_seed(config.run.seed)
            rate = config.optim.discriminator_learning_rate or config.optim.learning_rate
            discriminator = PatchDiscriminator3D(
                base_channels=config.loss.discriminator_channels, num_layers=config.loss.discriminator_layers
            )
            if accelerator.device.type == "cpu":
                training.pad_time_explicitly(discriminator)
            self.disc_optimizer = self._adamw(discriminator, rate)
            self.disc_scheduler = self._scheduler(self.disc_optimizer)
            self.discriminator, self.disc_optimizer = accelerator.prepare(discriminator, self.disc_optimizer)
            self.lecam = losses.LeCam().to(accelerator.device)
        self.ema = EMAModel(self.model.parameters(), decay=config.optim.ema_decay, foreach=not accelerator.is_fsdp2)
        self.lpips = None
        if config.loss.lpips_weight > 0:
            self.lpips = losses.LPIPS(config.loss.lpips_net).to(accelerator.device)
        if config.model.compile:
            self._compile(vae)
        self.step = self.batches_done = 0
        self.positions: list[tuple[int, int]] = []  # of this process's shard streams
        self.pending: dict[str, list[float]] = {}

    def _adamw(self, module: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
        optim = self.config.optim
        return torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            weight_decay=optim.weight_decay,
        )

    def _scheduler(self, optimizer: torch.optim.Optimizer):
        optim = self.config.optim
        return get_scheduler(
            optim.lr_scheduler, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=optim.steps
        )

    def _compile(self, vae: torch.nn.Module) -> None:
        # One graph for every shape of a bucket: shapes are few, and code for known sizes is faster.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
        if self.gan:
            self.accelerator.unwrap_model(self.discriminator).compile(dynamic=False)

    # -------------------------------------------------------------------------------------------- the training step

    def train_step(self, batches: list[dict]) -> dict[str, float]:
        """One optimizer step on the micro-batches of one bucket; generator and discriminator see the same clips."""
        config, accelerator = self.config.loss, self.accelerator
        gan = self.gan and self.step >= config.gan_start
        totals: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            video = self.to_device(self.as_clip(batch["video"]))
            with self.accumulating(self.model, last):
                reconstruction, mean, logvar = self.model(video, batch["noise_seeds"])
                terms = self.reconstruction_terms(reconstruction, video, mean, logvar, batch["noise_seeds"])
                loss = terms["l1"] + config.lpips_weight * terms["lpips"] + config.kl_weight * terms["kl"]
                if gan:
                    terms["gan"], weight = self.generator_term(reconstruction, loss)
                    loss = loss + weight * terms["gan"]
                self.require_finite(loss, batch)
                accelerator.backward(loss / len(batches))
            if gan:
                with self.accumulating(self.discriminator, last):
                    terms |= self.discriminator_terms(video, reconstruction.detach())
                    self.require_finite(terms["discriminator"], batch)
                    accelerator.backward(terms["discriminator"] / len(batches))
            terms |= {"loss": loss, "psnr": psnr(reconstruction, video).mean()}
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / len(batches)

        max_norm = self.config.optim.max_grad_norm
        totals["grad_norm"] = training.clip_gradients(accelerator, self.model, max_norm)
        if gan:
            totals["discriminator_grad_norm"] = training.clip_gradients(accelerator, self.discriminator, max_norm)
            self.require_finite(totals["discriminator_grad_norm"], *batches)
        self.require_finite(totals["grad_norm"], *batches)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if gan:
            self.disc_optimizer.step()
            self.disc_scheduler.step()
            self.disc_optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        self.step += 1
        return self.mean_over_processes(totals)

    def as_clip(self, video: torch.Tensor) -> torch.Tensor:
        """Repeat an image over the shortest clip that the VAE returns (Sec. 3.4); clips pass."""
        if video.shape[2] > 1:
            return video
        return video.expand(-1, -1, self.accelerator.unwrap_model(self.model).padded_frames[1], -1, -1)

    def to_device(self, video: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last_3d if self.config.model.channels_last else torch.contiguous_format
        return video.to(self.accelerator.device, memory_format=layout, non_blocking=True)

    def accumulating(self, model: torch.nn.Module, last: bool):
        """Average gradients over processes at the last micro-batch only."""
        self.accelerator.sync_gradients = last
        return nullcontext() if last else self.accelerator.no_sync(model)

    def reconstruction_terms(self, reconstruction, video, mean, logvar, seeds) -> dict[str, torch.Tensor]:
        """L1, LPIPS and KL, each a mean over all elements."""
        terms = {"l1": losses.l1_loss(reconstruction, video), "kl": losses.kl_loss(mean, logvar)}
        terms["lpips"] = torch.zeros((), device=video.device)
        if self.lpips is not None:
            pair = torch.stack([reconstruction, video])
            count = self.config.loss.lpips_frames
            if 0 < count < video.shape[2]:
                # Not in the paper: LPIPS on frames drawn anew at every step, a cheaper estimate of the same mean.
                rng = torch.Generator().manual_seed(seeds[0])
                frames = torch.randperm(video.shape[2], generator=rng)[:count].sort().values
                pair = pair[:, :, :, frames.to(pair.device)]
            with self.accelerator.autocast():
                terms["lpips"] = self.lpips(*pair)
        return terms

    def generator_term(self, reconstruction, loss) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The hinge loss of the generator and its weight at this step. The discriminator's weights get no gradient."""
        config = self.config.loss
        discriminator = self.accelerator.unwrap_model(self.discriminator).requires_grad_(False)
        gan = losses.generator_loss(discriminator(reconstruction))
        discriminator.requires_grad_(True)
        weight = config.gan_weight
        if config.gan_warmup_steps:
            weight *= min(1.0, (self.step - config.gan_start + 1) / config.gan_warmup_steps)
        if config.adaptive_gan_weight:
            layer = training.last_layer(self.accelerator.unwrap_model(self.model).vae)
            weight = weight * losses.adaptive_weight(loss, gan, layer)
        return gan, weight

    def discriminator_terms(self, video, reconstruction) -> dict[str, torch.Tensor]:
        """Hinge loss of the discriminator, one pass over real and reconstructed clips."""
        real, fake = self.discriminator(torch.cat([video, reconstruction])).chunk(2)
        loss = losses.discriminator_loss(real, fake)
        terms = {"logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.config.loss.lecam_weight > 0:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + self.config.loss.lecam_weight * terms["lecam"]
        return terms | {"discriminator": loss}

    def require_finite(self, value: torch.Tensor, *batches: dict) -> None:
        """Stop all processes if ``value`` is NaN or infinite on any of them; the one concerned names its files."""
        finite = bool(torch.isfinite(value))
        if training.any_process(self.accelerator, not finite):
            files = "; ".join(clip for batch in batches for clip in batch["clips"])
            where = f"step {self.step}: loss or gradient is {float(value)}" if not finite else "another process"
            raise training.NonFiniteError(f"non-finite value, {where}; clips: {files}; no weight was changed")

    def mean_over_processes(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        values = torch.stack([torch.as_tensor(value, device=self.accelerator.device).float() for value in totals.values()])
        return dict(zip(totals, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    # --------------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validate(self, files: list[str]) -> dict[str, float]:
        """PSNR and SSIM of the EMA weights on the held-out clips: posterior mode, mean over frames, then clips."""
        run, accelerator = self.config.run, self.accelerator
        sums = torch.zeros(3, dtype=torch.float64)
        with training.ema_weights(self.ema, self.model):
            self.model.eval()
            # Every process runs the same number of passes, as FSDP needs; those without a clip count for nothing.
            for first in range(0, len(files), accelerator.num_processes):
                index = first + accelerator.process_index
                clip = self.validation_clip(files, index)
                empty = torch.zeros(3, run.validation_frames, run.validation_size, run.validation_size)
                video = self.to_device((empty if clip is None else clip)[None])
                reconstruction = self.model(video, None)[0].float().clamp(-1, 1)
                if clip is None:
                    continue
                ssim = frame.ssim(reconstruction, video, data_range=(-1.0, 1.0)).mean()
                sums += torch.tensor([1.0, psnr(reconstruction, video).mean().item(), ssim.item()], dtype=torch.float64)
                if index < run.validation_videos:
                    self.save_video(Path(files[index]).stem, video, reconstruction)
            self.model.train()
        count, total_psnr, total_ssim = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        return {"validation_psnr": total_psnr / count, "validation_ssim": total_ssim / count}

    def validation_clip(self, files: list[str], index: int) -> torch.Tensor | None:
        """The held-out clip number ``index``; None past the end, or if it cannot be read, which is logged."""
        if index >= len(files):
            return None
        try:
            return vdata.validation_clip(files[index], self.config.run.validation_frames, self.config.run.validation_size)
        except VideoReadError as error:
            logger.warning("validation skips %s", error)
            return None

    def save_video(self, name: str, video: torch.Tensor, reconstruction: torch.Tensor) -> None:
        """Write source and reconstruction side by side and hand the file to the tracker."""
        folder = self.output / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-step-{self.step:08d}.mp4"
        clip = torch.cat([video, reconstruction], dim=-1)[0].cpu()
        with VideoWriter(path, fps=24) as writer:
            writer.write(clip)
        log_video(self.accelerator, self.config.run.tracker, name, path, clip, self.step)

    # -------------------------------------------------------------------------------------------------- the whole run

    def run(self, sources: list[str], held_out: list[str]) -> None:
        """Train from the last checkpoint, or from the start, up to config.optim.steps."""
        run, accelerator = self.config.run, self.accelerator
        checkpoints = self.output / "checkpoints"
        existing = training.list_checkpoints(checkpoints) if run.resume else []
        state: dict = {}
        if existing:
            state = training.load_checkpoint(accelerator, self.model, self.ema, existing[-1])
            self.restore(state)
            logger.info("resumed from %s", existing[-1])
        log = training.JsonlLog(self.output / "log.jsonl", self.step) if accelerator.is_main_process else None
        health = vdata.ReadHealth(self.config.data.max_unreadable)
        stop = training.StopSignal()
        started = time.perf_counter()
        for batches in steps_of(self.loader(sources), accelerator.num_processes):
            for batch in batches:
                health.add(batch)
                self.follow_stream(batch)
            terms = self.train_step(batches)
            for name, value in terms.items():
                self.pending.setdefault(name, []).append(value)
            done = self.step == self.config.optim.steps
            stopping = training.any_process(accelerator, stop.requested)
            if self.step % run.log_every == 0 or done:
                row = self.log_row(str(batches[0]["bucket"]), health, started)
                self.report(row, log)
            if held_out and (self.step % run.validate_every == 0 or done):
                self.report({"step": self.step, **self.validate(held_out)}, log)
            if self.step % run.checkpoint_every == 0 or done or stopping:
                self.save(checkpoints, must=done or stopping)
            if stopping:
                logger.warning("stopped at step %d; the same command goes on from there", self.step)
                break
        stop.restore()
        if self.step == self.config.optim.steps:
            with training.ema_weights(self.ema, self.model):
                training.save_vae(accelerator, self.model, self.output / "vae")

    def loader(self, sources: list[str]) -> DataLoader:
        """Clips of this process from the current step on; ``sources`` are files, or shards."""
        data, accelerator = self.config.data, self.accelerator
        steps = (self.step, self.config.optim.steps)
        ranks = (accelerator.process_index, accelerator.num_processes)
        options = {
            "num_workers": data.num_workers,
            "worker_init_fn": vdata.quiet_worker,
            "pin_memory": accelerator.device.type == "cuda",
        }
        if shards.is_shards(data.data):
            stream = shards.ShardStream(
                sources,
                self.plan,
                *steps,
                rank=ranks[0],
                num_processes=ranks[1],
                num_workers=data.num_workers,
                positions=[shards.Position(*position) for position in self.positions],
                batches_done=self.batches_done,
                shuffle_buffer=data.shuffle_buffer,
                exclude=[*data.exclude, *data.holdout],
                reader=vdata.ClipReader(data.scale_jitter, data.flip),
            )
            return DataLoader(stream, batch_size=None, collate_fn=vdata.as_is, **options)
        dataset = vdata.ClipDataset(
            sources,
            self.buckets,
            self.config.run.seed,
            scale_jitter=data.scale_jitter,
            flip=data.flip,
            cache_in_memory=data.cache_in_memory,
            cache_short_side=data.cache_short_side,
        )
        sampler = vdata.ClipBatchSampler(self.plan, *steps, *ranks)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=vdata.collate, **options)

    def follow_stream(self, batch: dict) -> None:
        """Remember where the batch's shard stream stands."""
        self.batches_done += 1
        if "stream" in batch:
            self.positions = self.positions or [(0, 0)] * max(1, self.config.data.num_workers)
            self.positions[batch["stream"]] = batch["position"]

    def restore(self, state: dict) -> None:
        """Take over what a checkpoint's state says, and name every option that changed since."""
        self.step, self.pending = state["step"], state["pending"]
        streams = state.get("streams", [])
        if any(streams) and len(streams) != self.accelerator.num_processes:
            raise ValueError(
                f"the checkpoint has the shard streams of {len(streams)} processes, this run has "
                f"{self.accelerator.num_processes}; resume shards with as many as the run began with"
            )
        if any(streams):
            self.positions = [tuple(position) for position in streams[self.accelerator.process_index]]
            self.batches_done = state["batches_done"]
        self.scheduler.load_state_dict(state["scheduler"])
        if self.gan:
            self.disc_scheduler.load_state_dict(state["discriminator_scheduler"])
            self.lecam.load_state_dict({name: torch.tensor(value) for name, value in state["lecam"].items()})
        for name, value in json.loads(json.dumps(self.config.flat())).items():
            if state["config"].get(name) != value:
                logger.warning("option %s was %r, is %r now", name, state["config"].get(name), value)

    def save(self, folder: Path, must: bool) -> None:
        """Write a checkpoint. A failed one is reported and training goes on, unless the run ends here (``must``)."""
        state = {
            "step": self.step,
            "pending": self.pending,
            "scheduler": self.scheduler.state_dict(),
            "config": self.config.flat(),
            "batches_done": self.batches_done,
            "streams": gather_object([self.positions]),
        }
        if self.gan:
            state["discriminator_scheduler"] = self.disc_scheduler.state_dict()
            state["lecam"] = {name: value.item() for name, value in self.lecam.state_dict().items()}
        keep = self.config.run.keep_checkpoints
        try:
            path = training.save_checkpoint(self.accelerator, self.model, self.ema, state, folder, keep)
            logger.info("saved %s", path)
        except training.CheckpointError as error:
            if must:
                raise
            logger.error("%s; training goes on", error)

    def log_row(self, bucket: str, health, started: float) -> dict:
        """Means since the last row, and how the run is doing."""
        row = {"step": self.step, **{name: sum(values) / len(values) for name, values in self.pending.items()}}
        self.pending = {}
        return row | {
            "bucket": bucket,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "unreadable": health.unreadable,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def report(self, row: dict, log) -> None:
        """To the JSON log, the tracker and the console."""
        if log is not None:
            log.write(row)
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
            self.accelerator.log(numbers, step=row["step"])
            logger.info("%s", "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def psnr(reconstruction: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """PSNR of every frame, (B, T), of a reconstruction clamped to the range of pixels."""
    return frame.psnr(reconstruction.detach().float().clamp(-1, 1), video, data_range=(-1.0, 1.0))


def log_video(accelerator: Accelerator, tracker: str, name: str, path: Path, clip: torch.Tensor, step: int) -> None:
    """Show a clip (3, T, H, W) in [-1, 1] in the tracker, under validation/NAME."""
    if not accelerator.is_main_process or tracker == "none":
        return
    key = f"validation/{name}"
    if tracker == "tensorboard":
        # add_video would need moviepy; what it writes is this: a GIF in an image summary.
        from tensorboard.compat.proto.summary_pb2 import Summary

        frames = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in to_uint8(clip).unbind(1)]
        buffer = io.BytesIO()
        frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=42, loop=0)
        picture = Summary.Image(height=clip.shape[2], width=clip.shape[3], encoded_image_string=buffer.getvalue())
        writer = accelerator.get_tracker("tensorboard", unwrap=True)
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=key, image=picture)]), step)
    elif tracker == "wandb":
        import wandb

        accelerator.get_tracker("wandb", unwrap=True).log({key: wandb.Video(str(path))}, step=step)
    else:
        import trackio

        accelerator.get_tracker("trackio", unwrap=True).log({key: trackio.Video(str(path))}, step=step)


def steps_of(loader: DataLoader, num_processes: int) -> Iterator[list[dict]]:
    """Group micro-batches by step."""
    batches: list[dict] = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == batch["bucket"].micro_batches(num_processes):
            yield batches
            batches = []


def find_data(config: DataConfig) -> tuple[list[str], list[str]]:
    """The files, or shards, to train on, and the files to validate on."""
    held_out = []
    if config.validation_data:
        held_out = vdata.find_files(config.validation_data)
    elif config.holdout and not shards.is_shards(config.data):
        held_out = vdata.find_files(config.data, config.holdout)
    if shards.is_shards(config.data):
        if config.include:
            raise ValueError("include does not apply to shards; leave shards out of data, or use exclude on sample keys")
        return shards.list_shards(config.data), held_out
    return vdata.find_files(config.data, config.include, [*config.exclude, *config.holdout]), held_out


def benchmark_loader(trainer: Trainer, sources: list[str], steps: int) -> None:
    """Print how many clips, frames and megapixels a second the loader of this process delivers, without training.

    The CPU time of a clip, workers included, hardly depends on what else the machine does.
    """
    health = vdata.ReadHealth(trainer.config.data.max_unreadable)
    trainer.config.optim.steps = steps
    total = {"clips": 0, "frames": 0, "megapixels": 0.0}
    started, cpu_before = time.perf_counter(), sum(os.times()[:4])
    for batch in trainer.loader(sources):
        health.add(batch)
        clips, _, frames, height, width = batch["video"].shape
        total["clips"] += clips
        total["frames"] += clips * frames
        total["megapixels"] += clips * frames * height * width / 1e6
    seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu_before
    rates = ", ".join(f"{value / seconds:.2f} {name}/s" for name, value in total.items())
    print(f"loader: {total['clips']} clips in {seconds:.1f} s with {trainer.config.data.num_workers} workers: {rates}")
    print(f"{cpu / total['clips']:.3f} CPU seconds a clip")
    print(f"unreadable {health.unreadable}, unsuitable for their bucket {health.unsuitable}")


def main(argv: list[str]) -> None:
    config = parse_config(argv)
    run = config.run
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    if run.deterministic:
        torch.use_deterministic_algorithms(True)
    tracker = None if run.tracker == "none" else run.tracker
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        # accelerate would go on without a word.
        raise ImportError(f"tracker={tracker!r} is not installed: pip install {tracker}, or choose --tracker none")
    # Told that there is no accelerator, accelerate joins several processes by gloo; else it would start strangers.
    cpu = run.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision=run.mixed_precision, log_with=tracker, project_dir=run.output)
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    Path(run.output).mkdir(parents=True, exist_ok=True)
    sources, held_out = find_data(config.data)
    torch.manual_seed(run.seed)
    trainer = Trainer(config, accelerator)
    if run.benchmark_loader:
        return benchmark_loader(trainer, sources, run.benchmark_loader)
    if accelerator.is_main_process:
        (Path(run.output) / "config.yaml").write_text(yaml.safe_dump(config.flat(), sort_keys=False))
    values = {name: value if isinstance(value, int | float) else str(value) for name, value in config.flat().items()}
    accelerator.init_trackers("vc_vae", config=values)
    trainer.run(sources, held_out[: run.validation_clips])
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
