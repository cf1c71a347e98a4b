"""The 3-D patch discriminator: shapes, independence of clips, precision, saving, and that it learns to tell."""

import pytest
import torch
from torch import nn

from vc_vae_diffusers.training.discriminator import PatchDiscriminator3D
from vc_vae_diffusers.training.losses import discriminator_loss, generator_loss


def _discriminator(seed=0, **config):
    torch.manual_seed(seed)
    return PatchDiscriminator3D(**({"base_channels": 8} | config))


def _clips(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestShapes:
    @pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 8, 9, 16])
    def test_any_number_of_frames(self, num_frames):
        logits = _discriminator()(_clips(1, 3, num_frames, 32, 40))
        assert logits.shape == (1, 1, -(-num_frames // 4), 2, 3)

    @pytest.mark.parametrize(("num_layers", "size"), [(1, 6), (2, 12), (3, 24), (4, 48)])
    def test_smallest_size_leaves_a_patch_and_one_less_is_refused(self, num_layers, size):
        discriminator = _discriminator(num_layers=num_layers)
        assert discriminator.min_size == size
        assert discriminator(_clips(1, 3, 2, size, size)).shape[-2:] == (1, 1)
        with pytest.raises(ValueError, match=f"at least {size}x{size}"):
            discriminator(_clips(1, 3, 2, size, size - 1))

    def test_widths(self):
        discriminator = _discriminator(num_layers=5)
        assert [block.conv.out_channels for block in discriminator.blocks] == [16, 32, 64, 64, 64]

    def test_default_is_the_usual_patchgan_in_size(self):
        """64-128-256-512 channels, kernels of 3x4x4, counted by hand."""
        expected = 48 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1 + 2 * (128 + 256 + 512)
        discriminator = PatchDiscriminator3D()
        assert sum(parameter.numel() for parameter in discriminator.parameters()) == expected
        slopes = [layer.negative_slope for layer in discriminator.modules() if isinstance(layer, torch.nn.LeakyReLU)]
        assert slopes == [0.2] * 4

    def test_arguments(self):
        with pytest.raises(ValueError, match="norm_num_groups=8 must divide"):
            PatchDiscriminator3D(base_channels=6)
        with pytest.raises(ValueError, match="num_layers"):
            PatchDiscriminator3D(num_layers=0)
        with pytest.raises(ValueError, match=r"\(B, C, T, H, W\)"):
            _discriminator()(_clips(3, 4, 32, 32))


class TestBatch:
    def test_clips_do_not_influence_each_other(self):
        """At batch 1 as in a batch, so that real and reconstructed clips may share a forward."""
        discriminator, clips = _discriminator(), _clips(3, 3, 5, 32, 32)
        together = discriminator(clips)
        alone = torch.cat([discriminator(clip[None]) for clip in clips])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
        assert float(together.detach().std()) > 1e-4

    def test_the_same_in_training_and_evaluation_and_call_after_call(self):
        discriminator, clips = _discriminator().train(), _clips(1, 3, 4, 32, 32)
        state = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
        first, second = discriminator(clips), discriminator(clips)
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        torch.testing.assert_close(discriminator.eval()(clips), first, rtol=0, atol=0)
        torch.testing.assert_close(discriminator.state_dict(), state, rtol=0, atol=0)

    def test_every_frame_is_seen(self):
        """A 3-D discriminator that ignored some frames would let them decay."""
        discriminator = _discriminator()
        clips = _clips(1, 3, 9, 32, 32).requires_grad_()
        discriminator(clips).square().sum().backward()
        per_frame = clips.grad.abs().amax(dim=(0, 1, 3, 4))
        assert float(per_frame.min()) > 1e-3 * float(per_frame.max()) > 0

    def test_order_of_frames_matters(self):
        discriminator, clips = _discriminator(), _clips(1, 3, 8, 32, 32)
        shuffled = clips[:, :, [3, 0, 2, 1, 7, 5, 4, 6]]
        assert float((discriminator(clips) - discriminator(shuffled)).detach().abs().max()) > 1e-3


class TestPrecision:
    @torch.no_grad()
    def test_bfloat16_weights_and_autocast(self):
        discriminator, clips = _discriminator(), _clips(1, 3, 4, 32, 32)
        exact = discriminator(clips)
        scale = float(exact.abs().max())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = discriminator(clips)
        rounded = discriminator.to(torch.bfloat16)(clips.bfloat16())
        assert rounded.dtype == torch.bfloat16
        for logits in (autocast, rounded):
            assert float((logits.float() - exact).abs().max()) < 0.05 * scale

    def test_constant_clips_are_finite(self):
        """A normalisation over a constant divides by nothing but its epsilon."""
        discriminator = _discriminator()
        clips = torch.full((1, 3, 2, 32, 32), -1.0, requires_grad=True)
        logits = discriminator(clips)
        logits.sum().backward()
        assert bool(torch.isfinite(logits).all())
        assert bool(torch.isfinite(clips.grad).all())


def test_saves_and_loads(tmp_path):
    discriminator = _discriminator(num_layers=2, in_channels=4)
    discriminator.save_pretrained(tmp_path)
    loaded = PatchDiscriminator3D.from_pretrained(tmp_path)
    assert loaded.config.num_layers == 2
    clips = _clips(1, 4, 3, 32, 32)
    torch.testing.assert_close(loaded(clips), discriminator.eval()(clips), rtol=0, atol=0)


def test_starts_undecided():
    """Hinge loss near 1 and its gradient alive on both sides, whatever the width."""
    for base_channels in (4, 64):
        discriminator = _discriminator(base_channels=base_channels)
        logits = discriminator(_clips(1, 3, 4, 32, 32))
        assert 0.0 < float(logits.detach().abs().max()) < 0.5
        assert abs(float(discriminator_loss(logits, logits).detach()) - 1.0) < 1e-5


def test_learns_to_tell_still_from_moving():
    """A difference that no single frame shows, learned at batch 1; then its gradient points a generator that way."""
    discriminator = _discriminator(num_layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(0)

    def clip(moving):
        base = nn.functional.interpolate(torch.randn(1, 3, 8, 8, generator=generator), scale_factor=4, mode="bilinear")
        frames = [base.roll(3 * t if moving else 0, dims=-1) for t in range(4)]
        return torch.stack(frames, dim=2).clamp(-1, 1)

    losses = []
    for _ in range(60):
        loss = discriminator_loss(discriminator(clip(True)), discriminator(clip(False)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.9
    assert sum(losses[-10:]) / 10 < 0.3
    still = clip(False).requires_grad_()
    before = generator_loss(discriminator(still))
    before.backward()
    moved = (still - 0.05 * still.grad.sign()).detach()
    assert float(generator_loss(discriminator(moved)).detach()) < float(before.detach()) - 0.1
    assert float((moved[:, :, 1:] - moved[:, :, :-1]).abs().mean()) > 0.01
