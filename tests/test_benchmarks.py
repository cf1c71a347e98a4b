"""The benchmarks run, and their helpers do what they say. No figure of theirs is tested: those depend on the machine."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from video_files import encode, numbered_frames

from vc_vae_diffusers import bundled_model_path
from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.operators.evaluation import Direct, GroupEnds, KernelLayer, TwoTaps
from vc_vae_diffusers.operators.evaluation.packing import FrameConv
from vc_vae_diffusers.operators.tdc import TemporalConv3d

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [
    "distributed_scaling",
    "export_speed",
    "gpu_estimate",
    "image_speed",
    "latent_noise",
    "precision",
    "shards_scaling",
    "train_step",
    "vae_memory",
    "vae_speed",
]
TINY = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch) -> None:
    """The scripts can be imported, and their processes start fast."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("common").Worker, "start_method", "forkserver")


def load(name: str):
    return importlib.import_module(name)


def results(name: str, folder: Path, *arguments: object) -> dict:
    """Run a script with one thread and read what it wrote."""
    path = folder / "made" / "result.json"
    load(name).main([*map(str, arguments), "--threads", "1", "--json", str(path)])
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------------------------- scripts


def test_every_script_is_tested():
    found = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "\ndef main(" in path.read_text()]
    assert found == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(name).main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert load(name).__doc__.splitlines()[0] in shown
    assert "--json" in shown


def test_a_script_runs_from_the_shell():
    done = subprocess.run([sys.executable, BENCHMARKS / "precision.py", "--dtype", "int8"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'int8'" in done.stderr


def test_vae_speed(tmp_path, capsys):
    arguments = ("--models", "vcvae-tiny", "wan-tiny", "--size", 32, "--frames", 5, "--rounds", 2)
    made = results("vae_speed", tmp_path, *arguments)
    (result,) = made["results"]
    assert {name: model["frames"] for name, model in result["models"].items()} == {"vcvae-tiny": 8, "wan-tiny": 5}
    for model in result["models"].values():
        for operation in ("encode", "decode"):
            figures = model[operation]
            assert len(figures["seconds"]) == 2
            assert figures["ms_per_frame"] > 0
            assert figures["gflop"] > 0
            assert figures["memory"]["peak"] > figures["memory"]["imported"]
    assert set(result["ratios"]["decode"]["vcvae-tiny"]) == {"wan-tiny"}
    assert "ms/frame" in capsys.readouterr().out


def test_image_speed(tmp_path, monkeypatch):
    image_speed = load("image_speed")
    small = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    monkeypatch.setattr(image_speed, "FLUX", {**image_speed.FLUX, **small})
    (runs,) = results("image_speed", tmp_path, "--size", "16x24", "--rounds", 1, "--trained")["runs"].values()
    assert list(runs) == ["encode", "decode"]
    for times in runs.values():
        assert all(times[name] > 0 for name in (*image_speed.MODELS, "ratio"))


def test_shards_scaling(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path / "model")
    (tmp_path / "clips").mkdir()
    for number, frames in enumerate((4, 6)):
        encode(tmp_path / "clips" / f"{number}.mp4", numbered_frames(frames, 32, 48), rate=12)
    arguments = (tmp_path / "clips", "--model", tmp_path / "model", "--processes", 1, "--rounds", 1, "--resize", 16)
    made = results("shards_scaling", tmp_path, *arguments, "--per-shard", 1)
    assert (made["frames"], made["shards"]) == (10, 2)
    assert len(made["seconds"]["1"]) == 1


def test_vae_memory(tmp_path, capsys):
    arguments = ("--models", "vcvae-tiny", "wan-tiny", "--size", 32, "48x32", "--frames", 8, "--operation", "decode")
    made = results("vae_memory", tmp_path, *arguments, "--tile", 16, "--start-method", "forkserver")
    cases = [(row["model"], row["mode"], tuple(row["size"])) for row in made["rows"]]
    assert cases == [
        *(("vcvae-tiny", mode, size) for mode in ("whole", "streamed", "tiled") for size in ((32, 32), (48, 32))),
        *(("wan-tiny", mode, size) for mode in ("whole", "tiled") for size in ((32, 32), (48, 32))),
    ]
    for row in made["rows"]:
        assert row["imported"] < row["peak"]
        assert ("estimate" in row) == (row["model"] == "vcvae-tiny")
    assert all(abs(row["estimate_error"]) < 0.15 for row in made["rows"] if "estimate" in row)
    assert "above the libraries" in capsys.readouterr().out


def test_calibration_finds_the_factor(tmp_path, monkeypatch):
    vae_memory = load("vae_memory")
    monkeypatch.setattr(vae_memory, "_GRID", [("vcvae-tiny", "whole", 8, (32, 32), 1, "float32")])
    made = results("vae_memory", tmp_path, "--calibrate", "--start-method", "forkserver")["calibration"]
    assert 0 < made["first_use"] < 200 * 2**20
    errors = [made["errors"][str(factor)] for factor in vae_memory._FACTORS]
    assert all(len(error) == 2 for error in errors)  # to encode and to decode
    assert errors == sorted(errors)  # a larger factor estimates more


def test_train_step(tmp_path):
    arguments = ("--models", "vcvae-tiny", "--size", 16, "--frames", 4, "--steps", 1, "--rounds", 1)
    rows = results("train_step", tmp_path, *arguments)["rows"]
    assert [(row["model"], row["checkpointing"]) for row in rows] == [("vcvae-tiny", False), ("vcvae-tiny", True)]
    for row in rows:
        assert row["step_seconds"] > 0
        assert row["peak_bytes"] > 0


def test_gpu_estimate(tmp_path, capsys):
    arguments = ("--models", "vcvae-tiny", "wan-tiny", "--size", 64, "--frames", 4)
    made = results("gpu_estimate", tmp_path, *arguments, "--operation", "encode", "decode")
    rows = {(row["model"], row["operation"]): row for row in made["rows"]}
    assert len(rows) == 4
    for row in rows.values():
        assert row["ms_per_frame"] > 0
        assert row["peak_live_bytes"] > 3 * 4 * 64 * 64
        assert row["kinds"]["convolution"]["flops"] > 0
        assert row["transfers_and_waits"] == {}
    wan = load("common").load("wan-tiny", "cpu", torch.float32)
    clip = torch.zeros(1, 3, 5, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        wan.encode(clip)
    # PyTorch's counter knows no operations of attention on CPUs.
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert rows["wan-tiny", "encode"]["kinds"]["convolution"]["flops"] == convolutions
    shown = capsys.readouterr().out
    assert "Estimated, nothing ran on a GPU" in shown
    assert "790 TFLOP/s" in shown


def test_a_measurement_stands_beside_the_estimate(tmp_path, capsys):
    arguments = (
        "--models",
        "vcvae-tiny",
        "wan-tiny",
        "--size",
        32,
        "--frames",
        4,
        "--measure",
        "--runs",
        1,
        "--device",
        "cpu",
    )
    made = results("gpu_estimate", tmp_path, *arguments, "--operation", "encode", "decode", "train")
    assert len(made["rows"]) == 6
    for row in made["rows"]:
        assert row["measured_ms_per_frame"] > 0
        assert row["measured_peak_bytes"] >= 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "measured on cpu" in shown
    assert "nothing ran on a GPU" not in shown


def test_the_schedule_of_the_compiler_is_read_without_a_gpu(tmp_path, capsys):
    arguments = ("--models", "vcvae-tiny", "wan-tiny", "--size", 64, "--frames", 4, "--operation", "encode", "decode")
    compiled, eager = (
        {(row["model"], row["operation"]): row for row in results("gpu_estimate", tmp_path, *arguments, *how)["rows"]}
        for how in (["--compiled"], [])
    )
    assert "compiled" in capsys.readouterr().out
    assert compiled.keys() == eager.keys()
    for key, row in compiled.items():
        assert row["launches"] < eager[key]["launches"]
        assert row["kinds"]["norm"]["launches"] > 0
        assert row["kinds"]["pointwise"]["bytes"] > 0
    for operation in ("encode", "decode"):  # what is fused is no convolution
        flops = [rows["wan-tiny", operation]["kinds"]["convolution"]["flops"] for rows in (compiled, eager)]
        assert flops[0] == flops[1]
    with pytest.raises(SystemExit):
        results("gpu_estimate", tmp_path, "--compiled", "--operation", "train")
    assert "--operation train: --compiled reads encode and decode only" in capsys.readouterr().err


def test_training_steps_are_counted_without_a_gpu(tmp_path, capsys):
    arguments = (
        "--models",
        "vcvae-tiny",
        "wan-tiny",
        "--size",
        32,
        "--frames",
        4,
        "--operation",
        "train",
        "train-checkpointed",
    )
    rows = {(row["model"], row["operation"]): row for row in results("gpu_estimate", tmp_path, *arguments)["rows"]}
    assert set(rows) == {("vcvae-tiny", "train"), ("vcvae-tiny", "train-checkpointed"), ("wan-tiny", "train")}
    assert "wan-tiny supports no gradient checkpointing" in capsys.readouterr().err
    whole, checkpointed = rows["vcvae-tiny", "train"], rows["vcvae-tiny", "train-checkpointed"]
    assert checkpointed["flops"] > 1.2 * whole["flops"]
    assert checkpointed["peak_live_bytes"] < whole["peak_live_bytes"]
    assert whole["kinds"]["optimizer"]["launches"] > 0
    assert whole["transfers_and_waits"] == {}


def test_what_a_convolution_takes_on_a_gpu():
    estimate = load("gpu_estimate")
    machine = estimate.Machine(tflops=100, share=0.5, bandwidth=1, launch=5)
    assert machine.seconds(50e12, 0, 2) == pytest.approx(1)
    assert machine.seconds(50e12, 0, 4) == pytest.approx(2)
    assert machine.seconds(0, 3e12, 2) == pytest.approx(3)
    assert machine.seconds(1, 1, 2) == pytest.approx(5e-6)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        x, weight, bias = torch.empty(2, 8, 10, 10), torch.empty(4, 8, 3, 3), torch.empty(4)
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
        frames, made = 2 * 2 * 8 * 100, 2 * 2 * 4 * 100
        for layout, copies in ((torch.contiguous_format, 2 * frames + 2 * made), (torch.channels_last, 2 * weight.nbytes)):
            given = x.contiguous(memory_format=layout)
            with estimate.KernelCount(machine, [given, weight, bias]) as counter:
                y = torch.nn.functional.conv2d(given, weight, bias, padding=1)
            kinds = counter.tally.kinds
            assert y.is_contiguous(memory_format=layout)
            assert kinds["convolution"].flops == 2 * 2 * 100 * 9 * 8 * 4
            assert kinds["convolution"].bytes == frames + made + weight.nbytes
            assert kinds["bias"].bytes == 2 * made
            assert kinds["layout"].bytes == copies
            assert counter.tally.peak == made


def test_distributed_scaling(tmp_path):
    arguments = (
        "--model",
        "vcvae-tiny",
        "--processes",
        1,
        2,
        "--size",
        "16x24",
        "--tile",
        16,
        "--frames",
        16,
        "--rounds",
        1,
    )
    made = results("distributed_scaling", tmp_path, *arguments)
    assert made["tiles"] == 2
    expected = {(s, o, n) for s in ("tiles", "segments") for o in ("encode", "decode") for n in (1, 2)}
    assert {(row["split"], row["operation"], row["processes"]) for row in made["rows"]} == expected
    for row in made["rows"]:
        assert len(row["seconds"]) == 1
        assert row["difference"] == 0
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["processes"])


def test_precision(tmp_path):
    rows = results("precision", tmp_path, "--frames", 4, "--size", "16x24", "--cycles", 1, 2, "--dtype", "bfloat16")["rows"]
    exact, half = rows
    assert (exact["dtype"], exact["against_float32"], half["dtype"]) == ("float32", None, "bfloat16")
    assert 40 < half["against_float32"] < 80
    for row in rows:
        assert row["cycles"].keys() == {"1", "2"}
        assert row["cycles"]["1"] > 10


def test_latent_noise_is_of_the_given_strength_and_the_same_for_every_model(tmp_path):
    options = ("--frames", 4, "--size", "16x24", "--noise", 0, 0.2, 0.8, "--model", "bundled", bundled_model_path())
    rows = results("latent_noise", tmp_path, *options)["rows"]
    assert [(row["model"], row["noise"]) for row in rows[:3]] == [("bundled", 0), ("bundled", 0.2), ("bundled", 0.8)]
    assert [row["psnr"] for row in rows[:3]] == [row["psnr"] for row in rows[3:]]
    clean, some, much = (row["psnr"] for row in rows[:3])
    assert clean > some + 0.1 > much + 1
    reference = results("precision", tmp_path, "--frames", 4, "--size", "16x24", "--cycles", 1, "--dtype", "float32")["rows"]
    assert clean == pytest.approx(reference[0]["cycles"]["1"], abs=1e-4)


def test_precision_takes_real_clips(tmp_path):
    precision = load("precision")
    clip = precision.clip_of(None, 3, (16, 40))
    assert clip.shape == (1, 3, 3, 16, 40)
    assert clip.std() > 0.1
    assert not torch.equal(clip[:, :, 0], clip[:, :, 1])
    assert precision.difference(clip, clip + 0.02) == pytest.approx(40.0, abs=1e-3)  # 10 log10(4 / 4e-4)


# ----------------------------------------------------------------------------------------------------------- helpers


def test_sizes():
    common = load("common")
    assert (common.parse_size("64x96"), common.parse_size("64")) == ((64, 96), (64, 64))
    for wrong in ("x64", "64x64x3", "wide"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
            common.parse_size(wrong)


def test_lengths_that_models_take():
    models = load("common").MODELS
    assert [models["vcvae-4x8x8"].frames(n) for n in (1, 4, 15, 16)] == [4, 4, 16, 16]
    assert [models["wan"].frames(n) for n in (1, 2, 16, 17, 18)] == [1, 5, 17, 17, 21]
    assert models["mochi"].frames(16) == 19


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="model is 'vqgan': choose from vcvae-4x8x8"):
        load("common").load("vqgan", "cpu", torch.float32)


def test_models_are_loaded_for_inference():
    vae = load("common").load("vcvae-tiny", "cpu", torch.bfloat16)
    assert not vae.training
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert all(layer.fused for layer in vae.modules() if isinstance(layer, KernelLayer))


def test_arithmetic_of_packed_convolutions_is_counted():
    plain, packed = FrameConv(torch.randn(6, 5, 3, 3), padding=1), FrameConv(torch.randn(6, 5, 3, 3), padding=1).pack()
    frames, y = torch.randn(2, 8, 10, 5), torch.randn(2, 8, 10, 6)
    counts = []
    for conv in (plain, packed):
        mapping = load("vae_speed").PACKED_CONVOLUTIONS
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            conv.add_to(y, frames)
            conv(frames)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * (2 * 8 * 10) * (9 * 5 * 6)


def test_workers_answer_fail_and_die():
    common = load("common")
    assert common.run_fresh(os.getpid, threads=1) != os.getpid()
    assert common.run_fresh(torch.get_num_threads, threads=1) == 1
    with pytest.raises(common.WorkerError, match="ValueError: invalid literal"):
        common.run_fresh(int, "seven", threads=1)
    with pytest.raises(common.WorkerError, match="the process ended with status 3"):
        common.run_fresh(os._exit, 3, threads=1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets a process's peak")
def test_peaks_are_of_what_came_after_the_reset():
    """In a process of its own: in this one other tests have left memory that the system may take back meanwhile."""
    script = """
import common, torch
held = torch.ones(80 * 2**18)  # 80 MiB
common.reset_peak("cpu")
assert common.memory_bytes("cpu", peak=True) < common.memory_bytes("cpu") + 2**20
before = common.memory_bytes("cpu")
more = torch.ones(80 * 2**18)
del more, held
assert common.memory_bytes("cpu", peak=True) - before > 75 * 2**20
assert common.memory_bytes("cpu") < before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=BENCHMARKS)


def test_limit_counts_the_convolutions_of_a_definition():
    limit = load("convolution_limit")
    torch.manual_seed(0)
    vae = AutoencoderKLVCVAE(**TINY).eval().requires_grad_(False)
    vae.groups_per_chunk = 2  # so that no chunk is static
    x = torch.zeros(1, 3, 8, 16, 16)
    for layer in vae.modules():
        if isinstance(layer, TemporalConv3d):
            layer.ways = (TwoTaps(), GroupEnds(), Direct())
    # A network that evaluates its layers directly makes these convolutions, and attention beside them.
    recorded = sum(call.flops for call in limit.record_convolutions(vae, "encode", x))
    direct = limit.direct_convolutions(vae, "encode", x)
    assert sum(call.flops for call in direct) == pytest.approx(recorded, rel=1e-6)
    call = direct[0]
    with FlopCounterMode(display=False) as counter:
        call.run(torch.zeros(call.input_shape))
    assert counter.get_total_flops() == call.flops
    limit.ConvolutionLimit(direct).run()
    with pytest.raises(ValueError, match="x has 6 frames, not whole groups of 4"):
        limit.direct_convolutions(vae, "encode", x[:, :, :6])
