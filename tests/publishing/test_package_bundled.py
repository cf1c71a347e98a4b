"""The folder that the package carries: made of trained weights, results and logs."""

import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers import bundled_model_path
from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE

pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[2] / "examples" / "package_bundled.py"


@pytest.fixture(scope="module")
def package():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("package_bundled", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_log(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def logs(tmp_path) -> list[str]:
    """Logs of both training scripts; the second was stopped and trained its last steps again."""
    images = [
        {"step": s, "l1": 1 / s, "kl": 1.0, **({"psnr": 20 + s / 100} if s % 200 == 0 else {})} for s in range(50, 601, 50)
    ]
    clips = [{"step": s, "l1": 0.1, "loss": 0.2 + 1 / s, "psnr": 99.0} for s in range(10, 401, 10)]
    clips += [{"step": s, "validation_psnr": 24 + s / 100, "validation_ssim": 0.7} for s in (200, 400)]
    write_log(tmp_path / "images.jsonl", images)
    write_log(tmp_path / "clips.jsonl", [{"step": 400, "loss": 7.0}, *clips])
    return [f"image VAE={tmp_path / 'images.jsonl'}", f"Stage I={tmp_path / 'clips.jsonl'}"]


def write_results(path: Path, size: int) -> Path:
    """A result file of `vcvae evaluate`, as far as the card reads it."""
    models = [
        {
            "label": label,
            "date": "2026-01-02T03:04:05+00:00",
            "metrics": {"psnr": {"value": value + size / 1000}, "ssim": {"value": 0.75}, "fvd": {"value": 1.0}},
        }
        for label, value in (("VC-VAE (bundled)", 25.5), ("untrained", 23.25), ("Stage I", 24.75))
    ]
    protocol = {"num_frames": 16, "size": size}
    path.write_text(json.dumps({"protocol": protocol, "samples": {"count": 7}, "models": models}))
    return path


def test_a_log_is_read_step_by_step(package, logs):
    losses, qualities = package.read_log(Path(logs[0].partition("=")[2]))
    assert losses == [(s, 1 / s) for s in range(50, 601, 50)]
    assert qualities == [(200, 22.0), (400, 24.0), (600, 26.0)]
    losses, qualities = package.read_log(Path(logs[1].partition("=")[2]))
    assert losses == [(s, 0.2 + 1 / s) for s in range(10, 401, 10)]  # the last row of a step counts
    assert qualities == [(200, 26.0), (400, 28.0)]  # not the PSNR of the clips trained on
    rows = [{"step": 50, "l1": 0.1, "psnr_128": 25.0, "psnr_256": 27.0}, {"step": 100, "l1": 0.05}]
    assert package.read_log(write_log(Path(logs[0].partition("=")[2]), rows)) == ([(50, 0.1), (100, 0.05)], [(50, 25.0)])
    assert package.smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_curves_are_small_and_show_every_run(package, logs):
    one, two = (package.draw_curves(package.parse_logs(logs[:count])) for count in (1, 2))
    first, second = (Image.open(io.BytesIO(content)) for content in (one, two))
    assert first.height == second.height > 300
    assert second.width == 2 * first.width
    assert len(two) < package.MAX_CURVES_BYTES
    half = second.convert("RGB").crop((second.width // 2, 0, second.width, second.height))
    assert len(half.getcolors(1 << 20)) > 10


def test_logs_and_results_that_cannot_serve_are_refused(package, tmp_path):
    for pair in ("Stage I", f"={SCRIPT}", f"Stage I={tmp_path / 'none.jsonl'}"):
        with pytest.raises(ValueError, match=r"--logs .* is not NAME=FILE"):
            package.parse_logs([pair])
    log = write_log(tmp_path / "empty.jsonl", [{"step": 1, "validation_psnr": 20.0}])
    with pytest.raises(ValueError, match="no row with loss or l1"):
        package.read_log(log)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"models": [{"label": "other", "metrics": {}}]}))
    with pytest.raises(ValueError, match=r"results of \['other'\], none of 'VC-VAE \(bundled\)'"):
        package.measured(results)


def test_the_packaged_folder(package, logs, tmp_path, monkeypatch):
    tiny_vae().save_pretrained(tmp_path / "trained")
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / name, numbered_frames(16, 128, 128))
    (tmp_path / "clips.txt").write_text("[train]\na.mp4\n[holdout]\nb.mp4\n")
    monkeypatch.setattr(package, "CLIPS", tmp_path / "clips.txt")
    results = [str(write_results(tmp_path / f"holdout-{size}.json", size)) for size in (128, 256)]
    (tmp_path / "training.md").write_text("By a test.\n")
    arguments = ["--model", str(tmp_path / "trained"), "--data", str(tmp_path), "--trained", str(tmp_path / "training.md")]
    arguments += ["--results", *results, "--logs", *logs, "--out", str(tmp_path / "packed")]
    package.main(arguments)
    package.main(arguments)  # replaces what is there

    folder = tmp_path / "packed"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "diffusion_pytorch_model.safetensors", "loss_curves.png", "vc_vae_diffusers.py"),
        "reconstruction.png",
    }
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    vae = AutoencoderKLVCVAE.from_pretrained(folder)
    assert vae.config.latents_mean != tiny_vae().config.latents_mean
    assert str(tmp_path) not in (folder / "config.json").read_text()

    bundled = bundled_model_path()
    assert {path.name for path in bundled.iterdir()} == {path.name for path in folder.iterdir()}
    card = ModelCard((folder / "README.md").read_text())
    values = [(result.metric_name, result.metric_value, result.dataset_name[-6:]) for result in card.data.eval_results]
    assert values == [
        ("PSNR", 25.628, "128 px"),
        ("SSIM", 0.75, "128 px"),
        ("PSNR", 25.756, "256 px"),
        ("SSIM", 0.75, "256 px"),
    ]
    pictured = (
        re.escape("![Frames and their reconstruction](reconstruction.png)")
        + r"\n\nAbove, frames of .* dB PSNR over \d frames\."
    )
    for shown in (card.text, (bundled / "README.md").read_text()):
        assert re.search(pictured, shown)
    assert "By a test.\n\n![Training loss and PSNR on held-out clips](loss_curves.png)" in card.text
    assert re.findall(r"^\| 7 held-out clips, 16 frames, (\d+) px \| PSNR dB \| SSIM \|$", card.text, re.M) == ["128", "256"]
    assert "| untrained | 23.38 | 0.7500 |\n| Stage I | 24.88 | 0.7500 |" in card.text
    assert "| Stage I | 25.01 | 0.7500 |" in card.text
