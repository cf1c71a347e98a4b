"""`VCVAEVideoProcessor` beside diffusers' own, on what both take, and on what only this one takes."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from tiny_models import tiny_latte, tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers import LatteVCVAEUnconditionalPipeline, VCVAEVideoProcessor
from vc_vae_diffusers.video import VideoReader, VideoReadError

THEIRS, OURS = (
    VideoProcessor(vae_scale_factor=8, vae_latent_channels=16),
    VCVAEVideoProcessor(vae_scale_factor=8, vae_latent_channels=16),
)
CLIP = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 24, 3), dtype=np.uint8)
UNIT = CLIP.astype(np.float32) / 255
TENSOR = torch.from_numpy(UNIT).movedim(-1, 2)  # (B, T, C, H, W)
PILS = [[PIL.Image.fromarray(frame) for frame in clip] for clip in CLIP]
EXPECTED = (torch.from_numpy(CLIP).double() / 127.5 - 1).permute(0, 4, 1, 2, 3)

BOTH_TAKE = {
    "pil frames": PILS[0],
    "pil videos": PILS,
    "one pil": PILS[0][0],
    "numpy": UNIT[0],
    "numpy batch": UNIT,
    "numpy videos": list(UNIT),
    "numpy frames": list(UNIT[0]),
    "torch": TENSOR[0],
    "torch batch": TENSOR,
    "torch videos": list(TENSOR),
    "torch frames": list(TENSOR[0]),
    "torch half": TENSOR.bfloat16(),
    "latents": torch.randn(1, 3, 16, 2, 3),
}


@pytest.mark.parametrize("name", BOTH_TAKE)
@pytest.mark.parametrize("size", [{}, {"height": 8, "width": 32}, {"height": 8}])
def test_what_diffusers_takes_gives_equal_tensors(name, size):
    if name == "latents" and size:
        size = {}
    theirs = THEIRS.preprocess_video(BOTH_TAKE[name], **size)
    ours = OURS.preprocess_video(BOTH_TAKE[name], **size)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning")
def test_signed_values_stay_as_they_are():
    signed = TENSOR * 2 - 1
    assert torch.equal(OURS.preprocess_video(signed), THEIRS.preprocess_video(signed))
    bright = signed.clamp(min=0.25)  # which diffusers takes for [0, 1]
    assert torch.equal(OURS.preprocess_video(bright, value_range=(-1, 1)), bright.movedim(2, 1))
    assert torch.equal(OURS.preprocess_video(bright), THEIRS.preprocess_video(bright))


@pytest.mark.parametrize("mode", ["resize_mode", "crops_coords"])
def test_pil_images_are_resized_and_cut_as_by_diffusers(mode):
    options = {"resize_mode": "crop"} if mode == "resize_mode" else {"crops_coords": (2, 1, 20, 15)}
    ours, theirs = (p.preprocess_video(PILS[0], height=8, width=8, **options) for p in (OURS, THEIRS))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_results_are_those_of_diffusers(output_type):
    video = EXPECTED.float() * 1.1  # overshoots
    ours, theirs = (p.postprocess_video(video, output_type) for p in (OURS, THEIRS))
    if output_type == "pil":
        ours, theirs = ([[np.array(image) for image in clip] for clip in one] for one in (ours, theirs))
    assert len(ours) == 2
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_uint8_is_not_wrapped_around_and_comes_back_exactly():
    for clip in (CLIP, torch.from_numpy(CLIP).movedim(-1, 2), list(CLIP)):
        video = OURS.preprocess_video(clip)
        assert (video - EXPECTED).abs().max() < 1e-6
        assert np.array_equal(OURS.postprocess_video(video, "uint8"), CLIP)
    assert torch.equal(OURS.preprocess_video(CLIP), OURS.preprocess_video(PILS))
    assert torch.equal(OURS.preprocess_video(UNIT * 255, value_range=(0, 255)).round(decimals=5), video.round(decimals=5))


def test_grey_is_repeated_and_alpha_composited_on_black():
    grey = CLIP[0, ..., :1]
    alpha = np.concatenate([CLIP[0], CLIP[1, ..., :1]], axis=-1)
    images = [PIL.Image.fromarray(frame[..., 0]) for frame in grey]
    assert torch.equal(OURS.preprocess_video(grey), OURS.preprocess_video(images))
    assert torch.equal(OURS.preprocess_video(grey), OURS.preprocess_video(grey.repeat(3, -1)))
    on_black = (CLIP[0] / 255) * (CLIP[1, ..., :1] / 255) * 2 - 1
    for video in (alpha, alpha / 255, torch.from_numpy(alpha).movedim(-1, 1), [PIL.Image.fromarray(a) for a in alpha]):
        found = OURS.preprocess_video(video)[0].permute(1, 2, 3, 0)
        assert np.abs(found.numpy() - on_black).max() < 0.011  # Pillow rounds to 8 bits
    palette = PILS[0][0].convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert OURS.preprocess_video(palette)[0, :, 0, 0, 0].tolist() == [-1, -1, -1]


def test_sizes_are_padded_by_the_last_row_and_column_and_cropped_back():
    odd = CLIP[:, :, :13, :19]
    video = OURS.preprocess_video(odd)
    assert video.shape == (2, 3, 5, 16, 24)
    assert torch.equal(video[..., 13:, :19], video[..., 12:13, :19].expand(-1, -1, -1, 3, -1))
    assert torch.equal(video[..., 19:], video[..., 18:19].expand(-1, -1, -1, -1, 5))
    assert np.array_equal(OURS.postprocess_video(video, "uint8", size=(13, 19)), odd)


def test_paths_are_read_as_by_the_reader_and_written(tmp_path):
    clip = encode(tmp_path / "clip.mkv", numbered_frames(9, 44, 64), "ffv1", "bgr0")
    with VideoReader(clip, chunk_frames=9, batch_dim=True) as reader:
        frames = next(iter(reader))
    video = OURS.preprocess_video(clip)
    assert video.shape == (1, 3, 9, 48, 64)
    assert torch.equal(video[..., :44, :], frames)
    both = OURS.preprocess_video([str(clip), clip], height=16, num_frames=4)
    assert both.shape == (2, 3, 4, 16, 64)
    assert torch.equal(both[0], both[1])

    OURS.save_video(video, tmp_path / "out.mkv", 25, size=(44, 64), codec="lossless")
    assert (OURS.preprocess_video(tmp_path / "out.mkv") - video).abs().max() < 1e-6
    OURS.save_video(video[:, :, :1], tmp_path / "out.png", size=(44, 64))
    assert (OURS.preprocess_video(tmp_path / "out.png") - video[:, :, :1]).abs().max() < 1e-6
    with pytest.raises(VideoReadError, match=r"absent\.mp4"):
        OURS.preprocess_video("absent.mp4")


def test_what_is_no_video_is_refused_with_its_remedy():
    for video, options, message in (
        (UNIT * 255, {}, r"values in \[0, 255\], neither .*pass value_range=\(0, 255\), or uint8"),
        (UNIT * np.nan, {}, "NaN or infinite"),
        (CLIP.astype(np.int64), {}, "torch.int64, it must be uint8 or floating point"),
        (CLIP, {"value_range": (0, 1)}, r"video\[0\] is uint8, whose range is \(0, 255\)"),
        (UNIT, {"value_range": (0, 2)}, r"value_range is \(0, 2\), it must be one of"),
        (TENSOR[0].transpose(0, 1), {}, r"shape \(3, 5, 16, 24\), .* pass .transpose\(0, 1\)"),
        (TENSOR.numpy(), {}, r"the order is \(frames, height, width, channels\)"),
        (CLIP, {"height": 12}, "height is 12, not a positive multiple of vae_scale_factor 8: pass 16"),
        (CLIP, {"num_frames": 3}, r"\['num_frames'\]: options of reading, which only paths take"),
        ([CLIP[0], CLIP[1, :4]], {}, "clips of several shapes"),
        ([PILS[0][0], PILS[0][1].resize((8, 8))], {}, r"video has images of several sizes \[\(8, 8\), \(24, 16\)\]"),
        ([PILS[0][0], "a.png"], {}, "its items must be alike"),
        ([PIL.Image.fromarray(np.zeros((8, 8), np.uint16))], {}, r"video\[0\] is a PIL image of mode I;16"),
        ([], {}, r"video is \[\], it must be a path"),
        (3, {}, "video is int, it must be a path"),
        (CLIP[:, :0], {}, "not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            OURS.preprocess_video(video, **options)
    video = torch.zeros(2, 3, 4, 8, 8)
    for argument, output_type, options, message in (
        (video / 0, "pil", {}, "video holds NaN or infinite values"),
        (video[0], "pil", {}, r"video is \(3, 4, 8, 8\), it must be a tensor"),
        (video, "gif", {}, "output_type is 'gif', it must be"),
        (video, "np", {"size": (9, 8)}, r"size is \(9, 8\), it must lie within the frame \(8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            OURS.postprocess_video(argument, output_type, **options)
    with pytest.raises(ValueError, match="video has 2 clips, a file holds one"):
        OURS.save_video(video, "out.mp4")
    with pytest.raises(ValueError, match="do_binarize"):
        VCVAEVideoProcessor(do_binarize=True).preprocess_video(CLIP)


@torch.no_grad()
def test_pipelines_and_models_use_it():
    vae = tiny_vae()
    pipeline = LatteVCVAEUnconditionalPipeline(vae, tiny_latte(), None)
    assert type(pipeline.video_processor) is VCVAEVideoProcessor
    config = pipeline.video_processor.config
    assert (config.vae_scale_factor, config.vae_latent_channels) == (
        vae.spatial_compression_ratio,
        vae.config.latent_channels,
    )
    latents = vae.encode(pipeline.video_processor.preprocess_video(PILS[0])).latent_dist.mode()
    frames = pipeline.video_processor.postprocess_video(vae.decode(latents, num_frames=5).sample, "pil")[0]
    assert [image.size for image in frames] == [(24, 16)] * 5
