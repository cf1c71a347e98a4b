"""Train the image VAE or the VC-VAE of the bundled model in minutes of one GPU.

    python examples/train_bundled_gpu.py image --data CLIPS_FOLDER --output runs/image --seconds 240
    python examples/train_bundled_gpu.py video --data CLIPS_FOLDER --output runs/video --from_image_vae runs/image/vae

What `train_image_vae.py` and `train_vcvae.py` do for any data and machine, this does for a small model and few clips, where
reading, augmenting and launching would cost more than the network: decoded clips lie on the device as bytes, at several
sizes, crops are gathered there, a whole step is one CUDA graph, and the learning rate follows the clock. Kernels are
optimised by Muon (`--optimizer adam` for the control). The loss is L1 + LPIPS + KL (+ MSE), means over all elements. It runs
on a CPU too, slowly. The averaged weights are left in `OUTPUT/vae`, figures in `OUTPUT/log.jsonl`. The same command again
goes on from the last validation (`OUTPUT/state.safetensors`), or does nothing if the run was finished.
"""

import argparse
import json
import logging
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.files import whole_file, write_whole
from vc_vae_diffusers.operators.evaluation.stacked import Stacked
from vc_vae_diffusers.operators.tdc import TemporalConv3d
from vc_vae_diffusers.training import losses
from vc_vae_diffusers.training.clip_plan import Bucket, ClipPlan, parse_buckets
from vc_vae_diffusers.training.data import read_list
from vc_vae_diffusers.training.device_clips import ClipStore, shrink
from vc_vae_diffusers.training.muon import MuonAdam
from vc_vae_diffusers.video.reading import VideoReader

logger = logging.getLogger("train_bundled_gpu")
STATE = "state.safetensors"
CLIPS = Path(__file__).parent / "configs" / "tiny_clips.txt"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("image", "video"))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the clips")
    parser.add_argument("--clips", type=Path, default=CLIPS, help="text file with the sections [train] and [holdout]")
    parser.add_argument("--extra", type=Path, help="folder of further pictures and clips to train on")
    parser.add_argument("--frame_stride", type=int, default=1, help="keep every n-th frame of a training clip")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--from_image_vae", help="video: the image VAE to inflate")
    parser.add_argument("--model", help="go on from this model instead")
    parser.add_argument("--channels", type=int, nargs=4, default=(16, 32, 80, 112), help="image: block_out_channels")
    parser.add_argument("--layers_per_block", type=int, default=1, help="image")
    parser.add_argument("--norm_num_groups", type=int, default=4, help="image; one channel a group loses contrast")
    parser.add_argument(
        "--buckets", nargs="+", default=("size=128 frames=1 fps=0 batch=32",), help="as those of train_vcvae.py, with fps=0"
    )
    parser.add_argument(
        "--sides", type=int, nargs="+", default=(288, 256, 208, 160, 128), help="short sides clips are kept at"
    )
    parser.add_argument("--steps", type=int, help="stop after so many steps; else by --seconds")
    parser.add_argument("--seconds", type=float, default=240.0, help="of training, compilation not counted")
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=float, default=0.02, help="part of the run in which the rate rises")
    parser.add_argument("--decay", type=float, default=0.4, help="part of the run in which the rate falls to zero")
    parser.add_argument("--lpips_weight", type=float, default=0.1)
    parser.add_argument("--lpips_frames", type=int, default=2, help="of a clip, drawn anew at every step")
    parser.add_argument("--lpips_images", type=int, default=32, help="image: of a batch")
    parser.add_argument("--mse_weight", type=float, default=4.0)
    parser.add_argument("--kl_weight", type=float, default=1e-6)
    parser.add_argument("--static", type=float, default=0.1, help="video: part of the clips that stand still")
    parser.add_argument("--color_jitter", type=float, default=0.3, help="part of the clips whose colours are changed")
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--validate_every", type=float, default=60.0, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------------------- data


def read_clips(folder: Path, names: Sequence[str]) -> list[torch.Tensor]:
    """Whole clips, or pictures, as bytes `(T, H, W, 3)`."""
    clips = []
    for name in names:
        with VideoReader(folder / name, dtype=torch.uint8) as reader:
            clips.append(torch.cat(list(reader), dim=1).movedim(0, -1).contiguous())
    return clips


def validation_batch(clips: Sequence[torch.Tensor], size: int, frames: int = 16) -> torch.Tensor:
    """The first frames of clips, short side to `size`, cut from the centre: `(N, 3, T, size, size)` in [-1, 1]."""
    videos = []
    for clip in clips:
        small = shrink(clip[:frames], size)
        top, left = ((edge - size) // 2 for edge in small.shape[1:3])
        videos.append(small[:, top : top + size, left : left + size].movedim(-1, 0))
    return torch.stack(videos).float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------------------- model


def build_model(args: argparse.Namespace) -> nn.Module:
    """The image VAE of the shape asked for, or the VC-VAE that an image VAE inflates to.

    Raises:
        ValueError: if the video stage has nothing to begin with.
    """
    if args.stage == "image":
        if args.model:
            return AutoencoderKL.from_pretrained(args.model)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(args.channels),
            layers_per_block=args.layers_per_block,
            latent_channels=16,
            norm_num_groups=args.norm_num_groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=256,
            scaling_factor=1.0,
        )
    if args.model:
        return AutoencoderKLVCVAE.from_pretrained(args.model)
    if not args.from_image_vae:
        raise ValueError("the video stage begins with --from_image_vae or --model: name one")
    return AutoencoderKLVCVAE.from_image_vae(args.from_image_vae)


class Codec:
    """Encoder and decoder of either model on clips `(B, 3, T, H, W)`, compiled apart; of an image VAE frame by frame."""

    def __init__(self, vae: nn.Module, compiled: bool):
        video = isinstance(vae, AutoencoderKLVCVAE)
        encode, decode = vae.encoder, vae.decoder
        if video:
            encode, decode = (lambda x: vae.encoder(x)[0]), (lambda z: vae.decoder(z)[0])
        if compiled:
            encode, decode = torch.compile(encode, dynamic=False), torch.compile(decode, dynamic=False)
        self.video, self.encode_frames, self.decode_frames = video, encode, decode

    def posterior(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, float32."""
        moments = self.encode_frames(
            video.contiguous(memory_format=torch.channels_last_3d) if self.video else frames_of(video)
        )
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: torch.Tensor, clips: int) -> torch.Tensor:
        frames = self.decode_frames(latents)
        return frames if self.video else frames.unflatten(0, (clips, -1)).transpose(1, 2)


def frames_of(video: torch.Tensor) -> torch.Tensor:
    """`(B, C, T, H, W)` as `(B * T, C, H, W)`, channels last."""
    return video.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


class Objective:
    """The loss and its terms on a batch."""

    def __init__(self, codec: Codec, lpips: losses.LPIPS | None, args: argparse.Namespace, compiled: bool):
        self.codec, self.args = codec, args
        self.distance = lpips and (torch.compile(lpips.per_frame, dynamic=False) if compiled else lpips.per_frame)

    def __call__(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and L1, MSE, LPIPS and KL as one tensor."""
        args = self.args
        mean, logvar = self.codec.posterior(video)
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        error = (reconstruction := self.codec.decode(latents, len(video)).float()) - video
        l1, mse = error.abs().mean(), error.square().mean()
        kl = losses.kl_loss(mean, logvar)
        loss = l1 + args.kl_weight * kl + args.mse_weight * mse
        perceptual = torch.zeros_like(l1)
        if self.distance is not None:
            pair = reconstruction, video
            if args.stage == "image":
                pair = tuple(part[: args.lpips_images] for part in pair)
            elif args.lpips_frames < video.shape[2]:
                drawn = torch.rand(video.shape[2], device=video.device).argsort()[: args.lpips_frames]
                pair = tuple(part.index_select(2, drawn) for part in pair)
            perceptual = self.distance(*(part.contiguous(memory_format=torch.channels_last_3d) for part in pair)).mean()
            loss = loss + args.lpips_weight * perceptual
        return loss, torch.stack([l1, mse, perceptual, kl]).detach()


class Trainer:
    """Everything that a step changes, and the step."""

    def __init__(self, vae: nn.Module, objective: Objective, args: argparse.Namespace):
        device = torch.device(args.device)
        self.vae, self.objective, self.args, self.device = vae, objective, args, device
        self.parameters = [p for p in vae.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.learning_rate = torch.zeros((), device=device)
        self.optimizer = MuonAdam(self.parameters, args.optimizer == "muon", self.learning_rate)
        self.terms = torch.zeros(5, device=device)  # L1, MSE, LPIPS, KL, norm of the gradients, summed up

    def step(self, video: torch.Tensor) -> None:
        """Loss, gradients, optimizer, average. Nothing leaves the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            loss, terms = self.objective(video)
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = self.optimizer.step(gradients)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.args.ema_decay)
        self.terms += torch.cat([terms, norm[None]])

    def graphed(self, example: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """The step as a CUDA graph for batches of one shape; on a CPU the step itself. It runs on `example` a few times."""
        if self.device.type != "cuda":
            return self.step
        static = example.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.step(static)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(static)

        def replay(video: torch.Tensor) -> None:
            static.copy_(video)
            graph.replay()

        return replay

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def means(self, count: int) -> dict[str, float]:
        """The terms of the last `count` steps, which are forgotten."""
        values = (self.terms / count).tolist()
        self.terms.zero_()
        return dict(zip(("l1", "mse", "lpips", "kl", "norm"), values, strict=True))

    def save_and_validate(self, held_out: Sequence[torch.Tensor], lpips, last: bool) -> dict[str, float]:
        """Write the averaged weights, and measure them at 128 pixels, the last ones at 256, too."""
        self.swap_average()
        self.vae.eval()
        self.vae.save_pretrained(self.args.output / "vae")
        codec, scores = Codec(self.vae, compiled=False), {}
        for size in (128, 256) if last else (128,):
            scores |= validate(codec, held_out, size, self.device, lpips)
        self.vae.train()
        self.swap_average()
        return scores

    def state(self) -> dict[str, torch.Tensor]:
        """All that a step changes, by name."""
        optimizer = self.optimizer
        lists = {"weight": self.parameters, "average": self.average, "first": optimizer.first, "second": optimizer.second}
        named = {f"{name}.{number}": value for name, values in lists.items() for number, value in enumerate(values)}
        return {**named, "count": optimizer.count}

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange weights and averaged weights."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)


@torch.no_grad()
def validate(codec: Codec, clips: Sequence[torch.Tensor], size: int, device: torch.device, lpips=None) -> dict[str, float]:
    """PSNR, and LPIPS if given, of the posterior's mode: mean over frames, then clips."""
    scores = []
    for video in validation_batch(clips, size).to(device).split(1):
        reconstruction = codec.decode(codec.posterior(video)[0], 1).float().clamp(-1, 1)
        mse = (reconstruction - video).square().mean(dim=(1, 3, 4))
        scores.append([(10 * torch.log10(4 / mse)).mean()] + ([lpips(reconstruction, video)] if lpips is not None else []))
    means = torch.tensor(scores).mean(0).tolist()
    return dict(zip((f"psnr_{size}", f"lpips_{size}"), means, strict=False))


# -------------------------------------------------------------------------------------------------------------- going on


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0

    def part(self, args: argparse.Namespace) -> float:
        """Of the whole run, 1 at its end."""
        return self.step / args.steps if args.steps else self.seconds / args.seconds


# What may change between the parts of a run.
_FREE = ("data", "clips", "extra", "output", "from_image_vae", "model", "validate_every", "device", "no_compile")


def settings(args: argparse.Namespace) -> dict:
    """What a run that goes on must agree on."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name not in _FREE}))


def spelled(name: str, value: Any) -> str:
    """An option as it is given."""
    values = value if isinstance(value, list) else [value]
    return f"no --{name}" if value is None else f"--{name} {shlex.join(map(str, values))}"


def saved_progress(args: argparse.Namespace) -> Progress:
    """How far the run of this folder came.

    Raises:
        ValueError: if it was made with other options, or its state is damaged.
    """
    path = args.output / STATE
    if not path.exists():
        return Progress()
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the run begins anew") from error
    before, now = json.loads(told["settings"]), settings(args)
    if changed := [spelled(name, before.get(name)) for name in now if before.get(name) != now[name]]:
        raise ValueError(
            f"--output {args.output} holds a run with {', '.join(changed)}: go on with these, or take another folder"
        )
    return Progress(int(told["step"]), float(told["seconds"]))


def save_state(trainer: Trainer, progress: Progress) -> None:
    """Write what the run needs to go on."""
    state = {name: value.detach().cpu().contiguous() for name, value in trainer.state().items()}
    state["rng"] = torch.get_rng_state()
    if trainer.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(trainer.device)
    told = {"step": str(progress.step), "seconds": str(progress.seconds), "settings": json.dumps(settings(trainer.args))}
    with whole_file(trainer.args.output / STATE) as partial:
        save_file(state, partial, metadata=told)


def load_state(trainer: Trainer) -> None:
    """The inverse of `save_state`: into the tensors that are there, for graphs hold them."""
    with safe_open(trainer.args.output / STATE, "pt") as file, torch.no_grad():
        for name, value in trainer.state().items():
            value.copy_(file.get_tensor(name))
        torch.set_rng_state(file.get_tensor("rng"))
        if trainer.device.type == "cuda" and "rng_cuda" in file.keys():  # noqa: SIM118  it is no dictionary
            torch.cuda.set_rng_state(file.get_tensor("rng_cuda"), trainer.device)


def keep_rows(log: Path, step: int) -> None:
    """Drop the rows of steps that are made again."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    write_whole(log, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


# ------------------------------------------------------------------------------------------------------------- the run


def rate(progress: float, args: argparse.Namespace) -> float:
    """Warm-up, stable, decay: the factor of the learning rate."""
    rising = progress / args.warmup if args.warmup else 1.0
    falling = (1 - progress) / args.decay if args.decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    began = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device, compiled = torch.device(args.device), not args.no_compile
    args.output.mkdir(parents=True, exist_ok=True)
    buckets = parse_buckets(args.buckets)
    if any(bucket.fps for bucket in buckets):
        raise ValueError(f"--buckets {args.buckets}: clips keep their rates here, write fps=0")
    progress = saved_progress(args)
    if progress.part(args) >= 1:
        logger.info("%s: this run was finished at step %d", args.output, progress.step)
        return

    clips = [clip[:: args.frame_stride] for clip in read_clips(args.data, read_list(args.clips, "train"))]
    if args.extra:
        clips += read_clips(args.extra, sorted(path.name for path in args.extra.iterdir()))
    held_out = read_clips(args.data, read_list(args.clips, "holdout"))
    store = ClipStore(clips, args.sides, device)
    logger.info("%d clips, %.2f billion pixels, %.0f s", len(clips), len(store.pixels) / 1e9, time.time() - began)

    vae = build_model(args).to(device)
    if args.stage == "image":
        vae.to(memory_format=torch.channels_last)
    vae.train()
    for layer in vae.modules():
        if isinstance(layer, TemporalConv3d):
            layer.ways = (Stacked(), *layer.ways)
    lpips = losses.LPIPS("vgg").to(device) if args.lpips_weight else None
    if lpips is not None:
        lpips.network.to(memory_format=torch.channels_last)
    trainer = Trainer(vae, Objective(Codec(vae, compiled), lpips, args, compiled), args)

    def draw(bucket: Bucket) -> torch.Tensor:
        return store.batch(bucket, args.static, args.color_jitter)

    steps = [(bucket, trainer.graphed(draw(bucket))) for bucket in buckets]
    for average, parameter in zip(trainer.average, trainer.parameters, strict=True):
        average.copy_(parameter.detach())
    count = sum(parameter.numel() for parameter in trainer.parameters)
    logger.info("%.2f M parameters, ready after %.0f s", count / 1e6, time.time() - began)
    if progress.step:
        load_state(trainer)
        logger.info("going on after step %d", progress.step)
    train(trainer, steps, draw, held_out, lpips, progress)


def train(
    trainer: Trainer, steps: list[tuple[Bucket, Callable]], draw: Callable, held_out: list, lpips, progress: Progress
) -> None:
    """The loop: learning rate, step, a row of the log every 50 steps, validation and weights by the clock."""
    args, plan = trainer.args, ClipPlan([bucket for bucket, _ in steps], trainer.args.seed)
    torch.backends.cudnn.benchmark = False  # validation has shapes of its own, each of them once
    trainer.terms.zero_()
    keep_rows(args.output / "log.jsonl", progress.step)
    validated = time.time()
    started = validated - progress.seconds
    while (part := progress.part(args)) < 1.0:
        trainer.learning_rate.fill_(args.learning_rate * rate(part, args))
        bucket, replay = steps[plan.bucket_of(progress.step)[0]]
        replay(draw(bucket))
        progress.step += 1
        if progress.step % 10 == 0:  # the clock runs ahead of the device's queue otherwise
            trainer.wait()
            progress.seconds = time.time() - started
        last = progress.part(args) >= 1.0
        if progress.step % 50 and not last:
            continue
        row = {"step": progress.step, **trainer.means(progress.step % 50 or 50), "seconds": round(progress.seconds, 1)}
        if not math.isfinite(row["l1"]):
            raise FloatingPointError(f"the loss is {row['l1']} at step {progress.step}: lower --learning_rate")
        validating = last or time.time() - validated > args.validate_every
        if validating:
            row |= trainer.save_and_validate(held_out, lpips if last else None, last)
            validated = time.time()
        with open(args.output / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        if validating:
            save_state(trainer, progress)
        logger.info("  ".join(f"{name} {value:.5g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
