"""Train the paper's denoiser, Latte with adaLN-zero blocks, on VC-VAE latents (Sec. A.5, Fig. 7).

    vcvae train latte --config examples/configs/latte_skytimelapse.yaml --data DIR --vae VC_VAE --output runs/latte

Latents are encoded once into --latent_cache, or on the fly without it. Values come from the defaults below, then from the
YAML file, then from the command line. A run that was stopped or killed goes on from its last checkpoint when the same
command is given again, and gives the weights that an unbroken run would give. At the end OUTPUT/pipeline holds the averaged
weights, which examples/sample_latte.py samples from. docs/pipelines.md tells more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..video.suffixes import is_shards
from . import options
from .options import Schedule, option


@dataclass
class ModelConfig:
    """What denoises what."""

    vae: str = option(None, "folder or hub id of the VC-VAE, frozen (required)")
    vae_subfolder: str | None = option(None, "inside of it")
    size: str = option("XL/2", "S, B, L or XL, and the patch size")
    transformer_config: str = option("{}", "JSON, what differs from the size: '{\"num_layers\": 8}'")
    init_from: str | None = option(None, "folder of a trained transformer to start from")
    classes: bool = option(False, "condition on the class, which is the name of a clip's folder (UCF-101)")
    class_dropout_prob: float = option(0.1, "share of labels dropped in training, for guidance")
    latent_statistics: Literal["vae", "data"] = option(
        "vae", "normalise with the VAE's mean and std, or the cached latents'"
    )
    gradient_checkpointing: bool = option(False, "less memory for a third more time")
    compile: bool = option(False, "torch.compile of the blocks")


@dataclass
class DataConfig:
    """What is trained on."""

    data: str = option(
        None, "folder, list file or CSV file of videos, or shards of latents from `vcvae encode --shards` (required)"
    )
    include: list[str] = option([], "names or patterns, or @LIST, or @LIST:SECTION")
    exclude: list[str] = option([], "likewise")
    resolution: int = option(256, "side of the square clips, pixels")
    num_frames: int = option(16, "of a clip")
    fps: float = option(8.0, "0 keeps the video's own rate; 8 is Latte's frame interval 3 of 24 frames a second")
    scale_jitter: float = option(0.0, "0: crops of the whole short side; 1: anything down to native pixels, log-uniform")
    flip: bool = option(False, "mirror half of the clips")
    num_workers: int = option(0, "processes that read clips")
    max_unreadable: float = option(0.5, "stop when a larger part of the videos cannot be read")
    latent_cache: str | None = option(None, "folder of encoded clips, made when it is not there; else every step encodes")
    cache_clips: int = option(10_000, "random clips to encode")
    cache_shard_clips: int = option(256, "of them in a file")
    cache_batch_size: int = option(4, "clips encoded at once")
    cache_dtype: Literal["float16", "float32"] = option("float16", "of the cached posteriors")


@dataclass
class OptimConfig(options.OptimConfig):
    """How it is optimised."""

    steps: int = option(1_000_000, "optimizer steps")
    batch_size: int = option(5, "clips of a process and micro-batch")
    gradient_accumulation_steps: int = option(1, "micro-batches of a step")
    learning_rate: float = option(1e-4, "of the model")
    lr_scheduler: Schedule = option("constant", "of the learning rate, diffusers' get_scheduler")
    max_grad_norm: float = option(0.1, "gradients are scaled down to this norm")
    clip_after: int = option(20_000, "steps before that begins")
    ema_decay: float = option(0.9999, "of the weights' moving average, which is what is sampled from and saved")
    num_train_timesteps: int = option(1000, "of the diffusion")
    min_snr_gamma: float = option(0.0, "weigh the noise's error by min(SNR, gamma) / SNR; 0: all alike, as Latte")


@dataclass
class RunConfig(options.RunConfig):
    """How it runs."""

    seed: int = option(3407, "of weights, clips, crops and noise")
    checkpoint_every: int = option(10_000, "steps between checkpoints")
    log_every: int = option(50, "steps between rows of OUTPUT/log.jsonl")
    sample_every: int = option(10_000, "steps between samples; 0: never")
    samples: int = option(4, "videos side by side")
    sampling_steps: int = option(250, "denoising steps")
    sample_fps: float = option(8.0, "of the files")


@dataclass
class Config(options.Config):
    """All options."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Refuse what cannot be."""
        self.require("data", "vae")
        super().check()
        self.require_json("transformer_config")
        self.at_least_one("batch_size", "gradient_accumulation_steps", "num_frames", "cache_clips", "cache_shard_clips")
        self.at_least_one("resolution", "cache_batch_size", "num_train_timesteps", "samples", "sampling_steps")
        self.at_most_one("scale_jitter", "class_dropout_prob")
        if self.run.sample_fps == 0:
            raise ValueError("--sample_fps is 0, but must be above 0 frames a second")
        stored = is_shards(str(self.data.data))
        if stored and (self.data.latent_cache is not None or self.data.include or self.data.exclude):
            raise ValueError("data names shards of latents, which need no latent_cache and know no include and exclude")
        if self.model.latent_statistics == "data" and self.data.latent_cache is None and not stored:
            raise ValueError("latent_statistics is 'data', which only a latent_cache has: give --latent_cache or take 'vae'")
