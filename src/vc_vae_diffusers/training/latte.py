"""The trainer of the paper's denoiser: Latte's losses on latents of clips (Sec. A.5, Fig. 7)."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from ..autoencoder.checks import unknown_arguments
from ..generation.diffusion_losses import DiffusionLoss, diffusion_schedule, learned_range_loss, min_snr_weight
from ..generation.latte_transformer import LatteAdaLNTransformer3DModel, latte_size_config
from ..generation.pipeline_latte import LatteVCVAEUnconditionalPipeline, normalize_latents
from ..names import asked_of_hub, check_model_name, model_place
from ..video import VideoWriter
from ..video.suffixes import is_shards
from . import data as clips
from . import latent_cache, memory, shards
from .any_vae import check_size
from .checkpoints import ema_weights
from .clip_plan import Bucket, ClipBatchSampler, ClipPlan
from .latte_options import Config
from .machine import prepare
from .stored_latents import StoredLatents
from .trainer import Learner, Terms, Trainer, in_steps

logger = logging.getLogger(__name__)


def latte_scheduler(num_train_timesteps: int = 1000) -> DDPMScheduler:
    """Latte's diffusion: linear betas, learned-range variance, evenly spaced steps; also what the pipeline samples with."""
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def draw(posteriors: torch.Tensor, seeds: list[int], num_timesteps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample latents, timesteps and noise of a batch, each from its clip's own seed: (B, C, t, h, w), (B,), (B, C, t, h, w).

    So a clip's draw depends neither on its place in a batch nor on the process that trains on it.
    """
    mean, logvar = posteriors.chunk(2, dim=1)
    shape = mean.shape[1:]
    spread, timesteps, noise = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        spread.append(torch.randn(shape, generator=generator))
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    latents = mean + torch.exp(0.5 * logvar) * torch.stack(spread).to(mean)
    return latents, torch.stack(timesteps).to(mean.device), torch.stack(noise).to(mean)


class LatteTrainer(Trainer):
    """Latte's losses on latents of clips."""

    project, result = "latte", "pipeline"
    config: Config

    def __init__(self, config: Config, accelerator: Accelerator):
        super().__init__(config, accelerator)
        optim, data = config.optim, config.data
        self.validate_every = config.run.sample_every
        total = optim.batch_size * optim.gradient_accumulation_steps * accelerator.num_processes
        self.bucket = Bucket(data.resolution, data.resolution, data.num_frames, data.fps, 1.0, total, optim.batch_size)
        self.plan = ClipPlan([self.bucket], config.run.seed)
        stored = is_shards(str(data.data))
        self.files = (
            shards.list_shards(str(data.data)) if stored else clips.find_files(data.data, data.include, data.exclude)
        )
        self.health = clips.ReadHealth(data.max_unreadable)
        place = model_place("--vae", config.model.vae)
        with asked_of_hub("--vae", place):
            vae = AutoencoderKLVCVAE.from_pretrained(place, subfolder=config.model.vae_subfolder)
        check_size(vae, "--resolution", data.resolution)
        self.vae = vae.eval().requires_grad_(False).to(accelerator.device)
        self.cache: latent_cache.LatentCache | StoredLatents | None = None
        if stored:
            self.cache = self.stored_latents()
        elif data.latent_cache:
            self.cache = self.prepare_cache(data.latent_cache)
        if config.model.latent_statistics == "data" and self.cache is not None:
            self.vae.register_to_config(latents_mean=self.cache.latents_mean, latents_std=self.cache.latents_std)
        self.classes = self.find_classes() if config.model.classes else None
        self.noise_scheduler = latte_scheduler(optim.num_train_timesteps)
        self.schedule = diffusion_schedule(self.noise_scheduler)
        self.main_learner(self.build_model())

    # ------------------------------------------------------------------------------------------- what it is made of

    def dataset(self) -> clips.ClipDataset:
        """The clips to encode."""
        data = self.config.data
        seed = self.config.run.seed
        return clips.ClipDataset(self.files, [self.bucket], seed, scale_jitter=data.scale_jitter, flip=data.flip)

    def prepare_cache(self, folder: str) -> latent_cache.LatentCache:
        """Encode what the cache lacks, each process its share of the shards, and open it."""
        data = self.config.data
        names = (
            "resolution",
            "num_frames",
            "fps",
            "scale_jitter",
            "flip",
            "cache_clips",
            "cache_shard_clips",
            "cache_dtype",
        )
        root = data.data if Path(data.data).is_dir() else Path(data.data).parent
        settings = {name: getattr(data, name) for name in names} | {
            "seed": self.config.run.seed,
            "vae": latent_cache.vae_fingerprint(self.vae),
            "files": latent_cache.files_fingerprint(self.files, root),
        }
        latent_cache.fill_cache(
            self.vae,
            self.dataset(),
            Path(folder),
            settings,
            batch_size=data.cache_batch_size,
            health=self.health,
            num_workers=data.num_workers,
            processes=self.accelerator,
        )
        self.vae.to("cpu")  # from here on it only decodes samples
        return latent_cache.LatentCache(folder, self.config.run.seed)

    def stored_latents(self) -> StoredLatents:
        """The latents of shards, which this VAE, or one of its kind, has made."""
        data, config = self.config.data, self.vae.config
        side = data.resolution // self.vae.spatial_compression_ratio
        window = (self.vae.groups.latent_frames(data.num_frames), side, side)
        names = ("temporal_compression_ratio", "spatial_compression_ratio", "latent_channels", "first_frame")
        self.vae.to("cpu")  # it only decodes samples
        return StoredLatents(self.files, window, {name: str(config[name]) for name in names}, self.config.run.seed)

    def find_classes(self) -> list[str]:
        """Names of the classes, sorted: folders of the files, or of the cached clips."""
        if self.cache is not None:
            return sorted({latent_cache.class_of(clip) for clip in self.cache.clips()})
        return sorted({Path(file).parent.name for file in self.files})

    def build_model(self) -> LatteAdaLNTransformer3DModel:
        """The denoiser for the geometry of these latents, from a trained one where given."""
        config, data, vae = self.config.model, self.config.data, self.vae
        geometry = {
            "in_channels": vae.config.latent_channels,
            "sample_size": data.resolution // vae.spatial_compression_ratio,
            "video_length": vae.groups.latent_frames(data.num_frames),
            "num_classes": None if self.classes is None else len(self.classes),
            "class_dropout_prob": config.class_dropout_prob,
        }
        if config.init_from:
            check_model_name("--init_from", config.init_from)
            with asked_of_hub("--init_from", config.init_from):
                model = LatteAdaLNTransformer3DModel.from_pretrained(config.init_from).train()
            for name in ("in_channels", "sample_size", "video_length", "num_classes"):
                if model.config[name] != geometry[name]:
                    raise ValueError(
                        f"init_from={config.init_from} has {name} {model.config[name]}, the data {geometry[name]}"
                    )
        else:
            torch.manual_seed(self.config.run.seed)  # whatever was encoded before
            changes = json.loads(config.transformer_config)
            known = set(inspect.signature(LatteAdaLNTransformer3DModel.__init__).parameters) - {"self"}
            if unknown := unknown_arguments(changes, known):
                raise ValueError(f"--transformer_config has {unknown}; check the spelling")
            model = LatteAdaLNTransformer3DModel(**{**latte_size_config(config.size), **geometry, **changes})
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile_repeated_blocks()
        return model

    # -------------------------------------------------------------------------------------------- the training step

    def active(self) -> list[Learner]:
        """Gradients are clipped from ``clip_after`` on."""
        optim = self.config.optim
        self.main.max_norm = optim.max_grad_norm if self.step >= optim.clip_after else float("inf")
        return [self.main]

    def backward(self, batch: dict, share: float) -> Terms:
        """The loss of one micro-batch."""
        with self.accumulating(self.model):
            terms = self.loss(batch)
            self.require_finite(terms.loss, batch)
            self.accelerator.backward(terms.loss * share)
        return terms._asdict()

    def loss(self, batch: dict) -> DiffusionLoss:
        """The terms of a batch."""
        return self.denoise(self.model, self.posteriors(batch), batch["noise_seeds"], self.labels(batch))

    def denoise(
        self, model: torch.nn.Module, posteriors: torch.Tensor, seeds: list[int], labels: torch.Tensor | None
    ) -> DiffusionLoss:
        """Noise samples of posteriors (B, 2C, t, h, w) and compare what a model makes of them."""
        latents, timesteps, noise = draw(posteriors, seeds, self.config.optim.num_train_timesteps)
        latents = normalize_latents(self.vae, latents)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        output = model(noisy, timesteps, class_labels=labels, return_dict=False)[0]
        gamma = self.config.optim.min_snr_gamma
        weight = min_snr_weight(timesteps, self.schedule, gamma) if gamma > 0 else None
        return learned_range_loss(output, latents, noise, timesteps, self.schedule, weight)

    @torch.no_grad()
    def posteriors(self, batch: dict) -> torch.Tensor:
        """Mean and log-variance (B, 2C, t, h, w), from the cache or encoded now."""
        if self.cache is not None:
            return self.to_device(batch["posterior"])
        posterior = self.vae.encode(self.to_device(batch["video"])).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def labels(self, batch: dict) -> torch.Tensor | None:
        """The clips' classes, (B,)."""
        if self.classes is None:
            return None
        labels = [self.classes.index(latent_cache.class_of(clip)) for clip in batch["clips"]]
        return torch.tensor(labels, device=self.accelerator.device)

    # --------------------------------------------------------------------------------------------------------- data

    def batches(self) -> Iterator[list[dict]]:
        """The micro-batches of each step from the current one on, of cached latents or of clips."""
        accelerator, cached = self.accelerator, self.cache is not None
        ranks = (accelerator.process_index, accelerator.num_processes)
        sampler = ClipBatchSampler(self.plan, self.step, self.config.optim.steps, *ranks)
        loader = clips.clip_loader(
            self.dataset() if self.cache is None else self.cache,
            self.config.data.num_workers,
            accelerator.device,
            batch_sampler=sampler,
            collate_fn=latent_cache.collate_latents if cached else clips.collate,
        )
        for batches in in_steps(loader, lambda _: self.config.optim.gradient_accumulation_steps):
            for batch in [] if cached else batches:
                self.health.add(batch)
            yield batches

    def frames(self, batches: list[dict]) -> int:
        """Of the clips."""
        return sum(len(batch["clips"]) for batch in batches) * self.config.data.num_frames

    def state(self) -> dict:
        """How many processes share the clips."""
        return {"num_processes": self.accelerator.num_processes}

    def restore(self, state: dict) -> None:
        """Refuse another number of processes, which would see other clips.

        Raises:
            ValueError: for that.
        """
        if state["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"the checkpoint is of {state['num_processes']} processes, this run has {self.accelerator.num_processes}:"
                " launch as many"
            )

    def summary(self) -> dict[str, str]:
        """What is trained on what."""
        model = self.accelerator.unwrap_model(self.model)
        what = f"{len(self.files):,} files"
        if isinstance(self.cache, StoredLatents):
            what = f"{self.cache.num_clips:,} samples of latents in {len(self.files):,} shards"
        elif self.cache is not None:
            what = f"{self.cache.num_clips:,} cached clips of {what}"
        return super().summary() | {
            "model": f"{type(model).__name__} {self.config.model.size}, {model.num_parameters():,} parameters",
            "data": f"{what}, {self.bucket}, {self.bucket.batch_size} clips a step",
        }

    # -------------------------------------------------------------------------------------------------------- memory

    def loads(self) -> list[memory.Load]:
        """The one kind of batch."""
        data, optim = self.config.data, self.config.optim
        accumulated = optim.batch_size * optim.gradient_accumulation_steps
        return [
            memory.Load(
                f"clips {self.bucket}",
                optim.batch_size,
                data.num_frames * data.resolution**2,
                lambda count: f"Use --batch_size {count} --gradient_accumulation_steps {accumulated // count}",
                "Use --gradient_checkpointing true, --latent_cache, shorter or smaller clips, or a smaller --size",
            )
        ]

    def trial(self) -> memory.Trial:
        """One clip: encoded, where nothing has been, and denoised."""
        data, model = self.config.data, self.accelerator.unwrap_model(self.model)
        video = torch.zeros(1, 3, data.num_frames, data.resolution, data.resolution)
        shape = (1, 2 * model.config.in_channels, model.config.video_length, *2 * (model.config.sample_size,))
        posteriors = torch.zeros(shape, device=self.accelerator.device, requires_grad=True)
        labels = None if self.classes is None else torch.zeros(1, dtype=torch.long, device=self.accelerator.device)

        def loss() -> torch.Tensor:
            if self.cache is None:
                self.posteriors({"video": video})
            return self.denoise(model, posteriors, [0], labels).loss

        return memory.Trial(loss, posteriors, video[0, 0].numel(), [model], [self.vae])

    # ------------------------------------------------------------------------------------------------------- samples

    def pipeline(self) -> LatteVCVAEUnconditionalPipeline:
        """The pipeline of the current weights."""
        model = self.accelerator.unwrap_model(self.model)
        scheduler = latte_scheduler(self.config.optim.num_train_timesteps)
        pipeline = LatteVCVAEUnconditionalPipeline(self.vae, model, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Write videos of the averaged weights side by side to samples/, and show their frames in the tracker.

        The noise is the same every time, and the random state of training is not touched.
        """
        run = self.config.run
        if self.accelerator.is_main_process:
            generators = [torch.Generator().manual_seed(run.seed + index) for index in range(run.samples)]
            labels = None if self.classes is None else [index % len(self.classes) for index in range(run.samples)]
            self.vae.to(self.accelerator.device)
            model = self.accelerator.unwrap_model(self.model).eval()
            with ema_weights(self.ema, self.model):
                output: Any = self.pipeline()(
                    run.samples,
                    labels,
                    num_frames=self.config.data.num_frames,
                    num_inference_steps=run.sampling_steps,
                    generator=generators,
                    output_type="pt",
                )
            model.train()
            if self.cache is not None:
                self.vae.to("cpu")
            self.show(torch.cat(list(output.frames.cpu()), dim=3).transpose(0, 1))
        self.accelerator.wait_for_everyone()
        return {}

    def show(self, video: torch.Tensor) -> None:
        """Write one video (3, T, H, W) in [0, 1], and log its frames as images."""
        folder = self.output / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with VideoWriter(folder / f"step-{self.step:08d}.mp4", fps=self.config.run.sample_fps) as writer:
            writer.write(video * 2 - 1)
        frames = (video.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()
        for tracker in self.accelerator.trackers:
            formats = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": frames}, step=self.step, **formats)

    def save_result(self, folder: Path) -> None:
        """The whole pipeline, VAE included."""
        if self.accelerator.is_main_process:
            self.pipeline().save_pretrained(folder)


def train(config: Config) -> int:
    """Train by options; returns the number of the signal that stopped the run, or 0."""
    trainer = LatteTrainer(config, prepare(config.run))
    trainer.run()
    return trainer.stopped_by
