"""Training losses (Sec. 4.1, Table 7): L1, LPIPS, KL and the hinge GAN, one function or module a term.

Every term is a mean, over pixels, frames or latent elements: its size depends on neither the resolution nor the number
of frames nor the batch, as the mix of Stage II needs. Not in the paper: the reductions; its weights (0.1 or 0.2 for
LPIPS, 0.02 for the GAN) fit means and not sums.

Videos are (B, C, T, H, W) in [-1, 1].
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..metrics.weights import load_lpips


def l1_loss(reconstruction: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over all elements (Table 7), in float32.

    Args:
        reconstruction: (B, C, T, H, W), the decoder's output, not clamped.
        video: (B, C, T, H, W).

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that differ.
    """
    _check_same_shape(reconstruction, video)
    return (reconstruction.float() - video.float()).abs().mean()


def kl_loss(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), the mean over *every* latent element, in float32.

    Elements are those of batch, channels, latent frames, height and width. (The sum over one clip's latents would be
    this times their number. `DiagonalGaussianDistribution.kl()` sums three dimensions and so leaves a (B, W) tensor of
    5-D latents.)

    Args:
        mean: (B, C, t, h, w) of the posterior.
        logvar: (B, C, t, h, w) of the posterior, as `latent_dist.logvar`, which is clamped to [-30, 20].

    Returns:
        A scalar; 0 for a standard normal posterior. Table 7 weighs it by 1e-8.

    Raises:
        ValueError: for shapes that differ.
    """
    _check_same_shape(mean, logvar)
    mean, logvar = mean.float(), logvar.float()
    # expm1(v) - v keeps its digits near v = 0, where exp(v) - 1 - v cancels.
    return 0.5 * (mean.square() + torch.expm1(logvar) - logvar).mean()


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al., 2018) between the frames of two videos, the mean over all of them.

    The network is that of the ``lpips`` package, version 0.1, frozen. Frames are folded into the batch. Inputs, the
    normalisation of the features and the heads are float32; the convolutions of the trunk follow an autocast region
    around the call.

    Args:
        net: the trunk. Not in the paper: which one; VGG is what training scripts of the field use.
        weights: weight file or folder, see :func:`vc_vae_diffusers.metrics.weights.find_weights`.
        frames_per_chunk: how many frames pass the network at a time, all of them by default. Activations of a chunk
            are computed again in the backward pass, so that memory is that of one chunk.

    Raises:
        ImportError: if the ``lpips`` package is missing.
        MissingWeightsError: if the trunk's weights are missing.
        ValueError: for an unknown net or a chunk below one frame.
    """

    def __init__(
        self,
        net: Literal["alex", "vgg"] = "vgg",
        weights: str | os.PathLike | None = None,
        frames_per_chunk: int | None = None,
    ):
        super().__init__()
        if frames_per_chunk is not None and frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk is {frames_per_chunk}, but a chunk has at least one frame; use None")
        self.network = load_lpips(net, weights)
        self.frames_per_chunk = frames_per_chunk

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in eval mode: the heads have dropout that only the fitting of LPIPS itself used."""
        return super().train(False)

    def forward(self, reconstruction: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        """Mean distance over batch and frames.

        Args:
            reconstruction: (B, 3, T, H, W) in [-1, 1]; gradients reach it.
            video: (B, 3, T, H, W) in [-1, 1].

        Returns:
            A float32 scalar.
        """
        return self.per_frame(reconstruction, video).mean()

    def per_frame(self, reconstruction: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        """Distance of every frame, (B, T)."""
        _check_same_shape(reconstruction, video)
        if reconstruction.ndim != 5 or reconstruction.shape[1] != 3:
            raise ValueError(
                f"reconstruction has shape {tuple(reconstruction.shape)}, but LPIPS reads RGB videos (B, 3, T, H, W)"
            )
        batch, _, num_frames = reconstruction.shape[:3]
        x, y = (v.transpose(1, 2).flatten(0, 1).float() for v in (reconstruction, video))  # (B T, 3, H, W)
        chunk = self.frames_per_chunk or len(x)
        distances = []
        for pair in zip(x.split(chunk), y.split(chunk), strict=True):
            if chunk < len(x) and torch.is_grad_enabled():
                distances.append(checkpoint(self._distance, *pair, use_reentrant=False))
            else:
                distances.append(self._distance(*pair))
        return torch.cat(distances).view(batch, num_frames)

    def _distance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) twice -> (N,)."""
        network: Any = self.network
        scale = network.scaling_layer
        features = zip(network.net(scale(x)), network.net(scale(y)), network.lins, strict=True)
        # lpips.LPIPS.forward would round the features' norms and the averages too.
        with torch.autocast(x.device.type, enabled=False):
            layers = [
                head((_unit_length(of_x.float()) - _unit_length(of_y.float())).square()).mean(dim=(1, 2, 3))
                for of_x, of_y, head in features
            ]
        return torch.stack(layers).sum(dim=0)


def _unit_length(features: torch.Tensor) -> torch.Tensor:
    # The epsilon is the lpips package's: outside of the root, and too small for half precision.
    norm = features.square().sum(dim=1, keepdim=True).sqrt()
    return features / (norm + 1e-10)


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge GAN term of the generator, ``-mean(fake_logits)`` over all patches, in float32.

    Args:
        fake_logits: discriminator output for reconstructions, any shape; gradients reach the generator through it.

    Returns:
        A scalar. Table 7 weighs it by 0.02 in Stage II. Not in the paper: the form of the adversarial loss.
    """
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator, ``(mean(relu(1 - real)) + mean(relu(1 + fake))) / 2`` over all patches.

    Args:
        real_logits: discriminator output for source clips, any shape.
        fake_logits: discriminator output for reconstructions *detached* from the generator.

    Returns:
        A float32 scalar: 1 for a discriminator that says 0, 0 for one that is right by a margin.
    """
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


class LeCam(nn.Module):
    """LeCam regularisation of the discriminator (Tseng et al., 2021), an option, not in the paper.

    Keeps moving averages of the logits for real and for fake clips, and penalises logits beyond the average of the
    other kind: ``mean(relu(real - average_fake)^2) + mean(relu(average_real - fake)^2)``. The averages are buffers, so
    that ``state_dict`` resumes them.

    Args:
        decay: of the averages; the first call sets them.
    """

    average_real: torch.Tensor
    average_fake: torch.Tensor
    num_updates: torch.Tensor

    def __init__(self, decay: float = 0.999):
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}, but it must be in [0, 1); use e.g. 0.999")
        self.decay = decay
        self.register_buffer("average_real", torch.zeros(()))
        self.register_buffer("average_fake", torch.zeros(()))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def forward(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """Update the averages (in training mode), over all processes, and return the penalty.

        Args:
            real_logits: discriminator output for source clips, any shape.
            fake_logits: discriminator output for detached reconstructions.

        Returns:
            A float32 scalar, the mean over patches.
        """
        real, fake = real_logits.float(), fake_logits.float()
        if self.training:
            self._update(torch.stack([real.detach().mean(), fake.detach().mean()]))
        return F.relu(real - self.average_fake).square().mean() + F.relu(self.average_real - fake).square().mean()

    @torch.no_grad()
    def _update(self, means: torch.Tensor) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(means)
            means /= torch.distributed.get_world_size()
        weight = torch.where(self.num_updates == 0, 1.0, 1.0 - self.decay)
        self.average_real.lerp_(means[0], weight)
        self.average_fake.lerp_(means[1], weight)
        self.num_updates += 1


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    gan_loss: torch.Tensor,
    last_layer: torch.Tensor,
    *,
    maximum: float = 1e4,
) -> torch.Tensor:
    """Ratio of gradient norms that balances the GAN term with the others (Esser et al., 2021). An option, not in the paper.

    Args:
        reconstruction_loss: scalar, the weighted sum of the other generator terms; its graph is kept.
        gan_loss: scalar, :func:`generator_loss`; its graph is kept.
        last_layer: weight of the decoder's last convolution, a parameter both losses depend on.
        maximum: upper bound of the result, reached when the GAN's gradient vanishes.

    Returns:
        ``|d reconstruction_loss| / (|d gan_loss| + 1e-4)`` with respect to ``last_layer``, at most ``maximum``; a
        detached float32 scalar to multiply ``gan_loss`` with. One process sees its own micro-batch only.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_gan,) = torch.autograd.grad(gan_loss, last_layer, retain_graph=True)
    ratio = of_reconstruction.float().norm() / (of_gan.float().norm() + 1e-4)
    return ratio.clamp(max=maximum).detach()


def _check_same_shape(first: torch.Tensor, second: torch.Tensor) -> None:
    # Broadcasting would turn a forgotten dimension into a wrong mean.
    if first.shape != second.shape:
        raise ValueError(
            f"the two tensors compared have shapes {tuple(first.shape)} and {tuple(second.shape)}, but they must be "
            "equal; crop or index before the loss"
        )
