"""Train the small image `AutoencoderKL` from which the bundled VC-VAE is inflated (Flux's shape in small).

    vcvae train image-vae --data CLIPS_FOLDER --clips examples/configs/tiny_clips.txt --output runs/image_vae

The network is diffusers' own `AutoencoderKL`: factor 8, 16 latent channels, no quant convs. Frames of the training clips
are held in memory as uint8; every sample is a random crop at a random scale, flipped half of the time. The loss is L1 + KL,
means over all elements. A run that was stopped goes on from its last checkpoint when it is started again; at the end
`OUTPUT/image_vae` holds the averaged weights as a diffusers folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from . import options
from .options import Schedule, Tracker, option


@dataclass
class ModelConfig:
    """The network."""

    channels: list[int] = option([32, 64, 80, 96], "of its four stages")
    layers_per_block: int = option(1, "residual blocks of a stage")
    norm_num_groups: int = option(16, "of its normalisations")
    latent_channels: int = option(16, "of the latents")
    compile: bool = option(False, "torch.compile (1.3 times faster on the CPU it was tried on)")


@dataclass
class DataConfig:
    """What is trained on."""

    data: str = option(None, "folder that holds the clips (required)")
    clips: str = option(None, "text file with the sections [train] and [holdout] (required)")
    batch_size: int = option(16, "pictures of a process at the first size; others keep its pixel count")
    sizes: list[int] = option([64, 64, 128], "sides of the crops, by turns")
    max_zoom_out: float = option(2.5, "crops cover up to this many times their side")
    frame_stride: int = option(4, "keep every n-th frame of a training clip")


@dataclass
class OptimConfig(options.OptimConfig):
    """How it is optimised."""

    steps: int = option(12_000, "optimizer steps")
    learning_rate: float = option(1e-3, "of the model")
    lr_scheduler: Schedule = option("cosine", "of the learning rate, diffusers' get_scheduler")
    warmup_steps: int = option(200, "steps over which the learning rate rises")
    adam_beta2: float = option(0.99, "AdamW's decay of the gradients' squares' mean")
    kl_weight: float = option(1e-4, "of the KL divergence from N(0, 1)")


@dataclass
class RunConfig(options.RunConfig):
    """How it runs."""

    checkpoint_every: int = option(500, "steps between checkpoints")
    log_every: int = option(50, "steps between rows of OUTPUT/log.jsonl")
    tracker: Tracker = option("none", "where figures go besides log.jsonl")
    validate_every: int = option(500, "steps between validations; 0: never")
    validation_size: int = option(128, "short side and crop of the held-out frames")


@dataclass
class Config(options.Config):
    """All options."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Refuse what cannot be."""
        self.require("data", "clips")
        super().check()
        self.at_least_one("batch_size", "frame_stride", "validation_size", "layers_per_block", "latent_channels")
        self.at_least_one("norm_num_groups", "max_zoom_out")
        channels, groups = self.model.channels, self.model.norm_num_groups
        if len(channels) != 4 or any(width < 1 or width % groups for width in channels):
            raise ValueError(f"--channels are {channels}, but must be four multiples of --norm_num_groups, {groups}")
        if not self.data.sizes or any(size < 8 or size % 8 for size in self.data.sizes):
            raise ValueError(f"--sizes are {self.data.sizes}, but must be multiples of 8 pixels, the network's compression")
        if self.run.validation_size % 8:
            raise ValueError(f"--validation_size is {self.run.validation_size}, but must be a multiple of 8 pixels")
