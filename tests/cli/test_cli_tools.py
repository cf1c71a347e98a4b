"""The smaller commands, through the real command line."""

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.report.visualize import tdc_layers
from vc_vae_diffusers.training.latent_stats import measure_latents
from vc_vae_diffusers.video import VideoWriter, write_image

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    folder = tmp_path_factory.mktemp("model")
    vae = AutoencoderKLVCVAE(**config)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 5:  # slices of differences start at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.2 * parameter.std().item())
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    torch.manual_seed(1)
    for name in ("a", "b"):
        background = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8), (48, 64), mode="bilinear")[0] * 2 - 1
        with VideoWriter(folder / f"{name}.mp4", 24) as writer:
            for t in range(12):
                writer.write(background.roll(2 * t, dims=2)[:, None])
    return folder


def run(*args):
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result


def test_stats_are_those_of_the_library_and_land_in_the_config(model, videos, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(model, place)
    output = run("stats", "--data", videos, "--model", place, "--num-frames", 8, "--size", 32, "--write", "--json").stdout
    result = json.loads(output)
    vae = AutoencoderKLVCVAE.from_pretrained(place)
    expected = measure_latents(vae, [str(videos / "a.mp4"), str(videos / "b.mp4")], num_frames=8, size=32)
    assert torch.tensor(result["latents_std"]).sub(torch.tensor(expected.latents_std)).abs().max() < 1e-5
    assert vae.config.scaling_factor == pytest.approx(expected.scaling_factor, rel=1e-5)
    assert list(vae.config.latents_mean) == result["latents_mean"]
    assert result["clips"] == 2


def test_stats_leave_the_config_alone_unless_told(model, videos):
    before = (model / "config.json").read_bytes()
    result = run("stats", "--data", videos, "--model", model, "--num-frames", 4, "--size", 32)
    assert "not written" in result.stdout
    assert (model / "config.json").read_bytes() == before


def test_plan_says_what_to_pass(model):
    result = json.loads(
        run("plan", "--height", 90, "--width", 128, "--num-frames", 8, "--memory", "16GB", "--model", model, "--json").stdout
    )
    assert (result["height"], result["width"], result["num_frames"]) == (96, 128, 8)
    assert result["fits"]
    assert result["memory"] == 16 * 10**9
    assert {estimate["operation"] for estimate in result["estimates"]} == {"encode", "decode"}
    assert "--groups-per-chunk" in run("plan", "--height", 96, "--width", 128, "--model", model).stdout


def test_help_shows_no_value_for_flags():
    for command in ([], ["app"], ["reconstruct"], ["train"]):
        assert "bool" not in run(*command, "--help").stdout.lower()


def test_tables_leave_nothing_out_where_terminals_are_narrow(model, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    far = tmp_path / ("a" * 30) / "b.png"
    far.parent.mkdir()
    write_image(far.parent / "in.png", torch.zeros(3, 16, 16))
    for arguments in (
        ("plan", "--height", 96, "--width", 128, "--model", model),
        ("info", model),
        ("reconstruct", far.parent / "in.png", far, "--model", model),
    ):
        assert "…" not in run(*arguments).stdout
    assert " 0-0 │" not in run("reconstruct", far, far.with_name("c.png"), "--model", model).stdout  # it is frame 0


def test_visualize_takes_one_clip(model, videos, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, said in (
        (videos, "videos, but one clip is drawn at a time"),
        (tmp_path / "empty", "is a folder without images;"),
    ):
        done = runner.invoke(app, ["visualize", str(folder), str(tmp_path / "x.png"), "--model", str(model)])
        assert done.exit_code == 1
        assert said in " ".join(done.stderr.split())


def test_visualize_draws_the_layer_asked_for(model, videos, tmp_path):
    out = tmp_path / "components.png"
    result = json.loads(
        run("visualize", videos / "a.mp4", out, "--model", model, "--layer", "encoder.conv_in", "--json").stdout
    )
    assert result["layer"] == "encoder.conv_in"
    assert result["frames"] == [9, 10, 11]
    assert 0 < result["motion_share"] < 1
    from PIL import Image

    picture = Image.open(out)
    assert picture.width == 5 * (192 + 2)
    default = json.loads(run("visualize", videos / "a.mp4", out, "--model", model, "--overwrite", "--json").stdout)["layer"]
    assert default in tdc_layers(AutoencoderKLVCVAE.from_pretrained(model))


def test_wrong_calls_are_one_line_with_a_remedy(model, videos, tmp_path):
    wrong = runner.invoke(
        app, ["visualize", str(videos / "a.mp4"), str(tmp_path / "x.png"), "--model", str(model), "--layer", "x"]
    )
    assert wrong.exit_code == 1
    assert "for example encoder.conv_in" in wrong.stderr
    wrong = runner.invoke(app, ["stats", "--data", str(tmp_path), "--model", str(model)])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("Error: ")
    wrong = runner.invoke(app, ["fetch-weights", "resnet", "--to", str(tmp_path), "--json"])
    assert wrong.exit_code == 1
    assert "only i3d and lpips can be fetched" in json.loads(wrong.stdout)["error"]["message"]
    wrong = runner.invoke(app, ["plan", "--height", "64", "--width", "64", "--memory", "lots", "--model", str(model)])
    assert wrong.exit_code == 1
    assert "lots" in wrong.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("reconstruct", "IN... OUT"),
        ("encode", "IN... OUT"),
        ("decode", "IN... OUT"),
        ("report", "RESULT..."),
        ("info", "[MODEL]"),
        ("fetch-weights", "[lpips|i3d]..."),
    ],
)
def test_usage_lines_name_each_argument_once(command, arguments):
    printed = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    usage = next(line for line in printed.splitlines() if "Usage:" in line)
    assert re.sub(r"[{}]", "", usage).split("[OPTIONS] ")[1].strip() == arguments


def test_what_is_no_result_file_is_told_in_words(tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\x00\x9d\xff")
    wrong = runner.invoke(app, ["report", str(clip), "--out", str(tmp_path / "report")])
    assert wrong.exit_code == 1
    assert wrong.stderr.strip().endswith("clip.mp4 is no text; give a result file, which `vcvae evaluate` writes")


def test_every_command_is_registered():
    names = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    expected = {
        "reconstruct",
        "encode",
        "decode",
        "info",
        "plan",
        "visualize",
        "evaluate",
        "report",
        "fetch-weights",
        "stats",
        "export",
    }
    assert names == expected | {"demo", "app"}
    for name in names:
        assert runner.invoke(app, [name, "--help"]).exit_code == 0
