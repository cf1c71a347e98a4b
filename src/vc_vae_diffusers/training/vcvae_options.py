"""Train VC-VAE, or fine-tune any diffusers video VAE, by the paper's two-stage recipe (Sec. 4.1, Table 7).

    vcvae train vcvae --config examples/configs/stage1.yaml --model VAE --data DIR --output DIR
    accelerate launch examples/train_vcvae.py --config examples/configs/stage1.yaml --model VAE --data DIR --output DIR

Values come from the defaults below, then from the YAML file, then from the command line. A run that was stopped, killed or
interrupted goes on from its last checkpoint when the same command is given again, and gives the weights that an unbroken run
would give. docs/training.md tells more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from . import options
from .options import option


@dataclass
class ModelConfig:
    """Exactly one of model, from_image_vae and model_config."""

    model: str | None = option(None, "folder or hub id of a VC-VAE or of any diffusers video VAE")
    from_image_vae: str | None = option(None, "folder, file or hub id of an image VAE to inflate (Sec. 3.2)")
    model_config: str | None = option(None, "JSON file of a VC-VAE configuration, to train from random weights")
    subfolder: str | None = option(None, "of model or from_image_vae")
    model_options: str = option("{}", 'JSON, configuration of the inflated model: \'{"temporal_operator": "conv"}\'')
    train: str = option("encoder,decoder", "parts that learn")
    gradient_checkpointing: bool = option(False, "half the memory for a third more time")
    channels_last: bool = option(False, "channels_last_3d weights and clips")
    compile: bool = option(False, "torch.compile of encoder, decoder and discriminator, once for each shape of a bucket")


@dataclass
class DataConfig:
    """What is trained on."""

    data: str = option(None, "folder, list file, CSV file, or webdataset shards 'shards-{0000..0127}.tar' (required)")
    include: list[str] = option([], "names or patterns, or @LIST, or @LIST:SECTION")
    exclude: list[str] = option([], "likewise")
    holdout: list[str] = option([], "likewise: never trained on; validation reads these")
    validation_data: str | None = option(None, "a folder or list of its own for validation, instead of holdout")
    buckets: list[str] = option(["size=256 frames=16 fps=24 batch=8"], "shapes of clips, one text each; docs/training.md")
    scale_jitter: float = option(0.0, "0: crops of the whole short side; 1: anything down to native pixels, log-uniform")
    flip: bool = option(True, "mirror half of the clips")
    cache_in_memory: bool = option(False, "keep decoded clips as uint8: for small collections and num_workers=0")
    cache_short_side: int | None = option(None, "shrink what is cached to this short side")
    num_workers: int = option(0, "processes that read clips")
    max_unreadable: float = option(0.5, "stop when a larger part of the videos cannot be read")
    shuffle_buffer: int = option(256, "samples held for shuffling, shards only")


@dataclass
class LossConfig:
    """Means over all elements; L1 has weight 1 (Table 7)."""

    lpips_weight: float = option(0.1, "of the perceptual loss")
    lpips_net: Literal["vgg", "alex"] = option("vgg", "its network")
    lpips_frames: int = option(0, "frames of a clip drawn for LPIPS; 0 takes all")
    kl_weight: float = option(1e-8, "of the KL divergence from N(0, 1)")
    gan_weight: float = option(0.0, "of the adversarial loss; 0: no discriminator")
    gan_start: int = option(0, "first step with the discriminator")
    gan_warmup_steps: int = option(0, "steps over which the generator's GAN weight then rises to gan_weight")
    adaptive_gan_weight: bool = option(False, "VQGAN's ratio of gradient norms on top of gan_weight")
    lecam_weight: float = option(0.0, "of LeCam regularisation of the discriminator")
    discriminator_channels: int = option(64, "of its first layer")
    discriminator_layers: int = option(3, "that halve height and width")


@dataclass
class OptimConfig(options.OptimConfig):
    """How it is optimised."""

    discriminator_learning_rate: float | None = option(None, "learning_rate if not given")


@dataclass
class RunConfig(options.RunConfig):
    """How it runs."""

    validate_every: int = option(1000, "steps between validations; 0: never")
    validation_size: int = option(256, "short side and crop of the held-out clips")
    validation_frames: int = option(16, "their length")
    validation_clips: int = option(64, "at most so many")
    validation_videos: int = option(4, "of so many, source and reconstruction are written and shown")
    benchmark_loader: int = option(0, "read this many steps of clips, print the throughput, train nothing")


@dataclass
class Config(options.Config):
    """All options."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Refuse what cannot be."""
        self.require("data")
        super().check()
        self.require_json("model_options")
        self.at_least_one("validation_size", "validation_frames", "validation_clips", "shuffle_buffer")
        self.at_least_one("discriminator_channels", "discriminator_layers")
        self.at_most_one("scale_jitter")
        given = [name for name in ("model", "from_image_vae", "model_config") if getattr(self.model, name)]
        if len(given) != 1:
            what = " and ".join(f"--{name}" for name in given) or "none of them"
            raise ValueError(f"give exactly one of --model, --from_image_vae and --model_config; there is {what}")
        from .clip_plan import parse_buckets  # which loads PyTorch: after all that fails sooner

        parse_buckets(self.data.buckets)
