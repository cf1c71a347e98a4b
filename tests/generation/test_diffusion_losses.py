"""The diffusion losses against closed forms, literal definitions in float64 and diffusers' sampler."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from vc_vae_diffusers.generation.diffusion_losses import (
    diffusion_schedule,
    discretised_nll,
    gaussian_kl,
    learned_range_log_variance,
    learned_range_loss,
    min_snr_weight,
    variational_bound,
)

SHAPE = (5, 3, 2, 4, 4)
TIMESTEPS = torch.tensor([0, 1, 17, 500, 999])


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler(
        variance_type="learned_range", beta_schedule="linear", clip_sample=False, timestep_spacing="linspace"
    )


@pytest.fixture(scope="module")
def schedule(scheduler):
    return diffusion_schedule(scheduler)


def random(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def literal_bound(noise_prediction, variance_prediction, latents, noise, timesteps) -> torch.Tensor:
    """The bound from its definition: both Gaussians of x_{t-1} in full, then KL or the mass of a bin, in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, dim=0)
    terms = []
    for index, t in enumerate(timesteps.tolist()):
        x0, eps, eps_hat, v = (x[index].double() for x in (latents, noise, noise_prediction, variance_prediction))
        before = bar[t - 1] if t > 0 else torch.ones((), dtype=torch.float64)
        xt = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * eps
        x0_hat = (xt - (1 - bar[t]).sqrt() * eps_hat) / bar[t].sqrt()

        def posterior_mean(start, t=t, before=before, xt=xt):
            return (before.sqrt() * betas[t] * start + (1 - betas[t]).sqrt() * (1 - before) * xt) / (1 - bar[t])

        clipped = max(t, 1)
        smallest = betas[clipped] * (1 - bar[clipped - 1]) / (1 - bar[clipped])
        fraction = (v + 1) / 2
        log_variance = fraction * betas[t].log() + (1 - fraction) * smallest.log()
        model = Normal(posterior_mean(x0_hat), (0.5 * log_variance).exp())
        if t > 0:
            term = kl_divergence(Normal(posterior_mean(x0), smallest.sqrt()), model)
        else:
            upper = torch.where(x0 > 0.999, torch.ones_like(x0), model.cdf(x0 + 1 / 255))
            lower = torch.where(x0 < -0.999, torch.zeros_like(x0), model.cdf(x0 - 1 / 255))
            term = -(upper - lower).clamp(min=1e-12).log()
        terms.append(term.mean() / math.log(2))
    return torch.stack(terms)


def test_bound_equals_its_definition(schedule):
    latents, noise = random(0), random(1)
    noise_prediction, variance_prediction = noise + random(2, 0.3), random(3, 0.7)
    arguments = (noise_prediction, variance_prediction, latents, noise, TIMESTEPS)
    expected = literal_bound(*arguments)
    assert (latents[0].abs() > 1).any()  # open bins are among the data of t = 0 ...
    assert (latents[0].abs() < 0.9).any()  # ... and closed ones
    assert expected.min() > 1e-6
    torch.testing.assert_close(variational_bound(*arguments, schedule).double(), expected, rtol=2e-4, atol=1e-7)


def test_bound_of_a_perfect_prediction_is_zero_and_of_the_largest_variance_its_closed_form(schedule):
    latents, noise = random(0)[1:], random(1)[1:]
    timesteps = TIMESTEPS[1:]
    for value in (-1.0, 1.0):
        variance = torch.full_like(latents, value)
        bound = variational_bound(noise, variance, latents, noise, timesteps, schedule)
        excess = (schedule.log_beta - schedule.log_posterior_variance)[timesteps] * (value + 1) / 2
        expected = 0.5 * (torch.exp(-excess) - 1 + excess) / math.log(2)
        torch.testing.assert_close(bound.double(), expected, rtol=1e-3, atol=1e-7)
    assert expected[0] > 0.01  # beta is far from the posterior's variance at t = 1


def test_gaussian_kl_closed_form():
    log_true, log_model = torch.tensor([0.3]), torch.tensor([-0.4])
    expected = kl_divergence(Normal(1.5, math.exp(0.15)), Normal(0.7, math.exp(-0.2)))
    torch.testing.assert_close(gaussian_kl(log_true, log_model, torch.tensor([0.8**2])), expected[None])
    assert gaussian_kl(log_true, log_true, torch.zeros(1)).item() == 0


def test_discretised_likelihood_sums_to_one_over_the_bins_of_8_bit_data():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, scale in ((0.1, 0.05), (0.95, 0.4), (-3.0, 1.0)):
        nll = discretised_nll(x, x - mean, torch.full_like(x, math.log(scale)))
        assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=1e-9)


def test_log_variance_is_that_of_the_sampler(scheduler, schedule):
    for t in (1, 2, 40, 999):
        for value in (-1.0, -0.3, 1.0):
            prediction = torch.tensor([[value]])
            expected = scheduler._get_variance(t, predicted_variance=prediction)
            actual = learned_range_log_variance(prediction, schedule.at(torch.tensor([t]), 2))
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)  # the scheduler subtracts in float32
    assert schedule.log_posterior_variance[0] == schedule.log_posterior_variance[1]


def test_loss_is_the_sum_and_each_half_gets_its_own_gradient(schedule):
    latents, noise = random(0), random(1)
    output = torch.cat([noise + random(2, 0.3), random(3, 0.7)], dim=1).requires_grad_()
    result = learned_range_loss(output, latents, noise, TIMESTEPS, schedule)
    assert result.loss.item() == pytest.approx(result.mse.item() + result.vlb.item(), abs=1e-6)
    halves = output.detach().chunk(2, dim=1)
    assert result.mse.item() == pytest.approx((halves[0] - noise).square().mean().item(), abs=1e-6)
    expected = literal_bound(*halves, latents, noise, TIMESTEPS).mean().item()
    assert result.vlb.item() == pytest.approx(expected, rel=2e-4)

    of_mse, of_vlb = (torch.autograd.grad(term, output, retain_graph=True)[0] for term in (result.mse, result.vlb))
    mean_gradient, variance_gradient = of_vlb.chunk(2, dim=1)
    assert mean_gradient.abs().max() == 0
    assert (variance_gradient.abs().amax(dim=(1, 2, 3, 4)) > 0).all()
    torch.testing.assert_close(of_mse[:, :3], 2 * (halves[0] - noise) / noise.numel())
    assert of_mse[:, 3:].abs().max() == 0


def test_variance_gradient_vanishes_at_the_optimum(schedule):
    """With a noise error of known size the best variance is beta~ + mean_weight * error^2; there the bound is flat."""
    t, error = 300, 0.05
    at = schedule.at(torch.tensor([t]), 1)
    best = torch.log(at.log_posterior_variance.exp() + at.mean_weight * error**2)
    fraction = (best - at.log_posterior_variance) / (at.log_beta - at.log_posterior_variance)
    gradients = []
    for offset in (-0.2, 0.0, 0.2):
        variance = (2 * fraction - 1 + offset).reshape(1, 1).requires_grad_()
        zero = torch.zeros(1, 1)
        bound = variational_bound(zero + error, variance, zero, zero, torch.tensor([t]), schedule)
        gradients.append(torch.autograd.grad(bound.sum(), variance)[0].item())
    assert gradients[0] < 0 < gradients[2]
    assert abs(gradients[1]) < 1e-2 * abs(gradients[2])


def test_half_precision_output_is_computed_in_float32(schedule):
    latents, noise = random(0), random(1)
    output = torch.cat([noise + random(2, 0.3), random(3, 0.7)], dim=1).bfloat16()
    result = learned_range_loss(output, latents, noise, TIMESTEPS, schedule)
    expected = learned_range_loss(output.float(), latents, noise, TIMESTEPS, schedule)
    assert result.loss.dtype == torch.float32
    assert torch.equal(result.loss, expected.loss)


def test_wrong_channels_and_schedulers_are_refused(schedule):
    with pytest.raises(ValueError, match="out_channels = 2"):
        learned_range_loss(random(0), random(1), random(2), TIMESTEPS, schedule)
    with pytest.raises(ValueError, match="'learned_range'"):
        diffusion_schedule(DDPMScheduler())
    with pytest.raises(ValueError, match="'epsilon'"):
        diffusion_schedule(DDPMScheduler(variance_type="learned_range", prediction_type="v_prediction"))


def test_weights_by_signal_to_noise_touch_the_noise_term_alone(scheduler, schedule):
    ratio = scheduler.alphas_cumprod[TIMESTEPS] / (1 - scheduler.alphas_cumprod[TIMESTEPS])
    expected = ratio.clamp(max=5) / ratio
    assert expected[0] < 1e-3
    assert expected[3:].tolist() == [1, 1]
    weight = min_snr_weight(TIMESTEPS, schedule, 5.0)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=0)

    output, latents, noise = torch.cat([random(1), random(2)], dim=1), random(3), random(4)
    plain = learned_range_loss(output, latents, noise, TIMESTEPS, schedule)
    weighted = learned_range_loss(output, latents, noise, TIMESTEPS, schedule, weight)
    assert (weighted.mse, weighted.vlb) == (plain.mse, plain.vlb)
    errors = (output[:, :3] - noise).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(weighted.loss - weighted.vlb, (weight * errors).mean(), rtol=1e-4, atol=0)
    assert plain.loss - weighted.loss > 0.5
