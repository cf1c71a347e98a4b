"""Train the small image `AutoencoderKL` from which the bundled VC-VAE is inflated (Flux's shape in small).

    python examples/train_image_vae.py --data CLIPS_FOLDER --clips examples/configs/tiny_clips.txt --output runs/image_vae

The network is diffusers' own `AutoencoderKL`: factor 8, 16 latent channels, no quant convs. Frames of the training clips
are held in memory as uint8; every sample is a random crop at a random scale, flipped half of the time. The loss is L1 + KL,
means over all elements. A run that was stopped goes on from `OUTPUT/checkpoint` when it is started again, and the EMA
weights are written to `OUTPUT/image_vae` as a diffusers folder at every checkpoint.
"""

import argparse
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from vc_vae_diffusers.data import read_list
from vc_vae_diffusers.files import follow_umask

logger = logging.getLogger("train_image_vae")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the clips")
    parser.add_argument("--clips", type=Path, required=True, help="text file with the sections [train] and [holdout]")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--channels", type=int, nargs=4, default=(32, 64, 80, 96), help="block_out_channels")
    parser.add_argument("--layers_per_block", type=int, default=1)
    parser.add_argument("--norm_num_groups", type=int, default=16)
    parser.add_argument("--latent_channels", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch_size", type=int, default=16, help="at the first size; others keep its pixel count")
    parser.add_argument("--sizes", type=int, nargs="+", default=(64, 64, 128), help="sides of the crops, by turns")
    parser.add_argument("--max_zoom_out", type=float, default=2.5, help="crops cover up to this many times their side")
    parser.add_argument("--frame_stride", type=int, default=4, help="keep every n-th frame of a training clip")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--kl_weight", type=float, default=1e-4)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--validate_every", type=int, default=500)
    parser.add_argument("--validation_size", type=int, default=128)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile (1.3 times faster on the CPU it was tried on)")
    parser.add_argument("--num_threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def read_frames(path: Path, stride: int, limit: int | None = None) -> list[torch.Tensor]:
    """Every `stride`-th frame of a clip as uint8 (3, H, W), at most `limit` of them."""
    frames = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % stride == 0:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous())
            if limit is not None and len(frames) == limit:
                break
    return frames


def random_crop(frames: list[torch.Tensor], size: int, max_zoom_out: float, rng: torch.Generator) -> torch.Tensor:
    """A (3, size, size) crop in [-1, 1] of a random frame, place and scale, flipped half of the time."""
    uniform = torch.rand(4, generator=rng).tolist()
    frame = frames[torch.randint(len(frames), (1,), generator=rng).item()]
    _, height, width = frame.shape
    side = min(round(size * max_zoom_out ** uniform[0]), height, width)
    top, left = round(uniform[1] * (height - side)), round(uniform[2] * (width - side))
    crop = frame[:, top : top + side, left : left + side].float() / 127.5 - 1
    if side != size:
        crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(-1) if uniform[3] < 0.5 else crop


def batch_of_step(frames: list[torch.Tensor], args: argparse.Namespace, step: int) -> torch.Tensor:
    """A function of (seed, step) alone, so that a resumed run sees what an unbroken one would."""
    rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    size = args.sizes[step % len(args.sizes)]
    count = max(1, round(args.batch_size * (args.sizes[0] / size) ** 2))
    return torch.stack([random_crop(frames, size, args.max_zoom_out, rng) for _ in range(count)])


def reconstruct(vae: AutoencoderKL, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reconstruction from a posterior sample, and the KL divergence averaged over latent elements."""
    posterior = vae.encode(batch).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return reconstruction, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def validation_images(data: Path, names: list[str], size: int) -> torch.Tensor:
    """Four frames of every held-out clip: short side to `size`, centre crop, (N, 3, size, size) in [-1, 1]."""
    images = []
    for name in names:
        for frame in read_frames(data / name, stride=12, limit=4):
            _, height, width = frame.shape
            scale = size / min(height, width)
            shape = (max(size, round(height * scale)), max(size, round(width * scale)))
            image = F.interpolate(frame[None].float() / 127.5 - 1, shape, mode="bilinear", antialias=True)
            top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
            images.append(image[:, :, top : top + size, left : left + size])
    return torch.cat(images)


@torch.no_grad()
def validation_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean over images of the PSNR in dB (data range 2), posterior mode, output clamped to [-1, 1]."""
    values = []
    for image in images.split(4):
        reconstruction = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
        mse = (reconstruction - image).float().square().mean(dim=(1, 2, 3))
        values.append(10 * torch.log10(4 / mse))
    return torch.cat(values).mean().item()


def build_vae(args: argparse.Namespace) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(args.channels),
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels,
        norm_num_groups=args.norm_num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=256,
        scaling_factor=1.0,
    )


def save_checkpoint(accelerator: Accelerator, ema: EMAModel, vae: AutoencoderKL, output: Path, step: int) -> None:
    """Write the whole training state beside the old one, then swap, so that a crash leaves one of them."""
    fresh, current = output / "checkpoint.tmp", output / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    accelerator.save_state(str(fresh))
    torch.save(ema.state_dict(), fresh / "ema.pt")
    (fresh / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(output / "checkpoint.old", ignore_errors=True)
    if current.exists():
        os.replace(current, output / "checkpoint.old")
    os.replace(fresh, current)
    shutil.rmtree(output / "checkpoint.old", ignore_errors=True)
    ema.store(vae.parameters())
    ema.copy_to(vae.parameters())
    vae.save_pretrained(output / "image_vae.tmp")
    follow_umask(*(output / "image_vae.tmp").glob("*.safetensors"))
    ema.restore(vae.parameters())
    shutil.rmtree(output / "image_vae", ignore_errors=True)
    os.replace(output / "image_vae.tmp", output / "image_vae")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    set_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)

    trained, held_back = (read_list(args.clips, section) for section in ("train", "holdout"))
    frames = [f for name in trained for f in read_frames(args.data / name, args.frame_stride)]
    held_out = validation_images(args.data, held_back, args.validation_size)
    logger.info("%d training frames of %d clips, %d held-out images", len(frames), len(trained), len(held_out))

    vae = build_vae(args).to(memory_format=torch.channels_last)
    ema = EMAModel(vae.parameters(), decay=args.ema_decay, use_ema_warmup=False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.steps)
    vae, optimizer, schedule = accelerator.prepare(vae, optimizer, schedule)
    start = 0
    if (args.output / "checkpoint.old").exists() and not (args.output / "checkpoint").exists():
        os.replace(args.output / "checkpoint.old", args.output / "checkpoint")  # killed between the two renames
    if (args.output / "checkpoint").exists():
        accelerator.load_state(str(args.output / "checkpoint"))
        ema.load_state_dict(torch.load(args.output / "checkpoint" / "ema.pt", weights_only=True))
        start = json.loads((args.output / "checkpoint" / "step.json").read_text())["step"]
        logger.info("resumed at step %d", start)

    forward = torch.compile(reconstruct, dynamic=False) if args.compile else reconstruct
    began = time.time()
    for step in range(start, args.steps):
        batch = batch_of_step(frames, args, step).to(accelerator.device, memory_format=torch.channels_last)
        with accelerator.autocast():
            reconstruction, kl = forward(vae, batch)
        l1 = (reconstruction - batch).abs().mean()
        loss = l1 + args.kl_weight * kl
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}: lower --learning_rate")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(vae.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())

        done = step + 1
        record = {"step": done, "l1": l1.item(), "kl": kl.item(), "seconds": round(time.time() - began, 1)}
        if done % args.validate_every == 0 or done == args.steps:
            ema.store(vae.parameters())
            ema.copy_to(vae.parameters())
            with accelerator.autocast():
                record["psnr"] = validation_psnr(vae, held_out.to(accelerator.device))
            ema.restore(vae.parameters())
            save_checkpoint(accelerator, ema, accelerator.unwrap_model(vae), args.output, done)
        if done % 50 == 0:
            with open(args.output / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            logger.info(" ".join(f"{k} {v:.5g}" for k, v in record.items()))


if __name__ == "__main__":
    main()
