"""Sample videos from a trained Latte pipeline to files, for looking at and for FVD.

    accelerate launch examples/sample_latte.py --model runs/latte/pipeline --output samples --num 2048

Sample i depends on --seed and i alone, not on the batch size or the number of processes (rounding apart). Files that are
there already are kept, so that a stopped run goes on; `samples.json` beside them says how they were made. They are lossless
by default, since a codec's losses count in FVD.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate.utils import tqdm

from vc_vae_diffusers.files import write_whole
from vc_vae_diffusers.generation.latte_transformer import LatteAdaLNTransformer3DModel
from vc_vae_diffusers.generation.pipeline_latte import LatteVCVAEUnconditionalPipeline
from vc_vae_diffusers.processes import processes
from vc_vae_diffusers.video import VideoWriter

SUFFIXES = {"lossless": ".mkv", "h264": ".mp4"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a LatteVCVAEUnconditionalPipeline")
    parser.add_argument("--transformer", help="folder with other weights for it, such as checkpoints/step-00010000/ema")
    parser.add_argument("--output", type=Path, required=True, help="folder for the videos")
    parser.add_argument("--num", type=int, default=2048, help="number of videos")
    parser.add_argument("--steps", type=int, default=250, help="denoising steps")
    parser.add_argument("--batch_size", type=int, default=4, help="videos at a time in each process")
    parser.add_argument("--num_frames", type=int, help="frames of a video; all that the model makes by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", type=int, help="class of all videos; by default they go through the classes in turn")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--fps", type=float, default=8.0, help="of the files; it changes no frame")
    parser.add_argument("--codec", choices=sorted(SUFFIXES), default="lossless")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", help="the accelerator by default")
    parser.add_argument("--trust_remote_code", action="store_true", help="for folders that carry loading stubs")
    arguments = parser.parse_args(argv)
    for name in ("num", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    return arguments


def load_pipeline(arguments: argparse.Namespace, device: torch.device) -> LatteVCVAEUnconditionalPipeline:
    """The pipeline on the device, with the weights asked for."""
    dtype = getattr(torch, arguments.dtype)
    options = {"dtype": dtype, "trust_remote_code": arguments.trust_remote_code}
    if arguments.transformer:
        options["transformer"] = LatteAdaLNTransformer3DModel.from_pretrained(arguments.transformer, dtype=dtype)
    pipeline = LatteVCVAEUnconditionalPipeline.from_pretrained(arguments.model, **options).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def labels_of(
    arguments: argparse.Namespace, pipeline: LatteVCVAEUnconditionalPipeline, indices: list[int]
) -> list[int] | None:
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        return None
    return [index % num_classes if arguments.label is None else arguments.label for index in indices]


def record(arguments: argparse.Namespace) -> None:
    """Write how the samples are made, or check that those there were made the same way.

    Raises:
        ValueError: naming the options that differ.
    """
    names = ("model", "transformer", "steps", "num_frames", "seed", "label", "guidance_scale", "codec", "dtype")
    made = {name: getattr(arguments, name) for name in names}
    path = arguments.output / "samples.json"
    if path.exists():
        there = json.loads(path.read_text())
        differing = [name for name in names if there[name] != made[name]]
        if differing:
            changes = ", ".join(f"{name} {there[name]!r}, now {made[name]!r}" for name in differing)
            raise ValueError(f"--output {arguments.output} holds samples made with {changes}: name another folder.")
        return
    write_whole(path, json.dumps(made, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    state = processes(arguments.device)
    device = torch.device(arguments.device) if arguments.device else state.device
    with state.main_process_first():
        arguments.output.mkdir(parents=True, exist_ok=True)
        record(arguments)
    paths = [arguments.output / f"sample-{index:05d}{SUFFIXES[arguments.codec]}" for index in range(arguments.num)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    pipeline = load_pipeline(arguments, device)
    for first in tqdm(range(0, len(mine), arguments.batch_size), main_process_only=True):
        indices = mine[first : first + arguments.batch_size]
        videos = pipeline(
            len(indices),
            labels_of(arguments, pipeline, indices),
            num_frames=arguments.num_frames,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            generator=[torch.Generator().manual_seed(arguments.seed * 1_000_003 + index) for index in indices],
            output_type="pt",
        ).frames
        for index, video in zip(indices, videos.cpu(), strict=True):
            with VideoWriter(paths[index], fps=arguments.fps, codec=arguments.codec) as writer:
                writer.write(video.transpose(0, 1) * 2 - 1)
    state.wait_for_everyone()
    state.print(f"{arguments.num} videos in {arguments.output}, {len(missing)} of them new")


if __name__ == "__main__":
    main()
