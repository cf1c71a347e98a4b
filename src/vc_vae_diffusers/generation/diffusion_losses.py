"""Training loss of Latte: mean squared error of the noise plus the variational bound of a learned-range variance.

Not in the paper, which trains Latte-XL "following previous work" (Sec. A.5): these are the losses of Latte's release,
after Nichol & Dhariwal 2021 (learned variance, Eq. 15; hybrid loss, Eq. 16). diffusers samples with such variances
(`DDPMScheduler(variance_type="learned_range")`) but has no loss for them. The bound trains the variance alone: the
noise prediction enters it detached. Differences of posterior means are written in terms of the noise error, which is
exact and keeps float32 from subtracting near-equal numbers.
"""

import math
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler

LOG_2 = math.log(2.0)
SMALLEST_PROBABILITY = 1e-12
# Half the width of a bin of the discretised likelihood, and where its outermost bins become open: those of 8-bit data
# in [-1, 1]. Latte's release applies them to latents unchanged.
HALF_BIN = 1.0 / 255.0
OPEN_BIN = 0.999


class DiffusionSchedule(NamedTuple):
    """What the loss needs of a noise schedule, one float64 value for each of its timesteps.

    Attributes:
        log_beta: upper end of the variance range (log of beta_t).
        log_posterior_variance: lower end, log of beta~_t; at t = 0, where that is zero, the value of t = 1.
        mean_weight: square of d mean(x_{t-1}) / d noise: beta_t^2 / (alpha_t (1 - alphabar_t)).
        start_weight: d x_0 / d noise: sqrt((1 - alphabar_t) / alphabar_t).
    """

    log_beta: torch.Tensor
    log_posterior_variance: torch.Tensor
    mean_weight: torch.Tensor
    start_weight: torch.Tensor

    def at(self, timesteps: torch.Tensor, ndim: int) -> "DiffusionSchedule":
        """The values at timesteps (B,), float32, shaped to broadcast over tensors of `ndim` dimensions."""
        shape = (-1,) + (1,) * (ndim - 1)
        return DiffusionSchedule(*(x.to(timesteps.device)[timesteps].float().reshape(shape) for x in self))


class DiffusionLoss(NamedTuple):
    """Means over the batch: the loss to minimise, the noise's squared error unweighted, and the bound in bits per value."""

    loss: torch.Tensor
    mse: torch.Tensor
    vlb: torch.Tensor


def diffusion_schedule(scheduler: DDPMScheduler) -> DiffusionSchedule:
    """Tables of a scheduler in float64.

    Raises:
        ValueError: when the scheduler predicts anything but the noise, or does not use the learned-range variance.
    """
    if scheduler.config.prediction_type != "epsilon" or scheduler.config.variance_type != "learned_range":
        raise ValueError(
            f"scheduler has prediction_type {scheduler.config.prediction_type!r} and variance_type"
            f" {scheduler.config.variance_type!r}; this loss is for 'epsilon' and 'learned_range': pass"
            " DDPMScheduler(variance_type='learned_range', clip_sample=False)."
        )
    betas = scheduler.betas.double()
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    return DiffusionSchedule(
        log_beta=betas.log(),
        log_posterior_variance=torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
        mean_weight=betas.square() / ((1 - betas) * (1 - alphas_cumprod)),
        start_weight=((1 - alphas_cumprod) / alphas_cumprod).sqrt(),
    )


def mean_per_sample(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(dim=1)


def learned_range_log_variance(variance_prediction: torch.Tensor, schedule: DiffusionSchedule) -> torch.Tensor:
    """Log-variance of p(x_{t-1} | x_t): -1 stands for the posterior's (smallest), 1 for beta_t (largest).

    `schedule` holds the values at the samples' timesteps (`DiffusionSchedule.at`).
    """
    fraction = (variance_prediction + 1) / 2
    return fraction * schedule.log_beta + (1 - fraction) * schedule.log_posterior_variance


def gaussian_kl(
    log_variance_true: torch.Tensor, log_variance: torch.Tensor, squared_mean_difference: torch.Tensor
) -> torch.Tensor:
    """KL(N(m, v_true) || N(m', v)) elementwise, in nats, from (m - m')^2."""
    excess = log_variance_true - log_variance
    return 0.5 * (torch.exp(excess) - 1 - excess + squared_mean_difference * torch.exp(-log_variance))


def discretised_nll(x: torch.Tensor, difference: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """-log P of the bin around x under a Gaussian, elementwise, in nats.

    Args:
        x: data; bins are 2/255 wide, and open to infinity beyond +-0.999.
        difference: x minus the mean of the Gaussian.
        log_scale: log of its standard deviation.
    """
    inverse_scale = torch.exp(-log_scale)
    above = torch.special.ndtr(inverse_scale * (difference + HALF_BIN))
    below = torch.special.ndtr(inverse_scale * (difference - HALF_BIN))
    probability = torch.where(x < -OPEN_BIN, above, torch.where(x > OPEN_BIN, 1 - below, above - below))
    return -torch.log(probability.clamp(min=SMALLEST_PROBABILITY))


def variational_bound(
    noise_prediction: torch.Tensor,
    variance_prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: DiffusionSchedule,
) -> torch.Tensor:
    """One term of the variational lower bound per sample, (B,), in bits per value.

    At t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 -log p(x_0 | x_1), discretised.

    Args:
        noise_prediction, variance_prediction: the two halves of the model's output, (B, C, ...).
        latents: x_0; noise: what was added to it; timesteps: (B,) integers.
        schedule: of all timesteps, `diffusion_schedule(scheduler)`.
    """
    schedule = schedule.at(timesteps, latents.ndim)
    log_variance = learned_range_log_variance(variance_prediction, schedule)
    error = noise_prediction - noise
    kl = gaussian_kl(schedule.log_posterior_variance, log_variance, schedule.mean_weight * error.square())
    nll = discretised_nll(latents, schedule.start_weight * error, 0.5 * log_variance)
    return torch.where(timesteps == 0, mean_per_sample(nll), mean_per_sample(kl)) / LOG_2


def min_snr_weight(timesteps: torch.Tensor, schedule: DiffusionSchedule, gamma: float) -> torch.Tensor:
    """Weight of each sample's squared error of the noise, (B,): min(SNR, gamma) / SNR (Hang et al. 2023, Min-SNR).

    Not in the paper, nor in Latte. Predicting the noise in nearly clean latents is most of the plain loss and little of
    a video's content; with this weight small models learn the content much sooner.
    """
    return (gamma * schedule.at(timesteps, 1).start_weight.square()).clamp(max=1)


def learned_range_loss(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: DiffusionSchedule,
    weight: torch.Tensor | None = None,
) -> DiffusionLoss:
    """MSE of the noise plus the bound of the variance, both means over all values and the batch, computed in float32.

    Args:
        model_output: (B, 2C, ...): noise, then variance interpolation.
        latents, noise: (B, C, ...) x_0 and the noise added to it.
        timesteps: (B,) integers.
        schedule: `diffusion_schedule(scheduler)`.
        weight: (B,), of the samples' MSE in the loss; None for 1, as Latte.

    Raises:
        ValueError: when the output has not twice the channels of the latents.
    """
    if model_output.shape != (latents.shape[0], 2 * latents.shape[1], *latents.shape[2:]):
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)} for latents {tuple(latents.shape)}; it must have"
            " twice their channels, noise and variance: build the model with out_channels = 2 * in_channels."
        )
    noise_prediction, variance_prediction = model_output.float().chunk(2, dim=1)
    latents, noise = latents.float(), noise.float()
    mse = mean_per_sample((noise_prediction - noise).square())
    vlb = variational_bound(noise_prediction.detach(), variance_prediction, latents, noise, timesteps, schedule).mean()
    weighted = mse if weight is None else weight * mse
    return DiffusionLoss(loss=weighted.mean() + vlb, mse=mse.mean(), vlb=vlb)
