"""The trainer of the small image VAE that the bundled model is inflated from. Not in the paper."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from ..video import VideoReader, from_uint8
from . import losses, memory
from .checkpoints import ema_weights
from .data import read_list
from .image_vae_options import Config, DataConfig, ModelConfig
from .machine import prepare
from .trainer import Terms, Trainer
from .validation import psnr


def read_frames(path: Path, stride: int, limit: int | None = None, size: int | None = None) -> list[torch.Tensor]:
    """Every `stride`-th frame of a clip as uint8 (3, H, W), at most `limit`; `size` resizes and crops to a square."""
    with VideoReader(path, dtype=torch.uint8, resize=size, crop=size) as reader:
        frames = (frame for chunk in reader for frame in chunk.unbind(1))
        last = None if limit is None else (limit - 1) * stride + 1
        return [frame.clone() for frame in itertools.islice(frames, 0, last, stride)]


def random_crop(frames: list[torch.Tensor], size: int, max_zoom_out: float, rng: torch.Generator) -> torch.Tensor:
    """A (3, size, size) crop in [-1, 1] of a random frame, place and scale, flipped half of the time."""
    uniform = torch.rand(4, generator=rng).tolist()
    frame = frames[int(torch.randint(len(frames), (1,), generator=rng))]
    _, height, width = frame.shape
    side = min(round(size * max_zoom_out ** uniform[0]), height, width)
    top, left = round(uniform[1] * (height - side)), round(uniform[2] * (width - side))
    crop = from_uint8(frame[:, top : top + side, left : left + side])
    if side != size:
        crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(-1) if uniform[3] < 0.5 else crop


def batch_of_step(frames: list[torch.Tensor], config: Config, step: int, rank: int = 0, count: int = 1) -> torch.Tensor:
    """Crops for one of `count` processes: a function of (seed, step, rank), so that a resumed run sees an unbroken one's."""
    rng = torch.Generator().manual_seed(config.run.seed * 1_000_003 + step * count + rank)
    data = config.data
    size = data.sizes[step % len(data.sizes)]
    crops = range(pictures(data, size))
    return torch.stack([random_crop(frames, size, data.max_zoom_out, rng) for _ in crops])


def pictures(data: DataConfig, size: int) -> int:
    """How many crops of a size are as many pixels as `batch_size` of the first size, at least one."""
    return max(1, round(data.batch_size * (data.sizes[0] / size) ** 2))


class ImageVAE(nn.Module):
    """One ``forward`` for encoding, sampling and decoding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(config.channels),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=256,
            scaling_factor=1.0,
        ).to(memory_format=torch.channels_last)

    def forward(self, batch: torch.Tensor, sample: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruction (B, 3, H, W) of a sample, or of the mode, and the posterior's mean and log-variance."""
        posterior = self.vae.encode(batch).latent_dist
        latents = posterior.sample() if sample else posterior.mode()
        return self.vae.decode(latents).sample.float(), posterior.mean.float(), posterior.logvar.float()


class ImageVAETrainer(Trainer):
    """L1 + KL on crops of frames."""

    project, result = "image_vae", "image_vae"
    config: Config

    def __init__(self, config: Config, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.validate_every = config.run.validate_every
        folder = Path(config.data.data)
        trained, held_back = (read_list(config.data.clips, section) for section in ("train", "holdout"))
        self.pictures = [frame for name in trained for frame in read_frames(folder / name, config.data.frame_stride)]
        size = config.run.validation_size
        held_out = [frame for name in held_back for frame in read_frames(folder / name, stride=12, limit=4, size=size)]
        self.held_out = from_uint8(torch.stack(held_out))
        torch.manual_seed(config.run.seed)
        wrapped = ImageVAE(config.model)
        if config.model.compile:
            wrapped.compile(dynamic=False)
        self.main_learner(wrapped)

    def batches(self) -> Iterator[list[dict]]:
        """Crops of this process from the current step on."""
        ranks = (self.accelerator.process_index, self.accelerator.num_processes)
        for step in range(self.step, self.config.optim.steps):
            crops = batch_of_step(self.pictures, self.config, step, *ranks)
            yield [{"images": crops, "clips": [f"crops of step {step}"]}]

    def backward(self, batch: dict, share: float) -> Terms:
        """The loss of one batch."""
        images = batch["images"].to(self.accelerator.device, memory_format=torch.channels_last)
        with self.accumulating(self.model):
            terms = self.terms(self.model, images)
            self.require_finite(terms["loss"], batch)
            self.accelerator.backward(terms["loss"] * share)
        return terms

    def terms(self, model: nn.Module, images: torch.Tensor) -> Terms:
        """L1 and KL of pictures (B, 3, H, W)."""
        reconstruction, mean, logvar = model(images)
        terms = {"l1": losses.l1_loss(reconstruction, images), "kl": losses.kl_loss(mean, logvar)}
        return terms | {"loss": terms["l1"] + self.config.optim.kl_weight * terms["kl"]}

    def frames(self, batches: list[dict]) -> int:
        """Pictures."""
        return sum(len(batch["images"]) for batch in batches)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB of the averaged weights on the held-out frames: posterior mode, mean over frames."""
        with ema_weights(self.ema, self.model):
            self.model.eval()
            values = [
                psnr(self.model(images, sample=False)[0][:, :, None], images[:, :, None])
                for images in self.held_out.to(self.accelerator.device).split(4)
            ]
            self.model.train()
        return {"validation_psnr": torch.cat(values).mean().item()}

    def summary(self) -> dict[str, str]:
        """What is trained on what."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return super().summary() | {
            "model": f"AutoencoderKL, {count:,} parameters",
            "data": f"{len(self.pictures):,} frames to train on, {len(self.held_out)} held out to validate on",
        }

    def loads(self) -> list[memory.Load]:
        """Crops by size."""
        data = self.config.data

        def load(size: int) -> memory.Load:
            return memory.Load(
                f"crops {size}x{size}",
                pictures(data, size),
                size**2,
                lambda count: f"Use --batch_size {max(1, int(count * (size / data.sizes[0]) ** 2))}",
                "Use smaller --sizes, or fewer --channels",
            )

        return [load(size) for size in sorted(set(data.sizes))]

    def trial(self) -> memory.Trial:
        """One crop of the smallest size."""
        model, size = self.accelerator.unwrap_model(self.model), min(self.config.data.sizes)
        image = torch.zeros(1, 3, size, size, device=self.accelerator.device)
        image = image.to(memory_format=torch.channels_last).requires_grad_()
        return memory.Trial(lambda: self.terms(model, image)["loss"], image, size**2, [model])


def train(config: Config) -> int:
    """Train by options; returns the number of the signal that stopped the run, or 0."""
    trainer = ImageVAETrainer(config, prepare(config.run))
    trainer.run()
    return trainer.stopped_by
