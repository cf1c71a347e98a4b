"""Half precision, autocast and layerwise casting: finite at the extremes, and close to float32 by stated figures."""

import pytest
import torch
from torch import nn

from vc_vae_diffusers.operators.tdc import TemporalConv3d

HALVES = [torch.float16, torch.bfloat16]
# Of a reconstruction by tiny random models: the PSNR against float32 (measured 61 to 66 and 42 to 50 dB), and the largest
# error relative to the largest value (measured up to 0.02 and 0.11).
PARITY_DB = {torch.float16: 57, torch.bfloat16: 39}
LARGEST = {torch.float16: 0.03, torch.bfloat16: 0.25}


def psnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """In dB, the peak being the range of the expected values."""
    error = (actual.float() - expected).square().mean()
    return 10 * torch.log10((expected.max() - expected.min()).square() / error).item()


def largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).abs().max() / expected.abs().max()).item()


def extremes(frames: int, height: int, width: int) -> dict[str, torch.Tensor]:
    ones = torch.ones(1, 3, frames, height, width)
    t, y, x = (torch.arange(n) for n in (frames, height, width))
    pixels = 1 - 2 * ((t[:, None, None] + y[:, None] + x) % 2).float()
    blocks = 1 - 2 * ((t[:, None, None] + y[:, None] // 8 + x // 8) % 2).float()
    flashes = 1 - 2 * (t % 2).float()[:, None, None]
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None, None]
    return {
        "white": ones,
        "black": -ones,
        "grey": 0 * ones,
        "red": ones * red,
        "a checkerboard of pixels that flips": ones * pixels,
        "a checkerboard of blocks that flips": ones * blocks,
        "flashes": ones * flashes,
    }


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causality", ["group", "causal"])
def test_half_precision_is_finite_and_close_at_the_extremes(make_vae, dtype, causality):
    vae = make_vae(temporal_causality=causality)
    half = make_vae(temporal_causality=causality).to(dtype)
    for name, video in extremes(5, 16, 16).items():
        expected = vae(video)
        out = half(video.to(dtype))
        assert out.sample.dtype == dtype
        assert out.sample.isfinite().all(), name
        for value in (out.latent_dist.mean, out.latent_dist.std, out.latent_dist.var):
            assert value.isfinite().all(), name
        assert largest(out.sample, expected.sample) < LARGEST[dtype], name


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
def test_parity_with_float32(make_vae, make_video, dtype):
    vae, half, video = make_vae(), make_vae().to(dtype), make_video(9)
    expected = vae(video).sample
    assert PARITY_DB[dtype] < psnr(half(video.to(dtype)).sample, expected) < 80  # not equal: it ran in half precision
    half.fuse_tdc()
    assert PARITY_DB[dtype] < psnr(half(video.to(dtype)).sample, expected) < 80


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_streams_and_tiles(make_vae, make_video, dtype):
    """Chunks see the same numbers as the whole clip; tiles keep constant areas constant while they blend."""
    vae, video = make_vae().to(dtype), make_video(9).to(dtype)
    z = vae.encode(video).latent_dist.parameters
    stream = torch.cat([p.parameters for p in vae.encode_stream(video.split(2, dim=2))], dim=2)
    assert stream.dtype == dtype
    assert largest(stream, z.float()) < LARGEST[dtype] / 4
    vae.enable_tiling(16, 16, 8, 8)
    out = vae(torch.nn.functional.pad(video, (0, 8, 0, 8), mode="constant"))
    assert out.sample.dtype == dtype
    assert out.sample.isfinite().all()


@torch.no_grad()
def test_an_image_in_float16_equals_its_clip(make_vae, make_video):
    vae, image = make_vae().half(), make_video(1).half()
    z, clip = (vae.encode(v).latent_dist.mean.float() for v in (image, image.expand(-1, -1, 4, -1, -1)))
    assert largest(clip, z) < LARGEST[torch.float16]


def test_training_under_autocast(make_vae, make_video):
    vae, video = make_vae().train(), make_video(6)
    expected = vae(video).sample
    with torch.autocast("cpu", torch.bfloat16):
        out = vae(video, sample_posterior=True, generator=torch.Generator().manual_seed(0))
        plain = vae(video)
        loss = (out.sample.float() - video).abs().mean()
    loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in vae.parameters())
    assert all(p.grad.isfinite().all() for p in vae.parameters())
    assert PARITY_DB[torch.bfloat16] < psnr(plain.sample, expected) < 80
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        chunks = torch.cat([p.parameters for p in vae.encode_stream(video.split(5, dim=2))], dim=2)
        whole = vae.encode(video).latent_dist.parameters
    assert largest(chunks, whole.float()) < LARGEST[torch.bfloat16] / 4


@torch.no_grad()
def test_inference_mode(make_vae, make_video):
    vae, video = make_vae(), make_video(9)
    expected = vae(video).sample
    with torch.inference_mode():
        out = vae(video)
        frames = torch.cat(list(vae.decode_stream([out.latent_dist.mode()], num_frames=9)), dim=2)
    torch.testing.assert_close(out.sample, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_layerwise_casting_stores_small_and_computes_large(make_vae, make_video):
    vae, video = make_vae(), make_video(9)
    expected = vae(video).sample
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    def stored():
        return {
            kind: {m.weight.dtype for m in vae.modules() if isinstance(m, kind)}
            for kind in (TemporalConv3d, nn.Conv2d, nn.GroupNorm)
        }

    assert stored() == {TemporalConv3d: {torch.bfloat16}, nn.Conv2d: {torch.bfloat16}, nn.GroupNorm: {torch.float32}}
    for _ in range(2):
        sample = vae(video).sample
        assert sample.dtype == torch.float32
        assert PARITY_DB[torch.bfloat16] < psnr(sample, expected) < 80
    assert stored()[TemporalConv3d] == {torch.bfloat16}
    stream = torch.cat([p.parameters for p in vae.encode_stream(video.split(2, dim=2))], dim=2)
    torch.testing.assert_close(stream, vae.encode(video).latent_dist.parameters, rtol=0, atol=1e-5)
