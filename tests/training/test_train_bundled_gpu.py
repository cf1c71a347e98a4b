"""The trainer for one GPU, on a CPU: its clips, its optimizer, and both stages from clips to a model that loads."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from video_files import encode, frame_numbers, numbered_frames

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.training.clip_plan import Bucket, parse_buckets
from vc_vae_diffusers.training.device_clips import ClipStore, recoloured
from vc_vae_diffusers.training.muon import MuonAdam, orthogonalised

SCRIPT = Path(__file__).parents[2] / "examples" / "train_bundled_gpu.py"


@pytest.fixture(scope="module")
def script():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("train_bundled_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bucket(text: str) -> Bucket:
    return parse_buckets([text])[0]


def where_clip(frames: int, height: int, width: int) -> torch.Tensor:
    """A clip whose colours are the number of the frame, the row and the column."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width)), indexing="ij")
    return torch.stack([t, y, x], dim=-1).byte()


def places(batch: torch.Tensor) -> torch.Tensor:
    """The numbers that the pixels of a batch of `where_clip` say, (B, 3, T, H, W)."""
    return ((batch + 1) * 127.5).round().long()


def test_crops_are_whole_and_frames_follow_each_other():
    torch.manual_seed(0)
    store = ClipStore([where_clip(40, 20, 30)], sides=(), device=torch.device("cpu"))
    batch = places(store.batch(bucket("size=16 frames=4 fps=0 batch=256"), static=0.25, jitter=0.0))
    assert batch.shape == (256, 3, 4, 16, 16)
    t, y, x = batch.unbind(1)
    assert (t == t[:, :, :1, :1]).all()
    assert (y.diff(dim=2) == 1).all()
    across = x.diff(dim=3)
    assert (across == across[:, :1, :1, :1]).all()
    assert set(across[:, 0, 0, 0].tolist()) == {1, -1}
    pace = t[:, :, 0, 0].diff(dim=1)
    assert (pace == pace[:, :1]).all()
    assert set(pace[:, 0].tolist()) == {0, 1, -1, 2, -2}
    assert 0.1 < (pace[:, 0] == 0).double().mean() < 0.4
    # Every place that a crop can take is taken, the outermost ones too.
    assert t.min() == 0
    assert t.max() == 39
    assert set(y[:, 0, 0, 0].tolist()) == set(range(5))
    assert set(x.amin(dim=(1, 2, 3)).tolist()) == set(range(15))


def test_smaller_copies_serve_too_and_small_clips_are_left_out():
    clips = [torch.full((3, 32, 48, 3), 200, dtype=torch.uint8), torch.zeros((3, 8, 8, 3), dtype=torch.uint8)]
    store = ClipStore(clips, sides=(64, 32, 16), device=torch.device("cpu"))
    geometry, weights = store.suitable(bucket("size=16 frames=2 fps=0 batch=8"))
    assert geometry[:, 1:].tolist() == [[3, 32, 48], [3, 16, 24]]
    assert weights.tolist() == pytest.approx([3**0.5 / 2] * 2)
    assert (places(store.batch(bucket("size=16 frames=2 fps=0 batch=8"), 0.0, 0.0)) == 200).all()
    with pytest.raises(ValueError, match="40x40x2@0: no clip is as large and long"):
        store.suitable(bucket("size=40 frames=2 fps=0 batch=8"))


def test_pictures_are_clips_that_stand_still():
    store = ClipStore([where_clip(1, 16, 16)], sides=(), device=torch.device("cpu"))
    assert places(store.batch(bucket("size=8x12 frames=4 fps=0 batch=16"), 0.0, 0.0)).unbind(1)[0].eq(0).all()


def test_colours_change_by_clip_and_stay_in_range():
    torch.manual_seed(0)
    video = torch.rand(4, 3, 5, 5, 3) * 2 - 1
    changed = recoloured(video)
    assert changed.shape == video.shape
    assert changed.abs().max() <= 1
    assert not torch.allclose(changed, video)
    still = recoloured(torch.full((2, 3, 5, 5, 3), 0.25))
    torch.testing.assert_close(still, still[:, :1, :1, :1].expand_as(still))


def test_newton_schulz_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((2, 16, 48), (1, 48, 16)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_moves_every_slice_by_the_learning_rate_and_adam_the_rest():
    torch.manual_seed(0)
    kernel, bias = torch.nn.Parameter(torch.zeros(16, 16, 3, 3, 3)), torch.nn.Parameter(torch.zeros(16))
    optimizer = MuonAdam([kernel, bias], muon=True, learning_rate=torch.tensor(0.01))
    gradient = torch.randn(16, 16, 3, 3, 3)
    gradient[:, :, 2] *= 1e-3  # a slice with small gradients learns as fast
    norm = optimizer.step([gradient, torch.full((16,), -0.1)])
    torch.testing.assert_close(norm, torch.cat([gradient.flatten(), torch.full((16,), 0.1)]).norm())
    sizes = kernel.detach().square().mean(dim=(0, 1, 3, 4)).sqrt() / 0.01
    assert ((sizes > 0.12) & (sizes < 0.24)).all()  # 0.2 on the whole, singular values being near one
    assert (kernel * gradient).sum() < 0
    torch.testing.assert_close(bias.detach(), torch.full((16,), 0.01), rtol=1e-3, atol=0)


def test_gradients_that_are_not_finite_do_not_spoil_the_weights():
    bias = torch.nn.Parameter(torch.zeros(4))
    optimizer = MuonAdam([bias], muon=False, learning_rate=torch.tensor(0.01))
    optimizer.step([torch.tensor([1.0, float("nan"), float("inf"), -1.0])])
    torch.testing.assert_close(bias.detach(), torch.tensor([-0.01, 0.0, 0.0, 0.01]), rtol=1e-3, atol=1e-8)


def test_the_rate_rises_stays_and_falls(script):
    args = script.parse_args(["image", "--data", "x", "--output", "x", "--warmup", "0.1", "--decay", "0.5"])
    rates = [script.rate(progress, args) for progress in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0, 1.2)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])


def test_both_stages_from_clips_to_a_model_that_loads(script, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / name, numbered_frames(20))
    (tmp_path / "clips.txt").write_text("[train]\na.mp4\n[holdout]\nb.mp4\n")
    (clip,) = script.read_clips(tmp_path, ["a.mp4"])
    assert clip.shape == (20, 48, 64, 3)
    assert clip.dtype == torch.uint8
    assert frame_numbers(clip.movedim(-1, 0)) == list(range(20))

    common = ["--data", str(tmp_path), "--clips", str(tmp_path / "clips.txt"), "--no_compile", "--lpips_weight", "0"]
    common += ["--device", "cpu", "--warmup", "0.1", "--ema_decay", "0.5", "--sides", "32"]
    image, video = tmp_path / "image", tmp_path / "video"
    shape = ["--channels", "8", "8", "16", "16", "--norm_num_groups", "4"]
    script.main(
        ["image", *common, *shape, "--output", str(image), "--steps", "30", "--buckets", "size=32 frames=1 fps=0 batch=4"]
    )
    assert isinstance(AutoencoderKL.from_pretrained(image / "vae"), AutoencoderKL)
    (row,) = [json.loads(line) for line in (image / "log.jsonl").read_text().splitlines()]
    assert row["step"] == 30
    assert row["psnr_128"] > 9

    clips = ["size=16 frames=8 fps=0 batch=2 weight=2", "size=32 frames=4 fps=0 batch=1"]
    stage = ["video", *common, "--output", str(video), "--from_image_vae", str(image / "vae")]
    script.main([*stage, "--steps", "3", "--static", "0", "--buckets", *clips])
    vae = AutoencoderKLVCVAE.from_pretrained(video / "vae").eval()
    # Slices of time, zero in the inflated model, have learnt.
    learnt = [p for n, p in vae.named_parameters() if p.ndim == 5 and p.shape[2] == 3 and p[:, :, 0].abs().max() > 0]
    assert len(learnt) > 8
    with pytest.raises(ValueError, match="--from_image_vae or --model"):
        script.main(["video", *common, "--output", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="write fps=0"):
        script.main([*stage, "--buckets", "size=16 frames=8 fps=24 batch=2"])


@pytest.fixture
def small_run(tmp_path):
    """Arguments of a short run with a bucket of each kind, but for its output."""
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / name, numbered_frames(20))
    (tmp_path / "clips.txt").write_text("[train]\na.mp4\n[holdout]\nb.mp4\n")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(tmp_path / "image")
    options = ["video", "--data", str(tmp_path), "--clips", str(tmp_path / "clips.txt"), "--no_compile", "--device", "cpu"]
    options += ["--lpips_weight", "0", "--ema_decay", "0.9", "--sides", "32", "--validate_every", "0", "--steps", "52"]
    buckets = ["size=16 frames=4 fps=0 batch=1 weight=2", "size=16 frames=1 fps=0 batch=2"]
    return [*options, "--from_image_vae", str(tmp_path / "image"), "--buckets", *buckets]


def test_an_interrupted_run_goes_on_to_the_same_weights(script, small_run, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script.main([*small_run, "--output", str(whole)])
    with monkeypatch.context() as patch:
        patch.setattr(script, "rate", lambda part, args, rate=script.rate: 1 / 0 if part > 50.5 / 52 else rate(part, args))
        with pytest.raises(ZeroDivisionError):
            script.main([*small_run, "--output", str(cut)])
    with open(cut / "log.jsonl", "a") as log:
        log.write('{"step": 51, "l1": 0.1}\n{"step": 52, "l')  # what a killed run may have written
    script.main([*small_run, "--output", str(cut)])

    for name in ("vae/diffusion_pytorch_model.safetensors", "state.safetensors"):
        expected, found = load_file(whole / name), load_file(cut / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, cut)]
    assert [row["step"] for row in rows[1]] == [50, 52]
    timeless = [[{name: value for name, value in row.items() if name != "seconds"} for row in run] for run in rows]
    assert timeless[0] == timeless[1]

    before = (cut / "state.safetensors").stat().st_mtime_ns
    script.main([*small_run, "--output", str(cut)])  # it was finished
    assert (cut / "state.safetensors").stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"--output .*cut holds a run with --learning_rate 0.002, --seed 0: go on with these"
    ):
        script.main([*small_run, "--output", str(cut), "--learning_rate", "1", "--seed", "3"])
    with pytest.raises(
        ValueError, match=r"a run with --buckets 'size=16 frames=4 fps=0 batch=1 weight=2' 'size=.*', --sides 32:"
    ):
        script.main([*small_run, "--output", str(cut), "--sides", "32", "48", "--buckets", "size=16 frames=4 fps=0 batch=1"])
    assert script.spelled("steps", None) == "no --steps"
    (cut / "state.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged \(.*\): remove it, and the run begins anew"):
        script.main([*small_run, "--output", str(cut)])
