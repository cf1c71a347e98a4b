"""Train the paper's denoiser, Latte with adaLN-zero blocks, on VC-VAE latents (Sec. A.5, Fig. 7).

    accelerate launch examples/train_latte.py --config examples/configs/latte_skytimelapse.yaml \
        --data DIR --vae VC_VAE --output runs/latte

Latents are encoded once into --latent_cache, or on the fly without it. Every option has a line in the dataclasses below;
values come from them, then from the YAML file, then from the command line. A run that was stopped or killed goes on from
its last checkpoint when the same command is given again, and gives the weights that an unbroken run would give. At the end
--output/pipeline holds the averaged weights, which examples/sample_latte.py samples from. docs/pipelines.md tells more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
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
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from vc_vae_diffusers import data as vdata
from vc_vae_diffusers import latent_cache, training
from vc_vae_diffusers.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.diffusion_losses import DiffusionLoss, diffusion_schedule, learned_range_loss, min_snr_weight
from vc_vae_diffusers.latte_transformer import LatteAdaLNTransformer3DModel, latte_size_config
from vc_vae_diffusers.pipeline_latte import LatteVCVAEUnconditionalPipeline, normalize_latents
from vc_vae_diffusers.video import VideoWriter

logger = logging.getLogger("train_latte")

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@dataclass
class ModelConfig:
    vae: str | None = None  # folder or hub id of the VC-VAE, frozen
    vae_subfolder: str | None = None
    size: str = "XL/2"  # S, B, L or XL, and the patch size
    transformer_config: str = "{}"  # JSON, what differs from the size: '{"num_layers": 8}'
    init_from: str | None = None  # folder of a trained transformer to start from
    classes: bool = False  # condition on the class, which is the name of a clip's folder (UCF-101)
    class_dropout_prob: float = 0.1  # share of labels dropped in training, for guidance
    latent_statistics: Literal["vae", "data"] = "vae"  # normalise with the VAE's mean and std, or the cached latents'
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the blocks


@dataclass
class DataConfig:
    data: str | None = None  # folder, list file or CSV file of videos
    include: list[str] = field(default_factory=list)  # patterns, or @LIST, or @LIST:SECTION
    exclude: list[str] = field(default_factory=list)
    resolution: int = 256  # side of the square clips, pixels
    num_frames: int = 16
    fps: float = 8.0  # 0 keeps the video's own rate; 8 is Latte's frame interval 3 of 24 frames a second
    scale_jitter: float = 0.0  # 0: crops of the whole short side; 1: anything down to native pixels, log-uniform
    flip: bool = False
    num_workers: int = 0
    max_unreadable: float = 0.5  # stop when a larger part of the videos cannot be read
    latent_cache: str | None = None  # folder of encoded clips, made when it is not there; None encodes at every step
    cache_clips: int = 10_000  # random clips to encode
    cache_shard_clips: int = 256
    cache_batch_size: int = 4
    cache_dtype: Literal["float16", "float32"] = "float16"


@dataclass
class OptimConfig:
    steps: int = 1_000_000
    batch_size: int = 5  # clips of a process and micro-batch
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.1
    clip_after: int = 20_000  # steps before gradients are clipped
    ema_decay: float = 0.9999
    num_train_timesteps: int = 1000
    min_snr_gamma: float = 0.0  # weigh the noise's error by min(SNR, gamma) / SNR; 0: all alike, as Latte


@dataclass
class RunConfig:
    output: str | None = None
    resume: bool = True  # go on from the last checkpoint under output
    seed: int = 3407
    mixed_precision: Literal["no", "bf16"] = "no"  # autocast; the weights stay float32
    num_threads: int = 0  # CPU threads of this process; 0 leaves torch's choice
    deterministic: bool = False  # deterministic CUDA kernels, for exact resume on GPUs
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 2
    log_every: int = 50
    sample_every: int = 10_000  # 0: never
    samples: int = 4
    sampling_steps: int = 250
    sample_fps: float = 8.0
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"


@dataclass
class Config:
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig

    def flat(self) -> dict:
        """All options in one dictionary, as they stand in a YAML file."""
        return {key: value for part in dataclasses.asdict(self).values() for key, value in part.items()}


def parse_config(argv: list[str]) -> Config:
    """Dataclass defaults, overridden by --config FILE.yaml, overridden by the command line."""
    parser = HfArgumentParser([ModelConfig, DataConfig, OptimConfig, RunConfig], description=__doc__)
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
            if isinstance(known[key].default, float) and isinstance(value, int | str):
                values[key] = float(value)  # YAML reads 1e-4 as text
        if isinstance(values.get("transformer_config"), dict):
            values["transformer_config"] = json.dumps(values["transformer_config"])
        parser.set_defaults(**values)
        base = config_file.parent
    *parts, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    config = Config(*parts)
    for patterns in (config.data.include, config.data.exclude):
        patterns[:] = vdata.expand_patterns(patterns, base)
    for name in ("data", "vae", "output"):
        if config.flat()[name] is None:
            raise ValueError(f"--{name} is required")
    if config.model.latent_statistics == "data" and config.data.latent_cache is None:
        raise ValueError("latent_statistics is 'data', which only a latent_cache has: give --latent_cache or take 'vae'")
    return config


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


class Trainer:
    """One run: what is trained, on what, and how far it got."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.output = Path(config.run.output)
        optim, data = config.optim, config.data
        total = optim.batch_size * optim.gradient_accumulation_steps * accelerator.num_processes
        side, frames = data.resolution, data.num_frames
        self.bucket = vdata.Bucket(side, side, frames, data.fps, 1.0, total, optim.batch_size)
        self.plan = vdata.ClipPlan([self.bucket], config.run.seed)
        self.files = vdata.find_files(data.data, data.include, data.exclude)
        self.health = vdata.ReadHealth(data.max_unreadable)
        self.vae = self.load_vae()
        self.cache = self.prepare_cache() if data.latent_cache else None
        if config.model.latent_statistics == "data":
            statistics = {"latents_mean": self.cache.latents_mean, "latents_std": self.cache.latents_std}
            self.vae.register_to_config(**statistics)
        self.classes = self.find_classes() if config.model.classes else None

        self.noise_scheduler = latte_scheduler(optim.num_train_timesteps)
        self.schedule = diffusion_schedule(self.noise_scheduler)
        model = self.build_model()
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            weight_decay=optim.weight_decay,
        )
        self.lr_scheduler = get_scheduler(
            optim.lr_scheduler, self.optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=optim.steps
        )
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.ema = EMAModel(self.model.parameters(), decay=optim.ema_decay, foreach=True)
        accelerator.register_save_state_pre_hook(self.save_ema)
        accelerator.register_load_state_pre_hook(self.load_ema)
        self.step = 0
        self.pending: dict[str, list[float]] = {}

    # ------------------------------------------------------------------------------------------- what it is made of

    def load_vae(self) -> AutoencoderKLVCVAE:
        """The frozen VAE, on the device only where every step encodes."""
        model = self.config.model
        vae = AutoencoderKLVCVAE.from_pretrained(model.vae, subfolder=model.vae_subfolder).eval().requires_grad_(False)
        return vae.to(self.accelerator.device)

    def dataset(self) -> vdata.ClipDataset:
        data = self.config.data
        return vdata.ClipDataset(
            self.files, [self.bucket], self.config.run.seed, scale_jitter=data.scale_jitter, flip=data.flip
        )

    def prepare_cache(self) -> latent_cache.LatentCache:
        """Encode what the cache lacks, each process its share of the shards, and open it."""
        data, accelerator = self.config.data, self.accelerator
        folder = Path(data.latent_cache)
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
        settings = {name: getattr(data, name) for name in names}
        settings |= {"seed": self.config.run.seed, "vae": latent_cache.vae_fingerprint(self.vae), "files": len(self.files)}
        if accelerator.is_main_process:
            latent_cache.claim_folder(folder, settings)
        accelerator.wait_for_everyone()
        missing = latent_cache.missing_shards(folder, data.cache_clips, data.cache_shard_clips)
        accelerator.wait_for_everyone()
        for done, shard in enumerate(missing[accelerator.process_index :: accelerator.num_processes]):
            batches = latent_cache.shard_batches(shard, data.cache_clips, data.cache_shard_clips, data.cache_batch_size)
            path = latent_cache.shard_path(folder, shard)
            dtype = getattr(torch, data.cache_dtype)
            latent_cache.write_shard(self.vae, self.dataset(), list(batches), path, dtype, self.health, data.num_workers)
            logger.info("encoded shard %d, %d of %d missing ones here", shard, done + 1, len(missing))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            latent_cache.write_index(folder)
        accelerator.wait_for_everyone()
        self.vae.to("cpu")  # from here on it only decodes samples
        return latent_cache.LatentCache(folder, self.config.run.seed)

    def find_classes(self) -> list[str]:
        """Names of the classes, sorted: folders of the files, or of the cached clips."""
        if self.cache is not None:
            return sorted({latent_cache.class_of(clip) for clip in self.cache.clips()})
        return sorted({Path(file).parent.name for file in self.files})

    def build_model(self) -> LatteAdaLNTransformer3DModel:
        """The denoiser for the geometry of these latents, from a trained one where given."""
        config, data, vae = self.config.model, self.config.data, self.vae
        side = data.resolution // vae.spatial_compression_ratio
        geometry = {
            "in_channels": vae.config.latent_channels,
            "sample_size": side,
            "video_length": -(-data.num_frames // vae.temporal_compression_ratio),
            "num_classes": None if self.classes is None else len(self.classes),
            "class_dropout_prob": config.class_dropout_prob,
        }
        if config.init_from:
            model = LatteAdaLNTransformer3DModel.from_pretrained(config.init_from).train()
            for name in ("in_channels", "sample_size", "video_length", "num_classes"):
                if model.config[name] != geometry[name]:
                    raise ValueError(
                        f"init_from={config.init_from} has {name} {model.config[name]}, the data {geometry[name]}"
                    )
        else:
            torch.manual_seed(self.config.run.seed)  # whatever was encoded before
            options = {**latte_size_config(config.size), **geometry, **json.loads(config.transformer_config)}
            model = LatteAdaLNTransformer3DModel(**options)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile_repeated_blocks()
        return model

    # -------------------------------------------------------------------------------------------- the training step

    def train_step(self, batches: list[dict]) -> dict[str, float]:
        """One optimizer step on the micro-batches of a step."""
        accelerator, optim = self.accelerator, self.config.optim
        totals: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(batches):
            accelerator.sync_gradients = index == len(batches) - 1
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(self.model):
                terms = self.loss(batch)
                self.require_finite(terms.loss, batch)
                accelerator.backward(terms.loss / len(batches))
            for name, value in terms._asdict().items():
                totals[name] = totals.get(name, 0) + value.detach() / len(batches)
        limit = optim.max_grad_norm if self.step >= optim.clip_after else float("inf")
        totals["grad_norm"] = accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self.require_finite(totals["grad_norm"], *batches)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        self.step += 1
        values = torch.stack([torch.as_tensor(value, device=accelerator.device).float() for value in totals.values()])
        return dict(zip(totals, accelerator.reduce(values, "mean").tolist(), strict=True))

    def loss(self, batch: dict) -> DiffusionLoss:
        """Noise the batch's latents and compare what the model makes of them."""
        posteriors = self.posteriors(batch)
        latents, timesteps, noise = draw(posteriors, batch["noise_seeds"], self.config.optim.num_train_timesteps)
        latents = normalize_latents(self.vae, latents)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        output = self.model(noisy, timesteps, class_labels=self.labels(batch), return_dict=False)[0]
        gamma = self.config.optim.min_snr_gamma
        weight = min_snr_weight(timesteps, self.schedule, gamma) if gamma > 0 else None
        return learned_range_loss(output, latents, noise, timesteps, self.schedule, weight)

    @torch.no_grad()
    def posteriors(self, batch: dict) -> torch.Tensor:
        """Mean and log-variance (B, 2C, t, h, w), from the cache or encoded now."""
        if self.cache is not None:
            return batch["posterior"].to(self.accelerator.device, non_blocking=True)
        posterior = self.vae.encode(batch["video"].to(self.accelerator.device, non_blocking=True)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def labels(self, batch: dict) -> torch.Tensor | None:
        if self.classes is None:
            return None
        labels = [self.classes.index(latent_cache.class_of(clip)) for clip in batch["clips"]]
        return torch.tensor(labels, device=self.accelerator.device)

    def require_finite(self, value: torch.Tensor, *batches: dict) -> None:
        """Stop all processes before any weight changes, naming the clips, when a loss or gradient norm is not finite."""
        value = torch.as_tensor(value).detach()
        finite = bool(torch.isfinite(value).all())
        if training.any_process(self.accelerator, not finite):
            clips = ", ".join(clip for batch in batches for clip in batch["clips"])
            where = f"step {self.step}: loss or gradient is {float(value)}" if not finite else "another process"
            raise training.NonFiniteError(f"non-finite value, {where}; clips: {clips}; no weight was changed")

    # ------------------------------------------------------------------------------------------------------- samples

    def pipeline(self) -> LatteVCVAEUnconditionalPipeline:
        """The pipeline of the current weights."""
        model = self.accelerator.unwrap_model(self.model)
        scheduler = latte_scheduler(self.config.optim.num_train_timesteps)
        pipeline = LatteVCVAEUnconditionalPipeline(self.vae, model, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def sample(self) -> None:
        """Write videos of the averaged weights side by side to samples/, and show their frames in the tracker.

        The noise is the same every time, and the random state of training is not touched.
        """
        run = self.config.run
        if self.accelerator.is_main_process:
            generators = [torch.Generator().manual_seed(run.seed + index) for index in range(run.samples)]
            labels = None if self.classes is None else [index % len(self.classes) for index in range(run.samples)]
            self.vae.to(self.accelerator.device)
            model = self.accelerator.unwrap_model(self.model).eval()
            with training.ema_weights(self.ema, self.model):
                video = self.pipeline()(
                    run.samples,
                    labels,
                    num_frames=self.config.data.num_frames,
                    num_inference_steps=run.sampling_steps,
                    generator=generators,
                    output_type="pt",
                ).frames
            model.train()
            if self.cache is not None:
                self.vae.to("cpu")
            self.show(torch.cat(list(video.cpu()), dim=3).transpose(0, 1))
        self.accelerator.wait_for_everyone()

    def show(self, video: torch.Tensor) -> None:
        """Write one video (3, T, H, W) in [0, 1], and log its frames as images."""
        folder = self.output / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with VideoWriter(folder / f"step-{self.step:08d}.mp4", fps=self.config.run.sample_fps) as writer:
            writer.write(video * 2 - 1)
        frames = (video.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": frames}, step=self.step, **options)

    # -------------------------------------------------------------------------------------------------- the whole run

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, up to config.optim.steps."""
        run, accelerator, steps = self.config.run, self.accelerator, self.config.optim.steps
        checkpoints = self.output / "checkpoints"
        torch.manual_seed(run.seed + accelerator.process_index)  # only the dropping of labels draws from it
        existing = training.list_checkpoints(checkpoints) if run.resume else []
        if existing:
            self.restore(training.load_checkpoint(accelerator, self.model, None, existing[-1]))
            logger.info("resumed from %s", existing[-1])
        log = training.JsonlLog(self.output / "log.jsonl", self.step) if accelerator.is_main_process else None
        stop = training.StopSignal()
        started = time.perf_counter()
        for batches in self.steps():
            for name, value in self.train_step(batches).items():
                self.pending.setdefault(name, []).append(value)
            done = self.step == steps
            stopping = training.any_process(accelerator, stop.requested)
            if self.step % run.log_every == 0 or done:
                self.report(started, log)
            if run.sample_every and (self.step % run.sample_every == 0 or done):
                self.sample()
            if self.step % run.checkpoint_every == 0 or done or stopping:
                self.save(checkpoints, must=done or stopping)
            if stopping:
                logger.warning("stopped at step %d; the same command goes on from there", self.step)
                break
        stop.restore()
        if self.step == steps and accelerator.is_main_process:
            with training.ema_weights(self.ema, self.model):
                self.pipeline().save_pretrained(self.output / "pipeline")

    def steps(self) -> Iterator[list[dict]]:
        """The micro-batches of each step from the current one on."""
        data, accelerator = self.config.data, self.accelerator
        sampler = vdata.ClipBatchSampler(
            self.plan, self.step, self.config.optim.steps, accelerator.process_index, accelerator.num_processes
        )
        loader = DataLoader(
            self.dataset() if self.cache is None else self.cache,
            batch_sampler=sampler,
            collate_fn=vdata.collate if self.cache is None else latent_cache.collate_latents,
            num_workers=data.num_workers,
            worker_init_fn=vdata.quiet_worker,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # or starting to read would draw from the random state that a checkpoint restored
        )
        batches: list[dict] = []
        for batch in loader:
            if self.cache is None:
                self.health.add(batch)
            batches.append(batch)
            if len(batches) == self.config.optim.gradient_accumulation_steps:
                yield batches
                batches = []

    def report(self, started: float, log: training.JsonlLog | None) -> None:
        """Means since the last report, to the JSON log, the tracker and the console."""
        row = {name: sum(values) / len(values) for name, values in self.pending.items()}
        row |= {"learning_rate": self.lr_scheduler.get_last_lr()[0], "seconds": round(time.perf_counter() - started, 1)}
        self.pending = {}
        if log is not None:
            log.write({"step": self.step, **row})
            self.accelerator.log(row, step=self.step)
            logger.info("step %d  %s", self.step, "  ".join(f"{name} {value:.4g}" for name, value in row.items()))

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save_ema(self, models: list[torch.nn.Module], weights: list[dict], folder: str) -> None:
        """Write the averaged weights as a model that `from_pretrained` loads; runs inside accelerate's `save_state`."""
        if self.accelerator.is_main_process:
            with training.ema_weights(self.ema, self.model):
                self.accelerator.unwrap_model(self.model).save_pretrained(Path(folder) / "ema", max_shard_size="1TB")

    def load_ema(self, models: list[torch.nn.Module], folder: str) -> None:
        """Read back what `save_ema` wrote; runs inside accelerate's `load_state`."""
        weights = load_file(Path(folder) / "ema" / WEIGHTS_NAME)
        names = [name for name, _ in self.accelerator.unwrap_model(self.model).named_parameters()]
        for name, shadow in zip(names, self.ema.shadow_params, strict=True):
            shadow.copy_(weights[name])

    def save(self, folder: Path, must: bool) -> None:
        """Write a checkpoint. A failed one is reported and training goes on, unless the run ends here (`must`)."""
        state = {
            "step": self.step,
            "pending": self.pending,
            "scheduler": self.lr_scheduler.state_dict(),
            "ema_steps": self.ema.optimization_step,
            "config": self.config.flat(),
            "num_processes": self.accelerator.num_processes,
        }
        try:
            keep = self.config.run.keep_checkpoints
            path = training.save_checkpoint(self.accelerator, self.model, None, state, folder, keep)
            logger.info("saved %s", path)
        except training.CheckpointError as error:
            if must:
                raise
            logger.error("%s; training goes on", error)

    def restore(self, state: dict) -> None:
        """Take over what a checkpoint's state says, and name every option that changed since.

        Raises:
            ValueError: for another number of processes, which would see other clips.
        """
        if state["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"the checkpoint is of {state['num_processes']} processes, this run has {self.accelerator.num_processes}:"
                " launch as many"
            )
        self.step, self.pending = state["step"], state["pending"]
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.ema.optimization_step = state["ema_steps"]
        for name, value in json.loads(json.dumps(self.config.flat())).items():
            if state["config"].get(name) != value:
                logger.warning("option %s was %r, is %r now", name, state["config"].get(name), value)


def main(argv: list[str]) -> None:
    config = parse_config(argv)
    run = config.run
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    if run.deterministic:
        torch.use_deterministic_algorithms(True)
    tracker = None if run.tracker == "none" else run.tracker
    accelerator = Accelerator(mixed_precision=run.mixed_precision, log_with=tracker, project_dir=run.output)
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    Path(run.output).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, accelerator)
    if accelerator.is_main_process:
        (Path(run.output) / "config.yaml").write_text(yaml.safe_dump(config.flat(), sort_keys=False))
    options = {name: value if isinstance(value, int | float) else str(value) for name, value in config.flat().items()}
    accelerator.init_trackers("latte", config=options)
    trainer.run()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
