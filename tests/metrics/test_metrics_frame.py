"""Frame metrics against torchmetrics, scikit-image and pytorch-msssim, on frames of real photographs in motion."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vc_vae_diffusers.metrics.frame import (
    FiniteMean,
    flicker,
    frame_index_curve,
    mean_over_frames,
    mean_over_videos,
    psnr,
    ssim,
    temporal_difference_psnr,
)

UNIT = (0.0, 1.0)
SYMMETRIC = (-1.0, 1.0)


@pytest.fixture(scope="module")
def clips():
    """(reconstruction, source): (2, 3, 5, 88, 104) in [0, 1], pans over two photographs, errors that grow with t."""
    skimage_data = pytest.importorskip("skimage.data")
    photographs = [skimage_data.astronaut(), skimage_data.chelsea()]
    source = torch.stack(
        [
            torch.stack([torch.from_numpy(p[40 + 2 * t : 128 + 2 * t, 90 + 3 * t : 194 + 3 * t]) for t in range(5)])
            for p in photographs
        ]
    )
    source = source.permute(0, 4, 1, 2, 3).float() / 255
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool3d(source, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    strength = torch.linspace(0.01, 0.08, 5).view(1, 1, 5, 1, 1)
    return (0.5 * source + 0.5 * blurred + strength * noise).clamp(0, 1), source


def frames_last(video):
    """(B, C, T, H, W) -> (B * T, C, H, W)."""
    return video.transpose(1, 2).flatten(0, 1)


class TestPSNR:
    def test_equals_torchmetrics_per_frame(self, clips):
        torchmetrics = pytest.importorskip("torchmetrics.functional.image")
        reconstruction, source = clips
        expected = torch.stack(
            [
                torchmetrics.peak_signal_noise_ratio(x[None], y[None], data_range=1.0, dim=(1, 2, 3))
                for x, y in zip(frames_last(reconstruction), frames_last(source), strict=True)
            ]
        ).view(2, 5)
        torch.testing.assert_close(psnr(reconstruction, source, data_range=UNIT), expected, rtol=0, atol=1e-4)

    def test_equals_skimage(self, clips):
        skimage_metrics = pytest.importorskip("skimage.metrics")
        reconstruction, source = clips
        ours = psnr(reconstruction, source, data_range=UNIT).flatten()
        pairs = zip(frames_last(reconstruction).numpy(), frames_last(source).numpy(), strict=True)
        for value, (x, y) in zip(ours.tolist(), pairs, strict=True):
            assert abs(value - skimage_metrics.peak_signal_noise_ratio(y, x, data_range=1.0)) < 1e-4

    def test_pooled_error_is_another_number(self, clips):
        """torchmetrics' default pools the squared error over the clip: 1 dB away where the frames differ."""
        torchmetrics = pytest.importorskip("torchmetrics.functional.image")
        reconstruction, source = clips
        pooled = torchmetrics.peak_signal_noise_ratio(reconstruction, source, data_range=1.0)
        ours = mean_over_videos(psnr(reconstruction, source, data_range=UNIT)).mean
        assert ours - float(pooled) > 0.5

    def test_does_not_depend_on_the_range_convention(self, clips):
        reconstruction, source = clips
        unit = psnr(reconstruction, source, data_range=UNIT)
        symmetric = psnr(reconstruction * 2 - 1, source * 2 - 1, data_range=SYMMETRIC)
        torch.testing.assert_close(symmetric, unit, rtol=0, atol=1e-4)

    def test_accepts_uint8(self):
        source = torch.full((1, 3, 2, 16, 16), 200, dtype=torch.uint8)
        reconstruction = source.clone()
        reconstruction[:, :, 1] = 190
        values = psnr(reconstruction, source, data_range=(0.0, 255.0))
        assert values[0, 0] == math.inf
        assert abs(float(values[0, 1]) - 20 * math.log10(25.5)) < 1e-5


class TestSSIM:
    def test_equals_skimage(self, clips):
        skimage_metrics = pytest.importorskip("skimage.metrics")
        reconstruction, source = clips
        ours = ssim(reconstruction, source, data_range=UNIT)
        assert ours.dtype == torch.float32
        pairs = zip(frames_last(reconstruction).double().numpy(), frames_last(source).double().numpy(), strict=True)
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        for value, (x, y) in zip(ours.flatten().tolist(), pairs, strict=True):
            expected = skimage_metrics.structural_similarity(y, x, channel_axis=0, **settings)
            assert abs(value - expected) < 1e-5

    def test_equals_pytorch_msssim(self, clips):
        msssim = pytest.importorskip("pytorch_msssim")
        reconstruction, source = clips
        expected = msssim.ssim(frames_last(reconstruction), frames_last(source), data_range=1.0, size_average=False)
        ours = ssim(reconstruction, source, data_range=UNIT)
        torch.testing.assert_close(ours.flatten(), expected, rtol=0, atol=1e-5)

    def test_padded_borders_are_another_number(self, clips):
        """torchmetrics filters padded frames and crops less than the window: not the number papers report."""
        torchmetrics = pytest.importorskip("torchmetrics.functional.image")
        reconstruction, source = clips
        padded = torchmetrics.structural_similarity_index_measure(
            frames_last(reconstruction), frames_last(source), data_range=1.0, reduction="none"
        )
        ours = ssim(reconstruction, source, data_range=UNIT).flatten()
        assert float((ours - padded).abs().max()) > 1e-4

    def test_large_frames_are_not_shrunk(self):
        """The original script, piq and VidTok halve frames of 384 pixels and more before they measure: another number."""
        skimage_data, skimage_metrics = pytest.importorskip("skimage.data"), pytest.importorskip("skimage.metrics")
        source = torch.from_numpy(skimage_data.astronaut()[:400, :400]).permute(2, 0, 1)[None, :, None].float() / 255
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
        reconstruction = (source + 0.05 * noise).clamp(0, 1)
        x, y = reconstruction[0, :, 0].double().numpy(), source[0, :, 0].double().numpy()
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        expected = skimage_metrics.structural_similarity(y, x, channel_axis=0, **settings)
        value = float(ssim(reconstruction, source, data_range=UNIT))
        assert abs(value - expected) < 1e-5
        halved = [F.avg_pool2d(video[:, :, 0], 2)[:, :, None] for video in (reconstruction, source)]
        assert float(ssim(*halved, data_range=UNIT)) - value > 0.1

    def test_mean_of_bright_flat_frames_keeps_its_digits(self):
        """A flat frame near 1, where float32 moments about 0 are 4e-6 off the exact value and ours 8e-7."""
        skimage_metrics = pytest.importorskip("skimage.metrics")
        generator = torch.Generator().manual_seed(1)
        source = 0.98 + 0.01 * torch.rand(1, 3, 1, 48, 48, generator=generator)
        reconstruction = (source + 0.005 * torch.randn(source.shape, generator=generator)).clamp(0, 1)
        expected = skimage_metrics.structural_similarity(
            source[0, :, 0].double().numpy(),
            reconstruction[0, :, 0].double().numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
        assert abs(float(ssim(reconstruction, source, data_range=UNIT)) - expected) < 2e-6

    def test_same_in_the_models_range(self, clips):
        reconstruction, source = clips
        unit = ssim(reconstruction, source, data_range=UNIT)
        symmetric = ssim(reconstruction * 2 - 1, source * 2 - 1, data_range=SYMMETRIC)
        torch.testing.assert_close(symmetric, unit, rtol=0, atol=1e-5)

    def test_autocast_does_not_round_it(self, clips):
        reconstruction, source = clips
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = ssim(reconstruction, source, data_range=UNIT)
        torch.testing.assert_close(rounded, ssim(reconstruction, source, data_range=UNIT), rtol=0, atol=0)

    def test_identical_is_one(self, clips):
        _, source = clips
        torch.testing.assert_close(
            ssim(source, source, data_range=UNIT), torch.ones(source.shape[0], source.shape[2]), rtol=0, atol=1e-6
        )

    def test_frames_smaller_than_the_window(self):
        small = torch.zeros(1, 3, 2, 10, 64)
        with pytest.raises(ValueError, match=r"10x64 pixels.*11x11"):
            ssim(small, small, data_range=UNIT)


class TestTemporal:
    def test_flicker_by_hand(self):
        source = torch.zeros(1, 3, 4, 8, 8)
        reconstruction = source.clone()
        reconstruction[:, :, 1] = 0.5  # a flash at t=1: wrong into and out of that frame, and only there
        values = flicker(reconstruction, source, data_range=SYMMETRIC)
        torch.testing.assert_close(values, torch.tensor([[0.25, 0.25, 0.0]]), rtol=0, atol=0)

    def test_flicker_runs_along_time_not_channels(self):
        """A constant tint differs between channels and never changes: no flicker."""
        source = torch.rand(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        tint = torch.tensor([0.3, 0.0, -0.3]).view(1, 3, 1, 1, 1)
        values = flicker(source * 0.4 + 0.3 + tint, source * 0.4 + 0.3, data_range=UNIT)
        assert float(values.max()) < 1e-6

    def test_difference_psnr_ignores_a_still_error_and_sees_a_moving_one(self, clips):
        reconstruction, source = clips
        shifted = source * 0.9 + 0.05
        still = temporal_difference_psnr(shifted - 0.05, shifted, data_range=UNIT)
        assert float(still.min()) > 100
        expected = psnr(
            (reconstruction[:, :, 1:] - reconstruction[:, :, :-1]).clamp(-1, 1),
            (source[:, :, 1:] - source[:, :, :-1]).clamp(-1, 1),
            data_range=SYMMETRIC,
        ) - 20 * math.log10(2)
        torch.testing.assert_close(
            temporal_difference_psnr(reconstruction, source, data_range=UNIT), expected, rtol=0, atol=1e-4
        )

    def test_one_frame_has_no_steps(self):
        one = torch.zeros(2, 3, 1, 16, 16)
        assert flicker(one, one, data_range=UNIT).shape == (2, 0)
        assert temporal_difference_psnr(one, one, data_range=UNIT).shape == (2, 0)

    @pytest.mark.parametrize("metric", [flicker, temporal_difference_psnr])
    def test_pieces_that_overlap_by_one_frame_equal_the_whole(self, clips, metric):
        reconstruction, source = clips
        whole = metric(reconstruction, source, data_range=UNIT)
        pieces = [metric(reconstruction[:, :, a:b], source[:, :, a:b], data_range=UNIT) for a, b in ((0, 3), (2, 5))]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=0)


class TestAggregation:
    def test_identical_frames_are_reported_apart(self, clips):
        reconstruction, source = clips
        mixed = reconstruction.clone()
        mixed[0, :, 2] = source[0, :, 2]
        values = psnr(mixed, source, data_range=UNIT)
        assert values[0, 2] == math.inf
        result = mean_over_frames(values[0])
        kept = values[0][[0, 1, 3, 4]].double()
        assert result == FiniteMean(float(kept.mean()), 4, 1)

    def test_all_identical_none_and_nan(self):
        assert mean_over_frames([math.inf, math.inf]) == FiniteMean(math.inf, 0, 2)
        assert math.isnan(mean_over_frames([]).mean)
        assert math.isnan(mean_over_frames([1.0, math.nan, math.inf]).mean)

    def test_videos_weigh_the_same_whatever_their_length(self):
        result = mean_over_videos([torch.tensor([10.0]), torch.tensor([20.0, 30.0, 40.0]), torch.tensor([math.inf])])
        assert result == FiniteMean(20.0, 4, 1)

    def test_curve_by_frame_index(self):
        curve = frame_index_curve([torch.tensor([1.0, 2.0, 3.0]), [3.0, math.inf]])
        assert curve == [FiniteMean(2.0, 2, 0), FiniteMean(2.0, 1, 1), FiniteMean(3.0, 1, 0)]

    def test_first_frame_is_entry_zero(self, clips):
        reconstruction, source = clips
        values = psnr(reconstruction, source, data_range=UNIT)
        assert abs(frame_index_curve(values)[0].mean - float(values[:, 0].double().mean())) < 1e-9


class TestArguments:
    @pytest.mark.parametrize("metric", [psnr, ssim, flicker, temporal_difference_psnr])
    def test_values_outside_the_range(self, metric):
        source = torch.rand(1, 3, 2, 16, 16)
        with pytest.raises(ValueError, match=r"source has values .* outside data_range \(0, 1\)"):
            metric(source, source * 2 - 1, data_range=UNIT)

    def test_a_width_is_not_a_range(self):
        video = torch.zeros(1, 3, 2, 16, 16)
        with pytest.raises(ValueError, match=r"data_range is 2\.0"):
            psnr(video, video, data_range=2.0)
        with pytest.raises(ValueError, match="data_range"):
            psnr(video, video, data_range=(1.0, 0.0))

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"\(B, C, T, H, W\)"):
            psnr(torch.zeros(3, 2, 16, 16), torch.zeros(3, 2, 16, 16), data_range=UNIT)
        with pytest.raises(ValueError, match="source has shape"):
            psnr(torch.zeros(1, 3, 2, 16, 16), torch.zeros(1, 3, 3, 16, 16), data_range=UNIT)

    def test_nan_stays_visible(self):
        source = torch.full((1, 3, 1, 16, 16), 0.5)
        broken = source.clone()
        broken[0, 0, 0, 0, 0] = math.nan
        value = psnr(broken, source, data_range=UNIT)
        assert np.isnan(float(value))
        assert math.isnan(mean_over_videos(value).mean)
