"""The app's requests, without a browser: what comes out is what the library gives, and what cannot be done is said."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from video_files import encode, numbered_frames

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.app.limits import Limits
from vc_vae_diffusers.app.models import BUNDLED, Models
from vc_vae_diffusers.app.player import player
from vc_vae_diffusers.app.work import Cancelled, Wish, carry_out, in_step
from vc_vae_diffusers.coding.reconstruction import reconstruct_file
from vc_vae_diffusers.video import VideoReader, read_clip, to_uint8

CPU = torch.device("cpu")


@pytest.fixture
def model(make_vae, tmp_path) -> str:
    make_vae().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def clip(tmp_path) -> Path:
    return encode(tmp_path / "in.mkv", numbered_frames(14, 29, 67), "ffv1", "bgr0", rate=12)


def read(path: Path) -> torch.Tensor:
    with VideoReader(path) as reader:
        return torch.cat(list(reader), dim=1)


def ask(wish: Wish, folder: Path, limits: Limits | None = None, stop_at: str = "never"):
    folder.mkdir(exist_ok=True)
    told: list[str] = []

    def cancelled() -> bool:
        return any(stop_at in line for line in told)

    models = Models([BUNDLED, wish.model], CPU)
    return carry_out(wish, models, limits or Limits(), folder, told.append, cancelled), told


def test_a_video_gives_what_the_command_gives(model, clip, tmp_path):
    outcome, told = ask(Wish(clip, model, num_frames=10), tmp_path / "out")
    assert (outcome.frames, outcome.width, outcome.height, outcome.fps) == (10, 67, 29, 12)
    vae = AutoencoderKLVCVAE.from_pretrained(model).eval()
    vae.fuse_tdc()
    with VideoReader(clip, num_frames=10, batch_dim=True) as reader:
        expected = reconstruct_file(vae, reader, tmp_path / "expected.mp4")
    assert outcome.scores.summary() == {key: expected[key] for key in outcome.scores.summary()}
    assert outcome.reconstruction.read_bytes() == (tmp_path / "expected.mp4").read_bytes()
    panels = read(outcome.comparison)
    assert panels.shape == (3, 10, 3 * 29, 67)  # a wide frame's panels lie above each other
    source = read_clip(clip, num_frames=10)
    assert (panels[:, :, :29] - source).abs().mean() < 0.1
    assert (panels[:, :, 29:58] - read(outcome.reconstruction)).abs().mean() < 0.1
    assert outcome.latents_picture.exists()
    assert outcome.motion_picture.exists()
    assert any(re.fullmatch(r"encoding: 8 of 10 frames, .* frames/s, about \d+ s left", line) for line in told), told
    assert {"PSNR", "SSIM", "frames", "latents", "time", "memory"} == set(outcome.facts)


def test_latents_dropped_in_again_give_the_same_video(model, clip, tmp_path):
    first, _ = ask(Wish(clip, model), tmp_path / "first")
    again, _ = ask(Wish(first.latents, model), tmp_path / "again")
    assert again.panels == ["reconstruction"]
    difference = read(again.reconstruction) - read(first.reconstruction)
    assert difference.abs().max() == 0
    assert again.scores.psnr.tolist() == []


def test_latents_of_an_image_called_latents_keep_their_picture(model, tmp_path):
    """The drawing of latents has that name."""
    Image.new("RGB", (24, 40), (200, 30, 90)).save(tmp_path / "in.png")
    first, _ = ask(Wish(tmp_path / "in.png", model), tmp_path / "first")
    dropped = first.latents.rename(tmp_path / "latents.safetensors")
    again, _ = ask(Wish(dropped, model), tmp_path / "again")
    assert torch.equal(read(again.reconstruction), read(first.reconstruction))
    assert again.latents_picture != again.reconstruction


def test_an_image_stays_one(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 24, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "in.png")
    outcome, _ = ask(Wish(tmp_path / "in.png", model), tmp_path / "out")
    panels = Image.open(outcome.comparison)
    assert panels.size == (3 * 24, 40)  # a tall frame's panels lie beside each other
    assert torch.equal(to_uint8(read(outcome.comparison))[:, 0, :, :24].permute(1, 2, 0), pixels)
    assert Image.open(outcome.reconstruction).size == (24, 40)
    assert outcome.motion_picture is None


def test_frames_that_were_left_out_are_told(model, clip, tmp_path):
    twelve = encode(tmp_path / "12.mp4", numbered_frames(12, 16, 32), rate=12)
    assert ask(Wish(twelve, model, num_frames=4), tmp_path / "few")[0].facts["frames"] == "4 of the file's 12, 32x16"
    assert ask(Wish(twelve, model, num_frames=32), tmp_path / "all")[0].facts["frames"] == "12, 32x16"


def test_frames_are_made_smaller_and_never_larger(model, clip, tmp_path):
    smaller, _ = ask(Wish(clip, model, num_frames=4, short_side=16), tmp_path / "smaller")
    assert min(smaller.width, smaller.height) == 16
    same, _ = ask(Wish(clip, model, num_frames=4, short_side=256), tmp_path / "same")
    assert (same.width, same.height) == (67, 29)


@pytest.mark.parametrize(
    ("limits", "wish", "said"),
    [
        (Limits(frames=8), {}, "14 frames are more than the 8"),
        (Limits(side=40), {}, "choose a short side of at most 17 pixels"),
        (Limits(megabytes=1), {"size": 1_100_000}, "has 1 MB, this app takes up to 1 MB"),
        (Limits(), {"tile": 12}, "Tiles of 12 pixels: this model takes multiples of 8"),
        (Limits(), {"model": "../nope"}, "nope"),
        (Limits(), {"broken": True}, "in.mkv"),
    ],
)
def test_what_cannot_be_done_is_said_before_work(model, clip, tmp_path, limits, wish, said):
    if size := wish.pop("size", 0):
        with open(clip, "ab") as file:
            file.write(bytes(size))
    if wish.pop("broken", False):
        clip.write_bytes(b"no video at all" * 100)
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        ask(Wish(clip, **{"model": model, **wish}), tmp_path / "out", limits)
    assert list((tmp_path / "out").glob("*.mp4")) == []


def test_large_pictures_in_small_files_are_refused(model, tmp_path):
    """Their size after resizing would do."""
    Image.new("RGB", (1200, 1000)).save(tmp_path / "bomb.png")
    encode(tmp_path / "bomb.mkv", np.zeros((1, 1000, 1200, 3), np.uint8), "ffv1", "bgr0")
    for source in (tmp_path / "bomb.png", tmp_path / "bomb.mkv"):
        with pytest.raises(ValueError, match="has 1,200,000 pixels, this app takes up to 1,000,000: make it smaller first"):
            ask(Wish(source, model, short_side=16), tmp_path / "out", Limits(megapixels=1))


def test_latents_that_contradict_their_header_are_refused(model, clip, tmp_path):
    """A header may claim frames that the tensors do not hold: sizes are checked by what it says."""
    first, _ = ask(Wish(clip, model), tmp_path / "first")
    with safe_open(str(first.latents), "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["latents"] = tensors["latents"].repeat(1, 1, 1, 1, 40)
    save_file(tensors, tmp_path / "wide.safetensors", metadata=header)
    with pytest.raises(ValueError, match="do not fit its header's frames and size"):
        ask(Wish(tmp_path / "wide.safetensors", model), tmp_path / "out")


def test_work_that_takes_too_long_is_ended_after_the_first_group(model, clip, tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr("vc_vae_diffusers.app.work.time.monotonic", lambda: float(next(now)))
    with pytest.raises(ValueError, match=r"about \d+ minutes here, and the app stops at 11"):
        ask(Wish(clip, model), tmp_path / "out", Limits(seconds=660))


@pytest.mark.parametrize("stage", ["encoding: 4", "decoding and measuring: 4"])
def test_cancelling_leaves_no_result(model, clip, tmp_path, stage):
    with pytest.raises(Cancelled):
        ask(Wish(clip, model), tmp_path / "out", stop_at=stage)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".mp4", ".part")] == []


def test_only_what_is_offered_where_strangers_ask(model):
    models = Models([BUNDLED], CPU, any_model=False)
    with pytest.raises(ValueError, match="not offered here: choose one of bundled"), models.use(model, torch.float32):
        pass


def test_a_model_is_loaded_once_and_tiles_do_not_stay(model, clip):
    models = Models([model], CPU)
    with models.use(model, torch.float32, tile=16) as first:
        assert first.use_tiling
    with models.use(model, torch.float32) as second:
        assert second is first
        assert not second.use_tiling
    with models.use(model, torch.bfloat16) as other:
        assert other.dtype == torch.bfloat16


def test_a_pipeline_s_folder_will_do(model, tmp_path):
    shutil.move(model, tmp_path / "pipeline" / "vae")
    with Models([BUNDLED], CPU).use(str(tmp_path / "pipeline"), torch.float32) as vae:
        assert isinstance(vae, AutoencoderKLVCVAE)


def test_frames_come_in_step_whatever_the_chunks(clip):
    with VideoReader(clip, batch_dim=True, chunk_frames=5) as reader:
        take = in_step(reader)
        parts = [take(count) for count in (4, 3, 7)]
    assert [part.shape[2] for part in parts] == [4, 3, 7]
    assert torch.equal(torch.cat(parts, dim=2)[0], read(clip))


def test_the_player_cannot_be_escaped_from(model, clip, tmp_path):
    outcome, _ = ask(Wish(clip, model, num_frames=4), tmp_path / "out")
    outcome.panels = ["source", "</script><b>", '"x"']
    page = player(outcome, "gradio_api/file=/a b.mp4")
    assert "</script><b>" not in page
    settings = json.loads(re.search(r"const settings = (.*?);\n", html.unescape(page))[1])
    assert settings["panels"] == outcome.panels
    assert (len(settings["times"]), settings["across"]) == (4, False)
