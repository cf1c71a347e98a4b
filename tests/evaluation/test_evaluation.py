"""Protocols, samples, scoring and the runner: what is measured, on which frames, and that a broken run changes nothing."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import diffusers
import pytest
import torch
import typer
from typer.testing import CliRunner

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.cli import evaluate as commands
from vc_vae_diffusers.evaluation import runner
from vc_vae_diffusers.evaluation.baselines import wrap_model
from vc_vae_diffusers.evaluation.journal import Journal, file_name
from vc_vae_diffusers.evaluation.loading import ModelSpec
from vc_vae_diffusers.evaluation.protocols import Protocol, load_protocol, protocol_names
from vc_vae_diffusers.evaluation.reconstructor import Original
from vc_vae_diffusers.evaluation.results import find_model, read_result
from vc_vae_diffusers.evaluation.runner import RunOptions, run_evaluation
from vc_vae_diffusers.evaluation.samples import Sample, list_samples
from vc_vae_diffusers.evaluation.scoring import MetricNetworks
from vc_vae_diffusers.evaluation.tasks import ClipTask, Variant
from vc_vae_diffusers.metrics import frame
from vc_vae_diffusers.metrics.fvd import FVDFeatures, fvd, fvd_batch_mean
from vc_vae_diffusers.metrics.perceptual import LPIPSMetric
from vc_vae_diffusers.metrics.weights import I3D_KINETICS400, LPIPS_ALEX, LPIPS_VGG, MissingWeightsError, find_weights
from vc_vae_diffusers.video import VideoWriter, read_clip, write_image

CHEAP = ("psnr", "ssim", "flicker", "temporal_difference_psnr")
CPU = RunOptions(device="cpu")


def _protocol(**fields) -> Protocol:
    return Protocol(**{"name": "test", "num_frames": 8, "size": 32, "metrics": CHEAP, **fields})


@pytest.fixture
def videos(tmp_path, make_video) -> Path:
    """Five lossless clips of 20 frames, 40x48, in two folders."""
    folder = tmp_path / "videos"
    for index in range(5):
        path = folder / ("a" if index < 3 else "b") / f"clip{index}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with VideoWriter(path, 24, codec="lossless") as writer:
            writer.write(make_video(20, 40, 48, seed=index))
    return folder


@pytest.fixture
def models(tmp_path, make_vae) -> dict[str, Path]:
    """Saved tiny models: VC-VAE, a causal video VAE, an image VAE."""
    make_vae().save_pretrained(tmp_path / "vcvae")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).save_pretrained(tmp_path / "wan")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "image")
    return {name: tmp_path / name for name in ("vcvae", "wan", "image")}


def _specs(models: dict[str, Path], *names: str) -> list[ModelSpec]:
    return [ModelSpec(name, str(models[name])) for name in names]


# Protocols -------------------------------------------------------------------------------------------------------------


def test_presets_say_what_the_paper_does():
    assert set(protocol_names()) == {
        *("folder", "ucf101", "webvid", "kinetics600-ablation", "first-frame", "skytimelapse-fvd"),
        *("imagenet-256", "imagenet-512", "imagenet-1024", "tokbench-video-256", "tokbench-video-480"),
    }
    presets = {name: load_protocol(name) for name in protocol_names()}
    for name, preset in presets.items():
        assert preset.name == name
        assert json.loads(json.dumps(preset.to_dict()))["resize_kernel"].startswith("bilinear")
    ucf = presets["ucf101"]
    assert (ucf.clip_frames, ucf.num_frames, ucf.size, ucf.posterior) == (17, 16, 256, "mode")
    assert (ucf.sample_list, ucf.expected_samples, ucf.fps, ucf.frame_interval) == ("testlist01.txt", 3783, None, 1)
    assert presets["kinetics600-ablation"].max_samples == 2000
    assert presets["first-frame"].clip_frames == 16
    assert [presets[f"imagenet-{size}"].size for size in (256, 512, 1024)] == [256, 512, 1024]
    small, large = presets["tokbench-video-256"], presets["tokbench-video-480"]
    assert (small.text_bins, small.face_bins) == ((0.01, 0.02, 0.03, 1.0), (0.05, 0.1, 0.2, 1.0))
    assert (large.text_bins, large.face_bins) == ((0.005, 0.01, 0.02, 1.0), (0.02, 0.05, 0.1, 1.0))
    assert (small.size, large.size) == (256, 480)


def test_changed_presets_do_not_pass_for_the_preset(tmp_path):
    assert load_protocol("ucf101", {"num_frames": 16}) == load_protocol("ucf101")
    assert load_protocol("ucf101", {"num_frames": 32}).name == "ucf101 (changed)"
    own = tmp_path / "own.yaml"
    own.write_text("num_frames: 9\nmetrics: [psnr]\n")
    assert load_protocol(str(own)) == Protocol("own", num_frames=9, metrics=("psnr",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ("psnr", "vmaf")}, "metrics has 'vmaf'"),
        ({"kind": "audio"}, "kind has 'audio'"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"fps": 8.0, "frame_interval": 3}, "exclude each other"),
        ({"kind": "image"}, "images have only"),
        ({"kind": "tokbench", "text_bins": (0.1, 0.2)}, "three bins"),
        ({"kind": "generation"}, "generation has fvd alone"),
        ({"num_frames": "16"}, "num_frames is '16' in protocol 'test', but must be int | None"),
        ({"without_first_frame": 1}, "without_first_frame is 1 .* must be bool"),
        ({"size": True}, "size is True"),
        ({"metrics": "psnr"}, "metrics is 'psnr' .* must be tuple"),
        ({"tables": [1]}, "tables is"),
        ({"fps": [24]}, "fps is"),
    ],
)
def test_protocols_that_make_no_sense(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _protocol(**fields)
    with pytest.raises(ValueError, match="choose one"):
        load_protocol("ucf-101")
    with pytest.raises(ValueError, match="has the field 'frames'"):
        load_protocol("ucf101", {"frames": 3})
    for content, said in (
        (b"kind: [video", "is no YAML"),
        (b"kind: \x00", "is no YAML"),
        (b"\xff", "is no text"),
        (b"3", "holds int"),
    ):
        (tmp_path / "own.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load_protocol(str(tmp_path / "own.yaml"))


# Samples ---------------------------------------------------------------------------------------------------------------


def test_samples_are_sorted_hashed_and_drawn(videos):
    (videos / ".hidden.mkv").write_bytes(b"x")
    (videos / "notes.txt").write_text("x")
    everything = list_samples(videos, _protocol())
    names = [sample.name for sample in everything.samples]
    assert names == ["a/clip0.mkv", "a/clip1.mkv", "a/clip2.mkv", "b/clip3.mkv", "b/clip4.mkv"]
    assert everything.sha256 == list_samples(videos, _protocol()).sha256
    first = list_samples(videos, _protocol(max_samples=2))
    assert [sample.name for sample in first.samples] == names[:2]
    drawn = [sample.name for sample in list_samples(videos, _protocol(max_samples=2, sample_seed=3)).samples]
    assert drawn == sorted(random.Random(3).sample(names, 2))
    with (videos / "a" / "clip0.mkv").open("ab") as stream:
        stream.write(b"x")
    assert list_samples(videos, _protocol()).sha256 != everything.sha256


def test_sample_lists(videos, tmp_path):
    with pytest.raises(ValueError, match=r"needs testlist01\.txt"):
        list_samples(videos, _protocol(sample_list="testlist01.txt"))
    splits = tmp_path / "ucfTrainTestlist"
    splits.mkdir()
    (splits / "testlist01.txt").write_text("b/clip4.mkv\na/clip1.mkv 7\n\n")
    listed = list_samples(videos, _protocol(sample_list="testlist01.txt"))
    assert [sample.name for sample in listed.samples] == ["b/clip4.mkv", "a/clip1.mkv"]
    own = tmp_path / "own.txt"
    own.write_text("a/clip9.mkv\n")
    with pytest.raises(ValueError, match=r"line 1 of .*own\.txt is 'a/clip9\.mkv'"):
        list_samples(videos, _protocol(), own)
    own.write_text("a/clip1.mkv\na/clip1.mkv\n")
    with pytest.raises(ValueError, match="counts once"):
        list_samples(videos, _protocol(), own)
    with pytest.raises(ValueError, match="holds no image"):
        list_samples(videos, _protocol(kind="image", metrics=("psnr",)))


# Scoring ---------------------------------------------------------------------------------------------------------------


def _values(reconstruction: torch.Tensor, source: torch.Tensor) -> dict[str, list[float]]:
    functions = (frame.psnr, frame.ssim, frame.flicker, frame.temporal_difference_psnr)
    return {
        name: function(reconstruction, source, data_range=(-1.0, 1.0))[0].tolist()
        for name, function in zip(CHEAP, functions, strict=True)
    }


def test_every_model_is_scored_on_the_same_frames(videos, models, tmp_path):
    out = tmp_path / "result.json"
    run_evaluation(_specs(models, "vcvae", "wan", "image"), _protocol(), videos, out, CPU)
    result = read_result(out)
    for name, cls in (
        ("vcvae", AutoencoderKLVCVAE),
        ("wan", diffusers.AutoencoderKLWan),
        ("image", diffusers.AutoencoderKL),
    ):
        vae = wrap_model(cls.from_pretrained(models[name]).eval())
        entry = find_model(result, name)
        assert len(entry["videos"]) == 5
        for record in entry["videos"]:
            clip = read_clip(videos / record["sample"], num_frames=9, resize=32, crop=32)[None]
            if name == "wan":  # sees the first frame, which is not scored
                expected = _values(vae.reconstruct(clip)[:, :, 1:], clip[:, :, 1:])
            else:  # does not see it
                expected = _values(vae.reconstruct(clip[:, :, 1:]), clip[:, :, 1:])
            assert (record["frames"], record["height"], record["width"]) == (8, 32, 32)
            assert record["first_frame_index"] == 1
            for metric in CHEAP:
                assert record["per_frame"][metric] == pytest.approx(expected[metric], abs=2e-4), (name, metric)
        per_frame = [record["per_frame"]["psnr"] for record in entry["videos"]]
        mean = sum(sum(values) / 8 for values in per_frame) / 5
        assert entry["metrics"]["psnr"]["value"] == pytest.approx(mean, abs=1e-9)
        assert entry["metrics"]["psnr"]["frames"] == 40
        assert entry["curves"]["psnr"] == pytest.approx([sum(column) / 5 for column in zip(*per_frame, strict=True)])
        assert len(entry["curves"]["flicker"]) == 7
        assert entry["first_frame"] == {}
    assert find_model(result, "wan")["videos"][0]["latent_shape"] == [1, 4, 3, 4, 4]
    assert find_model(result, "vcvae")["videos"][0]["latent_shape"] == [1, 4, 1, 4, 4]  # of one streamed group


def test_first_frame_protocol_scores_it(videos, models, tmp_path):
    protocol = _protocol(without_first_frame=False, max_samples=2)
    result = run_evaluation(_specs(models, "vcvae", "wan"), protocol, videos, tmp_path / "r.json", CPU)
    for entry in result["models"]:
        assert len(entry["curves"]["psnr"]) == 8
        assert entry["first_frame"]["psnr"] == entry["curves"]["psnr"][0]
        assert "flicker" not in entry["first_frame"]
    wan = wrap_model(diffusers.AutoencoderKLWan.from_pretrained(models["wan"]).eval())
    clip = read_clip(videos / "a/clip0.mkv", num_frames=8, resize=32, crop=32)[None]
    expected = _values(wan.reconstruct(clip), clip)
    assert find_model(result, "wan")["videos"][0]["per_frame"]["psnr"] == pytest.approx(expected["psnr"], abs=2e-4)


def test_result_file_carries_what_its_numbers_depend_on(videos, models, tmp_path):
    out = tmp_path / "deep" / "result.json"
    run_evaluation(_specs(models, "vcvae"), _protocol(max_samples=2, seed=5), videos, out, CPU)
    raw = json.loads(out.read_text())
    assert raw["protocol"]["seed"] == 5
    assert raw["protocol"]["metrics"] == list(CHEAP)
    assert raw["samples"]["names"] == ["a/clip0.mkv", "a/clip1.mkv"]
    assert len(raw["samples"]["sha256"]) == 64
    (entry,) = raw["models"]
    assert entry["class"] == "AutoencoderKLVCVAE"
    assert entry["packages"]["torch"] == torch.__version__.split("+")[0]
    assert {"diffusers", "av", "python", "vc_vae_diffusers"} <= entry["packages"].keys()
    assert len(entry["weights_sha256"]) == 64
    assert (entry["dtype"], entry["device"], entry["compression"]) == ("float32", "cpu", [4, 8, 8])
    assert (entry["separate_first_frame"], entry["latent_channels"], entry["streamed"]) == (False, 4, True)
    assert entry["parameters"] > 1000
    assert entry["timing"]["frames"] == 16
    assert entry["timing"]["encode_ms_per_frame"] > 0
    assert entry["timing"]["decode_ms_per_frame"] > 0
    assert all(record["seconds"]["encode"] > 0 for record in entry["videos"])
    assert not list(out.parent.glob("*partial*"))


def test_identical_frames_are_reported_apart(videos, tmp_path):
    out = tmp_path / "r.json"
    run_evaluation([ModelSpec("original", "original")], _protocol(max_samples=1), videos, out, CPU)
    assert '"inf"' in out.read_text()
    (entry,) = read_result(out)["models"]
    assert entry["metrics"]["psnr"] == {"value": float("inf"), "std": pytest.approx(float("nan"), nan_ok=True)} | {
        "frames": 0,
        "identical_frames": 8,
    }
    assert entry["metrics"]["ssim"]["value"] == 1.0
    assert entry["metrics"]["flicker"]["value"] == 0.0


def test_files_that_cannot_be_used_are_named(videos, models, tmp_path, make_video):
    (videos / "broken.mp4").write_bytes(b"no video" * 100)
    for name, length in (("short.mkv", 8), ("one.mkv", 1)):
        with VideoWriter(videos / name, 24, codec="lossless") as writer:
            writer.write(make_video(length, 40, 48))
    protocol = _protocol(expected_samples=9)
    result = run_evaluation(_specs(models, "vcvae"), protocol, videos, tmp_path / "r.json", CPU)
    (entry,) = result["models"]
    assert entry["measured"] == 5
    reasons = {record["sample"]: record["skipped"] for record in entry["skipped"]}
    assert set(reasons) == {"broken.mp4", "short.mkv", "one.mkv"}
    assert "gives one frame, which is not scored" in reasons["one.mkv"]
    assert "gives 8 frames, the protocol takes 9" in reasons["short.mkv"]
    assert entry["warnings"] == ["5 samples were measured, the protocol means 9", "3 samples could not be used"]
    (videos / "only").mkdir()
    (videos / "short.mkv").rename(videos / "only" / "short.mkv")
    with pytest.raises(ValueError, match=r"no sample could be measured for vcvae; .* the first: .*gives 8 frames"):
        run_evaluation(_specs(models, "vcvae"), _protocol(), videos / "only", tmp_path / "none.json", CPU)
    assert not list(tmp_path.glob("none.json*")), "nothing that a run with other options would have to be told apart from"


def test_a_run_that_broke_off_before_its_first_sample_binds_no_other(videos, models, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    monkeypatch.setattr(runner.TASKS["video"], "measure", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        run_evaluation(_specs(models, "vcvae"), _protocol(max_samples=1), videos, out, CPU)
    monkeypatch.undo()
    result = run_evaluation(_specs(models, "vcvae"), _protocol(max_samples=1, num_frames=4), videos, out, CPU)
    assert result["models"][0]["measured"] == 1


NOISY = """
    import torch

    class Noisy:
        frame_rule, separate_first, temporal_compression, spatial_compression = (1, 1), False, 1, 1

        def encode(self, video):
            return video

        def decode(self, latents):
            return latents + 0.1 * torch.randn_like(latents)  # from the global generator, as some decoders do

    def load(checkpoint, *, device, dtype):
        return Noisy()
"""


def test_every_sample_has_its_own_random_stream(videos, models, tmp_path):
    adapter = tmp_path / "noisy.py"
    adapter.write_text(textwrap.dedent(NOISY))
    specs = [*_specs(models, "image"), ModelSpec("noisy", str(adapter))]
    protocol = _protocol(posterior="sample", max_samples=3)
    torch.manual_seed(1)
    whole = run_evaluation(specs, protocol, videos, tmp_path / "whole.json", CPU)
    only = tmp_path / "only.txt"
    only.write_text("a/clip2.mkv\n")
    options = RunOptions(device="cpu", list_file=only)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    alone = run_evaluation(specs, protocol, videos, tmp_path / "alone.json", options)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    for of_all, of_one in zip(whole["models"], alone["models"], strict=True):
        assert of_one["videos"][0]["per_frame"] == of_all["videos"][2]["per_frame"], of_one["label"]
    first, second = (Sample(name, Path(name)).seed(0) for name in ("a", "b"))
    assert first != second
    assert first != Sample("a", Path("a")).seed(1)
    mode = run_evaluation(_specs(models, "image"), _protocol(max_samples=3), videos, tmp_path / "mode.json", CPU)
    assert mode["models"][0]["videos"][2]["per_frame"] != whole["models"][0]["videos"][2]["per_frame"]


def test_frame_interval_and_fps(videos, models, tmp_path):
    for fields, frames in (({"frame_interval": 3}, [0, 3, 6, 9]), ({"fps": 12.0}, [0, 2, 4, 6])):
        protocol = _protocol(num_frames=4, without_first_frame=False, max_samples=1, **fields)
        out = tmp_path / f"{frames[1]}.json"
        result = run_evaluation(_specs(models, "image"), protocol, videos, out, CPU)
        clip = read_clip(videos / "a/clip0.mkv", num_frames=12, resize=32, crop=32)[None][:, :, frames]
        vae = wrap_model(diffusers.AutoencoderKL.from_pretrained(models["image"]).eval())
        expected = _values(vae.reconstruct(clip), clip)
        measured = result["models"][0]["videos"][0]["per_frame"]
        assert measured["psnr"] == pytest.approx(expected["psnr"], abs=2e-4)
        assert measured["flicker"] == pytest.approx(expected["flicker"], abs=1e-6)


def test_whole_videos_need_no_more_memory_when_long(tmp_path, make_vae, make_video, live_memory):
    vae = make_vae()
    peaks = {}
    for frames in (24, 72):
        folder = tmp_path / str(frames)
        folder.mkdir()
        with VideoWriter(folder / "clip.mkv", 24, codec="lossless") as writer:
            writer.write(make_video(frames, 32, 32))
        protocol = _protocol(num_frames=None, size=None)
        samples = list_samples(folder, protocol)
        task = ClipTask(protocol, samples, MetricNetworks(torch.device("cpu")))
        with live_memory(vae.state_dict().values()) as memory:
            record = task.measure(wrap_model(vae), samples.samples[0], Variant("vcvae"))
        assert record["frames"] == frames - 1
        peaks[frames] = memory.peak
    assert peaks[72] <= 1.02 * peaks[24]


# Images ----------------------------------------------------------------------------------------------------------------


def test_images_as_table_9_has_them(models, tmp_path, make_video):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        write_image(folder / f"{index}.png", make_video(1, 50, 40, seed=index)[0])
    protocol = _protocol(kind="image", num_frames=1, without_first_frame=False, metrics=("psnr", "ssim"))
    result = run_evaluation(_specs(models, "vcvae", "wan", "image"), protocol, folder, tmp_path / "r.json", CPU)
    assert [entry["label"] for entry in result["models"]] == ["vcvae", "wan", "wan*", "image"]
    frames = {entry["label"]: entry["videos"][0]["frames"] for entry in result["models"]}
    assert frames == {"vcvae": 4, "wan": 1, "wan*": 4, "image": 1}
    image = read_clip(folder / "0.png", num_frames=1, resize=32, crop=32)[None]
    wan = wrap_model(diffusers.AutoencoderKLWan.from_pretrained(models["wan"]).eval())
    for label, repeated, scored in (("wan", 1, slice(0, 1)), ("wan*", 5, slice(1, 5))):
        source = image.expand(-1, -1, repeated, -1, -1)
        psnr = frame.psnr(wan.reconstruct(source)[:, :, scored], source[:, :, scored], data_range=(-1.0, 1.0))[0]
        record = find_model(result, label)["videos"][0]
        assert record["per_frame"]["psnr"] == pytest.approx(psnr.tolist(), abs=2e-4)
    vcvae = find_model(result, "vcvae")
    assert vcvae["first_frame"]["psnr"] == vcvae["curves"]["psnr"][0]
    assert vcvae["image_as_video"] is True


# Networks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_weights() -> None:
    """Skip where the weights of LPIPS and I3D are not on this machine (`vcvae fetch-weights`)."""
    try:
        for weights in (LPIPS_ALEX, LPIPS_VGG, I3D_KINETICS400):
            find_weights(weights)
    except MissingWeightsError as error:
        pytest.skip(str(error))


def test_lpips_and_fvd_are_those_of_the_metrics(videos, models, tmp_path, real_weights):
    protocol = _protocol(num_frames=9, max_samples=3, metrics=("lpips_alex", "lpips_vgg", "fvd"))
    result = run_evaluation(_specs(models, "wan"), protocol, videos, tmp_path / "r.json", CPU)
    (entry,) = result["models"]
    wan = wrap_model(diffusers.AutoencoderKLWan.from_pretrained(models["wan"]).eval())
    lpips, i3d = LPIPSMetric("vgg"), FVDFeatures()
    sources, reconstructions = [], []
    for record in entry["videos"]:
        clip = read_clip(videos / record["sample"], num_frames=10, resize=32, crop=32)[None]
        pair = wan.reconstruct(clip)[:, :, 1:], clip[:, :, 1:]
        expected = lpips(*pair, data_range=(-1.0, 1.0))[0].tolist()
        assert record["per_frame"]["lpips_vgg"] == pytest.approx(expected, abs=1e-5)
        assert record["per_frame"]["lpips_alex"] != pytest.approx(expected, abs=1e-3)
        assert "features" not in record
        reconstructions.append(i3d(pair[0], data_range=(-1.0, 1.0)))
        sources.append(i3d(pair[1], data_range=(-1.0, 1.0)))
    sets = torch.cat(sources), torch.cat(reconstructions)
    assert entry["metrics"]["fvd"] == {"value": pytest.approx(fvd(*sets), rel=1e-4), "clips": 3, "reference_clips": 3}
    assert entry["metrics"]["fvd_batch_mean@2"]["value"] == pytest.approx(fvd_batch_mean(*sets, 2), rel=1e-4)
    assert fvd(*sets) > 1
    assert "below 2,048" in entry["warnings"][0]
    assert "sha256" in entry["metric_backends"]["fvd"]
    assert "v0.1" in entry["metric_backends"]["lpips_vgg"]


def test_fvd_of_generated_clips(videos, tmp_path, real_weights):
    generated = tmp_path / "generated"
    generated.mkdir()
    for index, name in enumerate(("a/clip0.mkv", "a/clip1.mkv", "b/clip3.mkv")):
        with VideoWriter(generated / f"{index}.mkv", 8, codec="lossless") as writer:
            writer.write(read_clip(videos / name, num_frames=19)[:, ::2][:, : 10 if index else 8])
    protocol = load_protocol("skytimelapse-fvd", {"num_frames": 9, "frame_interval": 2, "size": 40, "max_samples": 4})
    result = run_evaluation([ModelSpec("G", f"samples:{generated}")], protocol, videos, tmp_path / "r.json", CPU)
    (entry,) = result["models"]
    assert entry["metrics"]["fvd"]["clips"] == 2
    assert entry["metrics"]["fvd"]["reference_clips"] == 4
    assert "gives 8 frames, the protocol takes 9" in entry["skipped"][0]["skipped"]
    i3d = FVDFeatures()
    taken = {
        "data": [path.relative_to(videos).as_posix() for path in sorted(videos.rglob("*.mkv"))],
        "generated": ["a/clip1.mkv", "b/clip3.mkv"],
    }
    drawn = {record["sample"] for record in entry["videos"]}
    features = {
        group: torch.cat(
            [
                i3d(read_clip(videos / name, num_frames=17, resize=40, crop=40)[None][:, :, ::2], data_range=(-1.0, 1.0))
                for name in names
                if group == "generated" or f"data/{name}" in drawn
            ]
        )
        for group, names in taken.items()
    }
    expected = fvd(features["data"], features["generated"])
    assert entry["metrics"]["fvd"]["value"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="takes generated videos"):
        run_evaluation([ModelSpec("G", str(generated))], protocol, videos, tmp_path / "s.json", CPU)
    with pytest.raises(ValueError, match="not a folder of samples"):
        run_evaluation([ModelSpec("G", f"samples:{generated}")], _protocol(), videos, tmp_path / "s.json", CPU)


def test_clips_of_the_data_are_measured_once_for_all_samples_and_new_samples_need_a_new_label(
    videos, tmp_path, make_video, monkeypatch
):
    protocol = _protocol(kind="generation", metrics=("fvd",), num_frames=10)
    measured = []

    def networks(*_) -> MetricNetworks:
        found = MetricNetworks(torch.device("cpu"))
        found.video_features = lambda clip: measured.append(clip) or clip.mean(dim=(0, 3, 4)).reshape(1, -1)
        return found

    monkeypatch.setattr(runner, "build_networks", networks)
    for name in "AB":
        (tmp_path / name).mkdir()
        for index in range(3):
            with VideoWriter(tmp_path / name / f"{index}.mkv", 8, codec="lossless") as writer:
                writer.write(make_video(10, 32, 32, seed=7 * index + ord(name)))
    specs = [ModelSpec(name, f"samples:{tmp_path / name}") for name in "AB"]
    both = run_evaluation(specs, protocol, videos, tmp_path / "both.json", CPU)
    assert len(measured) == 5 + 3 + 3
    for spec in specs:
        alone = run_evaluation([spec], protocol, videos, tmp_path / f"{spec.label}.json", CPU)
        assert find_model(alone, spec.label)["metrics"] == find_model(both, spec.label)["metrics"]
    assert find_model(both, "A")["metrics"] != find_model(both, "B")["metrics"]
    (tmp_path / "A" / "2.mkv").unlink()
    with pytest.raises(ValueError, match=r"another generated, generated_sha256; give this one another label"):
        run_evaluation(specs, protocol, videos, tmp_path / "both.json", CPU)


def test_missing_weights_are_one_error(videos, models, tmp_path):
    options = RunOptions(device="cpu", weights=tmp_path)
    for metric in ("lpips_vgg", "fvd"):
        with pytest.raises(MissingWeightsError, match="vcvae fetch-weights"):
            run_evaluation(
                _specs(models, "vcvae"), _protocol(num_frames=9, metrics=(metric,)), videos, tmp_path / "r.json", options
            )
    with pytest.raises(ValueError, match="FVD on 8 frames, but its network needs at least 9"):
        run_evaluation(_specs(models, "vcvae"), _protocol(metrics=("fvd",)), videos, tmp_path / "r.json", options)


# A run that is disturbed -------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, signal, sys
    from vc_vae_diffusers.evaluation.loading import ModelSpec
    from vc_vae_diffusers.evaluation.protocols import Protocol
    from vc_vae_diffusers.evaluation.runner import RunOptions, run_evaluation

    model, data, out, kill_after = sys.argv[1:]

    def progress(label, done, total):
        if done == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)
        if done == total:
            print("share", total)

    protocol = Protocol("test", num_frames=8, size=32, metrics={metrics!r})
    run_evaluation([ModelSpec("vcvae", model)], protocol, data, out, RunOptions(progress=progress))
"""


def _start(script: Path, *arguments: object, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _numbers(result: dict) -> list:
    """All of a result that must not depend on how the run went."""
    return [
        (
            entry["label"],
            entry["metrics"],
            entry["curves"],
            [(record["sample"], record["frames"], record["per_frame"]) for record in entry["videos"]],
        )
        for entry in result["models"]
    ]


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "run.py"
    path.write_text(textwrap.dedent(SCRIPT).replace("{metrics!r}", repr(CHEAP)))
    return path


def test_a_killed_run_continues_to_equal_results(videos, models, tmp_path, script):
    undisturbed = run_evaluation(_specs(models, "vcvae"), _protocol(), videos, tmp_path / "whole.json", CPU)
    out = tmp_path / "result.json"
    killed = _start(script, models["vcvae"], videos, out, 2)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    journal = tmp_path / "result.json.partial" / "vcvae" / "process-0.jsonl"
    lines = journal.read_bytes().splitlines()
    assert len(lines) == 2
    journal.write_bytes(journal.read_bytes() + lines[0][:40])  # and a line that was being written
    done = []
    options = RunOptions(device="cpu", progress=lambda label, count, total: done.append((count, total)))
    continued = run_evaluation(_specs(models, "vcvae"), _protocol(), videos, out, options)
    assert done[-1] == (3, 3)  # only what was missing
    assert _numbers(continued) == _numbers(undisturbed)
    assert not journal.parent.parent.exists()


def test_two_processes_give_the_numbers_of_one(videos, models, tmp_path, script):
    alone = run_evaluation(_specs(models, "vcvae"), _protocol(), videos, tmp_path / "one.json", CPU)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = tmp_path / "two.json"
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        _start(script, models["vcvae"], videos, out, 99, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in (0, 1)
    ]
    shares = []
    for process in processes:
        output, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors
        shares.append(output.split())
    assert shares == [["share", "3"], ["share", "2"]]
    together = read_result(out)
    assert _numbers(together) == _numbers(alone)


def test_processes_share_the_samples(tmp_path):
    """The journals of a run with two processes, continued by one: every record counts, wherever it was written."""
    first, second = (Journal(tmp_path / "j", {"a": 1}) for _ in range(2))
    first.create()
    second.create()
    first.open(0)
    second.open(1)
    first.append({"sample": "x", "value": float("inf")})
    second.append({"sample": "y", "value": 2})
    first.close()
    second.close()
    assert Journal(tmp_path / "j", {"a": 1}).records() == {
        "x": {"sample": "x", "value": float("inf")},
        "y": {"sample": "y", "value": 2},
    }
    with pytest.raises(ValueError, match=r"unfinished run with another a, b"):
        Journal(tmp_path / "j", {"a": 2, "b": 3}).create()


def test_labels_become_file_names():
    assert file_name("wan2.1") == "wan2.1"
    assert file_name("org/repo*") == "org%2Frepo%2A"
    assert file_name("..") == "%2E%2E"
    assert len({file_name(label) for label in ("a b", "a_b", "a%20b")}) == 3


def test_results_are_extended_and_never_mixed(videos, models, tmp_path, make_vae):
    out = tmp_path / "result.json"
    protocol = _protocol(max_samples=2)
    run_evaluation(_specs(models, "vcvae"), protocol, videos, out, CPU)
    before = read_result(out)["models"][0]
    calls = []
    options = RunOptions(device="cpu", progress=lambda *call: calls.append(call))
    both = run_evaluation(_specs(models, "vcvae", "image"), protocol, videos, out, options)
    assert [entry["label"] for entry in both["models"]] == ["vcvae", "image"]
    assert both["models"][0] == before
    assert {call[0] for call in calls} == {"image"}
    with pytest.raises(ValueError, match=r"another protocol \(it differs in num_frames\)"):
        run_evaluation(_specs(models, "image"), _protocol(max_samples=2, num_frames=4), videos, out, CPU)
    make_vae(seed=1).save_pretrained(models["vcvae"])
    with pytest.raises(ValueError, match="labelled 'vcvae' with another weights_sha256"):
        run_evaluation(_specs(models, "vcvae"), protocol, videos, out, CPU)
    with pytest.raises(ValueError, match="must have its own"):
        run_evaluation(_specs(models, "vcvae", "vcvae"), protocol, videos, out, CPU)
    with (videos / "a" / "clip0.mkv").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ValueError, match="2 other samples"):
        run_evaluation(_specs(models, "image"), protocol, videos, out, CPU)
    with pytest.raises(ValueError, match="has the schema"):
        read_result(models["vcvae"] / "config.json")


def test_frames_are_kept_for_figures(videos, models, tmp_path):
    out = tmp_path / "result.json"
    options = RunOptions(device="cpu", saved_samples=1)
    result = run_evaluation(_specs(models, "vcvae", "wan"), _protocol(max_samples=2), videos, out, options)
    assert result["frames"] == {"folder": "result_frames", "samples": ["a/clip0.mkv"]}
    folder = tmp_path / "result_frames" / file_name("a/clip0.mkv")
    assert sorted(path.name for path in folder.iterdir()) == ["source", "vcvae", "wan"]
    for name in ("source", "vcvae", "wan"):
        assert [path.name for path in sorted((folder / name).iterdir())] == [f"{index:03d}.png" for index in range(8)]
    source = read_clip(videos / "a/clip0.mkv", num_frames=9, resize=32, crop=32)[:, 1:]
    kept = read_clip(folder / "source", num_frames=8)
    assert (kept - source).abs().max() <= 1 / 255 + 1e-6
    wan = wrap_model(diffusers.AutoencoderKLWan.from_pretrained(models["wan"]).eval())
    clip = read_clip(videos / "a/clip0.mkv", num_frames=9, resize=32, crop=32)[None]
    assert (read_clip(folder / "wan", num_frames=8) - wan.reconstruct(clip)[0, :, 1:]).abs().max() <= 1 / 255 + 1e-6


def test_a_missing_model_is_told_before_the_first_is_measured(videos, models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "result.json"
    for source, message in (
        ("nobody-at-all/no-such-vae", "no-such-vae is no folder here and could not be had from the hub"),
        (str(tmp_path / "nope.py"), "there is no such file"),
        ("inflate:./nope.safetensors", "neither a folder here, nor a hub id"),
        (f"samples:{videos}", "takes a model, not a folder of samples"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run_evaluation([*_specs(models, "vcvae"), ModelSpec("late", source)], _protocol(), videos, out, CPU)
        assert not out.exists()
        assert not out.with_name(f"{out.name}.partial").exists()


def test_command(videos, models, tmp_path):
    app = typer.Typer()
    app.command()(commands.evaluate)
    out = tmp_path / "result.json"
    arguments = ["--model", f"ours={models['vcvae']}", "--model", str(models["image"]), "--data", str(videos)]
    arguments += ["--out", str(out), "--metrics", "psnr,ssim", "--num-frames", "4", "--size", "32", "--device", "cpu"]
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    assert "ours" in ran.output
    result = read_result(out)
    assert [entry["label"] for entry in result["models"]] == ["ours", "image"]
    assert result["protocol"]["name"] == "folder (changed)"
    assert (result["protocol"]["num_frames"], result["protocol"]["size"]) == (4, 32)
    for option, value, said in (
        ("--dtype", "float8", "--dtype"),
        ("--metrics", ",", "--metrics: ',' names none"),
        ("--model", f"x={out}", "which is a file; give the folder"),
        ("--out", str(tmp_path), "--out: .* is a folder; pass a file name"),
    ):
        assert re.search(said, str(CliRunner().invoke(app, [*arguments, option, value]).exception))
    printed = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert printed["models"]["ours"]["psnr"] == find_model(result, "ours")["metrics"]["psnr"]["value"]
    whole = [*arguments[:-6], "--num-frames", "0", "--size", "0", "--device", "cpu", "--max-samples", "1"]
    whole[whole.index(str(out))] = str(tmp_path / "whole.json")
    assert CliRunner().invoke(app, whole, catch_exceptions=False).exit_code == 0
    record = read_result(tmp_path / "whole.json")["models"][0]["videos"][0]
    assert (record["frames"], record["height"], record["width"]) == (19, 40, 48)


def test_exact_rates_survive(tmp_path, make_video):
    """29.97 fps material resampled to its own rate is taken frame by frame."""
    path = tmp_path / "clip.mkv"
    with VideoWriter(path, Fraction(30000, 1001), codec="lossless") as writer:
        writer.write(make_video(10, 32, 32))
    protocol = _protocol(num_frames=10, without_first_frame=False, fps=30000 / 1001)
    samples = list_samples(tmp_path, protocol)
    task = ClipTask(protocol, samples, MetricNetworks(torch.device("cpu")))
    record = task.measure(Original(), samples.samples[0], Variant("original"))
    assert record["frames"] == 10
