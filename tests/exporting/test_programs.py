"""Exported programs compute what the model computes: whole streams, at other sizes than they were made with."""

import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree
from typer.testing import CliRunner
from video_files import encode, numbered_frames

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.exporting import programs
from vc_vae_diffusers.exporting.programs import DESCRIPTION, export_model
from vc_vae_diffusers.video import VideoReader, read_clip

EXAMPLE = Path(__file__).parents[2] / "examples" / "stream_onnx.py"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Following a model symbolically takes seconds a program: one level, and in each test another start of a stream.
SMALL = {"block_out_channels": (8, 8), "temporal_downsample": (True,)}


def chunks_of(vae: AutoencoderKLVCVAE, count: int) -> list[torch.Tensor]:
    """A stream as the programs take it."""
    generator = torch.Generator().manual_seed(1)
    size = vae.temporal_compression_ratio
    first = 1 if vae.config.first_frame == "separate" else size
    ratio = vae.spatial_compression_ratio
    lengths = [first, *[size] * (count - 1)]
    chunks = [torch.rand(1, 3, length, 3 * ratio, 2 * ratio, generator=generator) * 2 - 1 for length in lengths]
    if vae.config.frame_convention == "4k+1":
        chunks[0] = chunks[0][:, :, :1].expand(-1, -1, size, -1, -1).contiguous()
    return chunks


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PyTorch writes down every step of its trace for whoever collects log records, as pytest does."""
    logger = logging.getLogger("torch.__trace")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def test_streams_of_torch_programs_equal_the_model(make_vae, tmp_path, monkeypatch):
    vae = make_vae(**SMALL, frame_convention="4k+1")
    vae.fuse_tdc()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    made = export_model(vae, tmp_path / "out", "torch")
    assert made == json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert vae.config.temporal_operator == "tdc"
    run = {name: torch.export.load(tmp_path / "out" / facts["file"]).module() for name, facts in made["programs"].items()}
    caches: dict[str, tuple] = {"encode": (), "decode": ()}

    def step(direction: str, x: torch.Tensor) -> torch.Tensor:
        program = run[f"{direction}_{'next' if caches[direction] else 'start'}"]
        result, *caches[direction] = program(x, list(caches[direction]))
        return result

    ours: dict[str, object] = {"encode": None, "decode": None}
    with torch.no_grad():
        for number, chunk in enumerate(chunks_of(vae, 3)):
            moments, ours["encode"] = vae.encode_chunk(chunk, ours["encode"])
            assert torch.allclose(step("encode", chunk), moments, atol=1e-4)
            latents = moments[:, : vae.config.latent_channels]
            frames, ours["decode"] = vae.decode_chunk(latents, ours["decode"])
            theirs = step("decode", latents)
            assert torch.allclose(theirs, frames, atol=1e-4)
            if number == 0:
                assert made["start"]["frames"] == chunk.shape[2]
                assert made["start"]["frames_back"] == frames.shape[2]
    assert len(pytree.tree_leaves(ours["decode"])) == len(caches["decode"]) > 3
    vae.save_pretrained(tmp_path / "model")
    times = tmp_path / "times.json"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    arguments = [str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--size", "8x12", "--rounds", "2"]
    importlib.import_module("export_speed").main([*arguments, "--threads", "1", "--json", str(times)])
    rows = json.loads(times.read_text())["rows"]
    assert [row["operation"] for row in rows] == ["encode", "encode", "decode", "decode"]
    assert all(row["off"] < 1e-4 and len(row["seconds"]) == 2 for row in rows)
    # Where there is PyTorch only:
    code = (
        "import sys, torch\n"
        f"program = torch.export.load({str(tmp_path / 'out' / made['programs']['encode_start']['file'])!r}).module()\n"
        f"moments, *cache = program(torch.zeros(1, 3, {made['start']['frames']}, 24, 40), [])\n"
        "print(tuple(moments.shape), len(cache), any(name.startswith('vc_vae') for name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"(1, {moments.shape[1]}, 1, 12, 20) {len(caches['encode'])} False"


def test_onnx_streams_a_video(make_vae, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}, of the extra export")
    vae = make_vae(**SMALL, first_frame="separate", temporal_causality="causal", temporal_operator="conv")
    vae.save_pretrained(tmp_path / "model")
    runner = CliRunner()
    wish = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--json"]
    done = runner.invoke(app, wish)
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["format"] == "vcvae-onnx"
    assert made["config"]["latent_channels"] == vae.config.latent_channels
    assert max(facts["difference"] for facts in made["programs"].values()) < 1e-4
    assert made["programs"]["encode_next"]["inputs"][0] == {"name": "frames", "shape": [1, 3, 2, "2h", "2w"]}
    again = runner.invoke(app, wish)
    assert again.exit_code == 1
    assert "is not empty; pass --overwrite" in json.loads(again.stdout)["error"]["message"]
    clip = encode(tmp_path / "in.mkv", numbered_frames(10, 29, 44), "ffv1", "bgr0", rate=12)
    command = [
        sys.executable,
        str(EXAMPLE),
        str(tmp_path / "out"),
        str(clip),
        str(tmp_path / "theirs.mkv"),
        *("--threads", "1", "--lossless"),
    ]
    streamed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert streamed.returncode == 0, streamed.stderr
    reconstructed = runner.invoke(
        app,
        [
            "reconstruct",
            str(clip),
            str(tmp_path / "ours.mkv"),
            "--model",
            str(tmp_path / "model"),
            "--dtype",
            "float32",
            "--lossless",
        ],
    )
    assert reconstructed.exit_code == 0, reconstructed.output
    ours, theirs = (read_clip(tmp_path / f"{name}.mkv", num_frames=10) for name in ("ours", "theirs"))
    with VideoReader(tmp_path / "theirs.mkv") as reader:
        assert sum(chunk.shape[1] for chunk in reader) == 10
    assert (ours - theirs).abs().max() < 3 / 255  # a level of 8 bits, of -1 to 1


def test_a_program_that_computes_something_else_is_refused(make_vae, tmp_path, monkeypatch):
    inner = programs._write_torch

    def wrong(program, path):
        run = inner(program, path)
        return lambda tensors: [run(tensors)[0] * 1.001, *run(tensors)[1:]]

    monkeypatch.setattr(programs, "_write_torch", wrong)
    with pytest.raises(ValueError, match=r"encode_start: the program is 1\.0e-03 off the model"):
        export_model(make_vae(**SMALL), tmp_path, "torch")
    assert not (tmp_path / DESCRIPTION).exists()


def test_wrong_wishes_are_said(make_vae, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--format: 'tflite' is none of onnx, torch"):
        export_model(make_vae(), tmp_path, "tflite")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"ONNX needs onnxscript: pip install .*export"):
        export_model(make_vae(), tmp_path / "none", "onnx")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["export", "bundled", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "is a file; name a folder" in result.stderr
