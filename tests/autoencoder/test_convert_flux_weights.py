"""The converter as a user runs it: arguments, report, what it writes and what it leaves alone."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_vaes import FLUX, SDXL, SMALL, random_image_vae, to_bfl
from safetensors.torch import load_file, save_file

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE

SCRIPT = Path(__file__).parents[2] / "convert_flux_weights.py"
spec = importlib.util.spec_from_file_location("convert_flux_weights", SCRIPT)
converter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(converter)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "ae.safetensors"
    save_file(to_bfl(random_image_vae({**FLUX, **SMALL})), path)
    return path


def convert(*arguments: str | Path) -> int:
    return converter.main([str(argument) for argument in arguments])


def test_the_command_line(source, tmp_path):
    """In a process of its own, once; the result equals `from_image_vae`."""
    out = tmp_path / "new" / "vcvae"
    done = subprocess.run([sys.executable, SCRIPT, source, out], capture_output=True, text=True, check=True)
    vae, expected = AutoencoderKLVCVAE.from_pretrained(out), AutoencoderKLVCVAE.from_image_vae(source)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(vae.state_dict()[name], tensor), name
    assert vae.config.temporal_downsample == [False, True, True]
    total = sum(p.numel() for p in vae.parameters())
    kinds = {"inflated", "copied", "created"}
    table = {words[0]: words for line in done.stdout.splitlines() if (words := line.split()) and words[0] in kinds}
    assert sum(int(words[3].replace(",", "")) for words in table.values()) == total
    assert sum(int(words[1]) for words in table.values()) == len(list(vae.parameters()))
    assert int(table["created"][1]) == 8
    assert "encoder.down_blocks.1.temporal_downsampler.weight" in done.stdout
    assert "left         0 tensors" in done.stdout
    assert "assumed: no configuration came with the file: scaling_factor 0.3611" in done.stdout
    assert "widened" not in done.stdout
    assert f"{total:,} parameters, 4x8x8, 16 latent channels, scaling_factor 0.3611, shift_factor 0.1159" in done.stdout
    assert "float32: []" not in done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["vcvae"]  # nothing temporary is left


def test_options_reach_the_model(source, tmp_path, capsys):
    out = tmp_path / "vcvae"
    options = ["--compression", "8x8x8", "--operator", "conv", "--causality", "causal", "--dtype", "bfloat16"]
    assert convert(source, out, *options, "--scaling-factor", "1.5305", "--shift-factor", "0.0609") == 0
    written = load_file(out / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    vae = AutoencoderKLVCVAE.from_pretrained(out)
    config = vae.config
    assert (config.temporal_operator, config.temporal_causality) == ("conv", "causal")
    assert (vae.temporal_compression_ratio, config.latent_channels) == (8, 32)
    assert (config.scaling_factor, config.shift_factor) == (1.5305, 0.0609)
    assert config.latents_mean == [0.0609] * 32
    printed = capsys.readouterr().out
    assert "widened" in printed
    assert "encoder.conv_out.weight" in printed
    assert "8x8x8, 32 latent channels, scaling_factor 1.5305, shift_factor 0.0609, bfloat16" in printed


def test_a_folder_with_subfolder(tmp_path):
    random_image_vae({**SDXL, **SMALL}).save_pretrained(tmp_path / "sdxl" / "vae")
    assert convert(tmp_path / "sdxl", tmp_path / "out", "--subfolder", "vae", "--compression", "8x8x8") == 0
    vae = AutoencoderKLVCVAE.from_pretrained(tmp_path / "out")
    assert (vae.config.latent_channels, vae.config.scaling_factor, vae.config.shift_factor) == (8, 0.13025, None)


def test_the_model_card(source, tmp_path):
    assert convert(source, tmp_path / "vcvae", "--licence", "apache-2.0") == 0
    card = (tmp_path / "vcvae" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card
    assert "# VC-VAE 4x8x8, inflated from ae.safetensors" in card
    assert "Nothing was measured on these weights." in card
    assert "Assumed: no configuration came with the file" in card
    assert str(tmp_path / "vcvae") in card
    assert "None of its own" in card


def test_an_existing_folder_is_left_alone_unless_told(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert convert(source, out) == 0  # an empty folder may be filled
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert(source, out, "--operator", "conv") == 1
    assert "which is not empty: pass another folder, or --overwrite" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert convert(source, out, "--operator", "conv", "--overwrite") == 0
    assert AutoencoderKLVCVAE.from_pretrained(out).config.temporal_operator == "conv"

    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("years of work")
    assert convert(source, documents, "--overwrite") == 1
    assert "holds something else than a VC-VAE" in capsys.readouterr().err
    assert (documents / "thesis.txt").read_text() == "years of work"
    assert convert(source, documents / "thesis.txt") == 1
    assert "thesis.txt, a file: pass the name of a folder" in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["save_for_hub", "replace"])
def test_a_failure_leaves_the_old_model_and_no_rest(source, tmp_path, monkeypatch, capsys, failing):
    out = tmp_path / "out"
    assert convert(source, out) == 0
    before = (out / "diffusion_pytorch_model.safetensors").read_bytes()
    if failing == "save_for_hub":

        def save(vae, folder, content, where):
            vae.save_pretrained(folder)
            raise OSError("No space left on device")

        monkeypatch.setattr(converter, "save_for_hub", save)
    else:
        rename, moved = converter.os.replace, []

        def replace(source, target):
            if Path(target) == out and not moved:
                moved.append(source)
                raise OSError("No space left on device")
            rename(source, target)

        monkeypatch.setattr(converter.os, "replace", replace)
    assert convert(source, out, "--operator", "conv", "--overwrite") == 1
    assert "error: No space left on device" in capsys.readouterr().err
    assert (out / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert AutoencoderKLVCVAE.from_pretrained(out).config.temporal_operator == "tdc"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_errors_are_one_line_and_write_nothing(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    save_file({"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    for origin, message in (
        (tmp_path / "empty", "holds no image VAE"),
        (tmp_path / "no" / "such" / "file", "neither a file or folder that exists nor a hub id"),
        (tmp_path / "part.safetensors", "missing keys: encoder.conv_in.weight"),
    ):
        assert convert(origin, tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    for wrong in (["--compression", "4x4x4"], ["--dtype", "int8"], ["--operator", "3d"]):
        with pytest.raises(SystemExit):
            convert(source, tmp_path / "out", *wrong)


def test_hub_options_are_passed_on(tmp_path, monkeypatch, capsys):
    asked = []

    def read(source, subfolder, **options):
        asked.append((source, subfolder, options))
        raise OSError(f"{source} is gated")

    monkeypatch.setattr(converter, "read_image_vae", read)
    options = ["--token", "secret", "--revision", "v1", "--variant", "fp16", "--subfolder", "vae"]
    assert convert("some/repo", tmp_path / "out", *options) == 1
    assert convert("some/repo", tmp_path / "out") == 1
    assert asked == [
        ("some/repo", "vae", {"token": "secret", "revision": "v1", "variant": "fp16"}),
        ("some/repo", None, {}),
    ]
    assert "secret" not in capsys.readouterr().err
