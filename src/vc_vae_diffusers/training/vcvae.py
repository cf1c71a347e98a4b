"""The VAE trainer: L1, LPIPS, KL and the GAN of Stage II, on clips of any video VAE (Sec. 4.1, Table 7)."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers import ModelMixin
from torch.utils.data import DataLoader

from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE, lay_channels_last
from ..files import read_json
from ..video.suffixes import is_shards
from . import data as clips
from . import losses, memory, shards
from .any_vae import TrainableVAE, check_size, last_layer, load_vae, select_parts
from .clip_plan import ClipBatchSampler, ClipPlan, parse_buckets
from .discriminator import PatchDiscriminator3D, pad_time_explicitly
from .machine import prepare
from .trainer import Learner, Terms, Trainer, in_steps
from .validation import mean_quality, psnr
from .vcvae_options import Config, DataConfig, ModelConfig

logger = logging.getLogger(__name__)


def build_vae(config: ModelConfig) -> ModelMixin:
    """Load or inflate the VAE that is to be trained, float32, with everything but config.train frozen."""
    changes = json.loads(config.model_options)
    if config.model:
        vae = load_vae(config.model, config.subfolder)
    elif config.from_image_vae:
        vae = AutoencoderKLVCVAE.from_image_vae(config.from_image_vae, subfolder=config.subfolder, **changes)
    else:
        assert config.model_config is not None  # one of the three is given
        vae = AutoencoderKLVCVAE.from_config(read_json(Path(config.model_config)), **changes)
    vae.float().train()
    select_parts(vae, config.train.split(","))
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if config.channels_last:
        lay_channels_last(vae)
    return vae


class VAETrainer(Trainer):
    """L1 + LPIPS + KL, and the GAN of Stage II."""

    project = "vc_vae"
    config: Config

    def __init__(self, config: Config, accelerator: Accelerator, sources: Sequence[str] = (), held_out: Sequence[str] = ()):
        super().__init__(config, accelerator)
        self.sources, self.held_out = list(sources), list(held_out)[: config.run.validation_clips]
        self.validate_every = config.run.validate_every if self.held_out else 0
        self.health = clips.ReadHealth(config.data.max_unreadable)
        self.buckets = parse_buckets(config.data.buckets)
        self.plan = ClipPlan(self.buckets, config.run.seed)
        self.batches_done = 0
        self.positions: list[tuple[int, int]] = []  # of this process's shard streams
        self.lpips = None
        if config.loss.lpips_weight > 0:
            self.lpips = losses.LPIPS(config.loss.lpips_net).to(accelerator.device)
        torch.manual_seed(config.run.seed)
        vae = build_vae(config.model)
        for bucket in self.buckets:
            check_size(vae, f"--buckets: {bucket}", bucket.height, bucket.width)
        if self.held_out:
            check_size(vae, "--validation_size", config.run.validation_size)
        self.gan = config.loss.gan_weight > 0
        lengths = [bucket.num_frames for bucket in self.buckets] + [config.run.validation_frames]
        wrapped = TrainableVAE(vae, lengths)
        self.parameters = [
            sum(p.numel() for p in vae.parameters()),
            sum(p.numel() for p in vae.parameters() if p.requires_grad),
        ]
        self.main_learner(wrapped)
        if self.gan:
            self.add_discriminator()
        if config.model.compile:
            self.compile(vae)

    def add_discriminator(self) -> None:
        """The second learner, of Stage II.

        Raises:
            ValueError: where the launcher shards one model.
        """
        config, kind = self.config, self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"gan_weight={config.loss.gan_weight} does not go with {kind.value}: they shard one "
                "model, and the discriminator is a second; train Stage II with DDP and gradient_checkpointing"
            )
        torch.manual_seed(config.run.seed)
        discriminator = PatchDiscriminator3D(
            base_channels=config.loss.discriminator_channels, num_layers=config.loss.discriminator_layers
        )
        if self.accelerator.device.type == "cpu":
            pad_time_explicitly(discriminator)
        rate = config.optim.discriminator_learning_rate or config.optim.learning_rate
        self.discriminator = self.learner("discriminator", discriminator, rate)
        self.lecam = losses.LeCam().to(self.accelerator.device)
        self.stateful["lecam"] = self.lecam

    def compile(self, vae: ModelMixin) -> None:
        """One graph for every shape of a bucket: shapes are few, and code for known sizes is faster."""
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
        if self.gan:
            self.accelerator.unwrap_model(self.discriminator.model).compile(dynamic=False)

    # -------------------------------------------------------------------------------------------- the training step

    def active(self) -> list[Learner]:
        """The discriminator takes part from ``gan_start`` on."""
        return [self.main, *(self.stage_two() if self.step >= self.config.loss.gan_start else [])]

    def backward(self, batch: dict, share: float) -> Terms:
        """Generator and discriminator on the same clips."""
        config, accelerator = self.config.loss, self.accelerator
        gan = len(self.active()) > 1
        video = self.to_device(self.as_clip(batch["video"]))
        with self.accumulating(self.model):
            reconstruction, mean, logvar = self.model(video, batch["noise_seeds"])
            terms = self.reconstruction_terms(reconstruction, video, mean, logvar, batch["noise_seeds"])
            loss = terms["l1"] + config.lpips_weight * terms["lpips"] + config.kl_weight * terms["kl"]
            if gan:
                terms["gan"], weight = self.generator_term(reconstruction, loss)
                loss = loss + weight * terms["gan"]
            self.require_finite(loss, batch)
            accelerator.backward(loss * share)
        if gan:
            with self.accumulating(self.discriminator.model):
                terms |= self.discriminator_terms(video, reconstruction.detach())
                self.require_finite(terms["discriminator"], batch)
                accelerator.backward(terms["discriminator"] * share)
        return terms | {"loss": loss, "psnr": psnr(reconstruction, video).mean()}

    def as_clip(self, video: torch.Tensor) -> torch.Tensor:
        """Repeat an image over the shortest clip that the VAE returns (Sec. 3.4); clips pass."""
        if video.shape[2] > 1:
            return video
        return video.expand(-1, -1, self.accelerator.unwrap_model(self.model).padded_frames[1], -1, -1)

    def to_device(self, batch: torch.Tensor) -> torch.Tensor:
        """Clips where and as the model wants them."""
        layout = torch.channels_last_3d if self.config.model.channels_last else torch.contiguous_format
        return batch.to(self.accelerator.device, memory_format=layout, non_blocking=True)

    def reconstruction_terms(self, reconstruction, video, mean, logvar, seeds) -> Terms:
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
        discriminator = self.accelerator.unwrap_model(self.discriminator.model).requires_grad_(False)
        gan = losses.generator_loss(discriminator(reconstruction))
        discriminator.requires_grad_(True)
        weight: torch.Tensor | float = config.gan_weight
        if config.gan_warmup_steps:
            weight *= min(1.0, (self.step - config.gan_start + 1) / config.gan_warmup_steps)
        if config.adaptive_gan_weight:
            layer = last_layer(self.accelerator.unwrap_model(self.model).vae)
            weight = weight * losses.adaptive_weight(loss, gan, layer)
        return gan, weight

    def discriminator_terms(self, video, reconstruction) -> Terms:
        """Hinge loss of the discriminator, one pass over real and reconstructed clips."""
        real, fake = self.discriminator.model(torch.cat([video, reconstruction])).chunk(2)
        loss = losses.discriminator_loss(real, fake)
        terms = {"logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.config.loss.lecam_weight > 0:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + self.config.loss.lecam_weight * terms["lecam"]
        return terms | {"discriminator": loss}

    # --------------------------------------------------------------------------------------------------------- data

    def batches(self) -> Iterator[list[dict]]:
        """Clips of this process, counted, and the shard streams followed."""
        for batches in in_steps(self.loader(), lambda batch: batch["bucket"].micro_batches(self.accelerator.num_processes)):
            for batch in batches:
                self.health.add(batch)
                self.batches_done += 1
                if "stream" in batch:
                    self.positions = self.positions or [(0, 0)] * max(1, self.config.data.num_workers)
                    self.positions[batch["stream"]] = batch["position"]
            yield batches

    def loader(self) -> DataLoader:
        """Micro-batches of this process from the current step on, of files or shards."""
        data = self.config.data
        steps = (self.step, self.config.optim.steps)
        ranks = (self.accelerator.process_index, self.accelerator.num_processes)
        if not is_shards(data.data):
            dataset = clips.ClipDataset(
                self.sources,
                self.buckets,
                self.config.run.seed,
                scale_jitter=data.scale_jitter,
                flip=data.flip,
                cache_in_memory=data.cache_in_memory,
                cache_short_side=data.cache_short_side,
            )
            sampler = ClipBatchSampler(self.plan, *steps, *ranks)
            return clips.clip_loader(
                dataset, data.num_workers, self.accelerator.device, batch_sampler=sampler, collate_fn=clips.collate
            )
        stream = shards.ShardStream(
            self.sources,
            self.plan,
            *steps,
            rank=ranks[0],
            num_processes=ranks[1],
            num_workers=data.num_workers,
            positions=[shards.Position(*position) for position in self.positions],
            batches_done=self.batches_done,
            shuffle_buffer=data.shuffle_buffer,
            exclude=[*data.exclude, *data.holdout],
            reader=clips.ClipReader(data.scale_jitter, data.flip),
        )
        return clips.clip_loader(stream, data.num_workers, self.accelerator.device, batch_size=None, collate_fn=clips.as_is)

    def frames(self, batches: list[dict]) -> int:
        """Of the clips as they were read: an image is one."""
        return sum(batch["video"].shape[0] * batch["video"].shape[2] for batch in batches)

    def extras(self, batches: list[dict]) -> dict:
        """The bucket of the step, and how many videos could not be read."""
        return {"bucket": str(batches[0]["bucket"]), "unreadable": self.health.unreadable}

    def state(self) -> dict:
        """Where the shard streams of all processes stand."""
        return {"batches_done": self.batches_done, "streams": gather_object([self.positions])}

    def restore(self, state: dict) -> None:
        """Go on where the streams stood.

        Raises:
            ValueError: for another number of processes.
        """
        streams = state["streams"]
        if any(streams) and len(streams) != self.accelerator.num_processes:
            raise ValueError(
                f"the checkpoint has the shard streams of {len(streams)} processes, this run has "
                f"{self.accelerator.num_processes}; resume shards with as many as the run began with"
            )
        if any(streams):
            self.positions = [tuple(position) for position in streams[self.accelerator.process_index]]
            self.batches_done = state["batches_done"]

    # ------------------------------------------------------------------------------------------------------- figures

    def validate(self) -> dict[str, float]:
        """PSNR and SSIM of the averaged weights on the held-out clips, and videos of some."""
        return mean_quality(self, self.held_out)

    def summary(self) -> dict[str, str]:
        """What is trained on what."""
        vae = self.accelerator.unwrap_model(self.model).vae
        total, trained = self.parameters
        kind = "shards" if is_shards(self.config.data.data) else "files"
        lines = {
            "model": f"{type(vae).__name__}, {total:,} parameters, {trained:,} of them trained",
            "data": f"{len(self.sources):,} {kind} to train on, {len(self.held_out)} held out to validate on",
        }
        weights = sum(bucket.weight for bucket in self.buckets)
        for number, bucket in enumerate(self.buckets, 1):
            lines[f"bucket {number}"] = f"{bucket}: {bucket.weight / weights:.1%} of the steps, {bucket.batch_size} clips"
        return super().summary() | lines

    # -------------------------------------------------------------------------------------------------------- memory

    def loads(self) -> list[memory.Load]:
        """The buckets."""
        lengths = self.accelerator.unwrap_model(self.model).padded_frames
        return [
            memory.Load(
                f"bucket {bucket}",
                bucket.clips_at_once(self.accelerator.num_processes),
                lengths[bucket.num_frames] * bucket.height * bucket.width,
                lambda count: f"Give the bucket micro={count}: gradients are accumulated",
                "Use --gradient_checkpointing true, shorter or smaller clips, or a smaller model",
            )
            for bucket in self.buckets
        ]

    def trial(self) -> memory.Trial:
        """A short clip of at most 64x64."""
        parts = [self.accelerator.unwrap_model(learner.model) for learner in [self.main, *self.stage_two()]]
        frames = min(parts[0].padded_frames[bucket.num_frames] for bucket in self.buckets)
        smallest = min(self.buckets, key=lambda bucket: bucket.height * bucket.width)
        height, width = (min(side, 64) for side in (smallest.height, smallest.width))
        clip = self.to_device(torch.zeros(1, 3, frames, height, width)).requires_grad_()
        frozen = [] if self.lpips is None else [self.lpips]
        return memory.Trial(lambda: self.trial_loss(parts, clip), clip, clip[0, 0].numel(), parts, frozen)

    def trial_loss(self, parts: list[torch.nn.Module], clip: torch.Tensor) -> torch.Tensor:
        """The generator's loss of a clip, with everything that a step of the recipe computes."""
        reconstruction, mean, logvar = parts[0](clip, [0] * len(clip))
        terms = self.reconstruction_terms(reconstruction, clip.detach(), mean, logvar, [0])
        gan = parts[1](reconstruction).float().mean() if len(parts) > 1 else 0
        return terms["l1"] + terms["lpips"] + terms["kl"] + gan

    def stage_two(self) -> list[Learner]:
        """The discriminator, if the run has one."""
        return [self.discriminator] if self.gan else []


def find_data(config: DataConfig) -> tuple[list[str], list[str]]:
    """The files, or shards, to train on, and the files to validate on."""
    held_out = []
    if config.validation_data:
        held_out = clips.find_files(config.validation_data)
    elif config.holdout and not is_shards(config.data):
        held_out = clips.find_files(config.data, config.holdout)
    if is_shards(config.data):
        if config.include:
            raise ValueError("include does not apply to shards; leave shards out of data, or use exclude on sample keys")
        return shards.list_shards(config.data), held_out
    return clips.find_files(config.data, config.include, [*config.exclude, *config.holdout]), held_out


def benchmark_loader(trainer: VAETrainer, steps: int) -> None:
    """Print how many clips, frames and megapixels a second the loader of this process delivers, without training.

    The CPU time of a clip, workers included, hardly depends on what else the machine does.
    """
    trainer.config.optim.steps = steps
    total = {"clips": 0, "frames": 0, "megapixels": 0.0}
    started, cpu_before = time.perf_counter(), sum(os.times()[:4])
    for batches in trainer.batches():
        for batch in batches:
            count, _, frames, height, width = batch["video"].shape
            total["clips"] += count
            total["frames"] += count * frames
            total["megapixels"] += count * frames * height * width / 1e6
    seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu_before
    rates = ", ".join(f"{value / seconds:.2f} {name}/s" for name, value in total.items())
    print(f"loader: {total['clips']} clips in {seconds:.1f} s with {trainer.config.data.num_workers} workers: {rates}")
    print(f"{cpu / total['clips']:.3f} CPU seconds a clip")
    print(f"unreadable {trainer.health.unreadable}, unsuitable for their bucket {trainer.health.unsuitable}")


def train(config: Config) -> int:
    """Train by options, or measure the loader; returns the number of the signal that stopped the run, or 0."""
    accelerator = prepare(config.run)
    trainer = VAETrainer(config, accelerator, *find_data(config.data))
    if config.run.benchmark_loader:
        benchmark_loader(trainer, config.run.benchmark_loader)
    else:
        trainer.run()
    return trainer.stopped_by
