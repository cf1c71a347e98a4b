"""VC-VAE: a video autoencoder that starts as an image autoencoder of keyframes and learns the motion between them.

The network is in `blocks.py`, its temporal operators are in the room `operators`. Here is what users call. How frames go
through the network (clip by clip, tile by tile, chunk by chunk) is in `passes.py`, streams are in `streams.py`, and what
keeps configuration and weights in agreement is in `saving.py`.
"""

import copy
import inspect
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..operators.evaluation.gpu_ops import INDUCTOR
from ..operators.frame_conv import KernelLayer
from .blocks import Decoder, Encoder, TemporalDesign
from .checks import check_config, unknown_arguments
from .image_vae import HUB_OPTIONS, inflate, read_image_vae
from .memory_plan import MemoryPlan, apply_plan, plan
from .saving import SavedModelMixin, default_statistics
from .streams import StreamsMixin

logger = logging.getLogger(__name__)


@dataclass
class AutoencoderKLVCVAEOutput(BaseOutput):
    """What `AutoencoderKLVCVAE.forward` returns.

    Args:
        sample: the reconstruction, `(B, C, T, H, W)`, T as in the input.
        latent_dist: the posterior, for the KL loss.
    """

    sample: torch.Tensor
    latent_dist: DiagonalGaussianDistribution


class AutoencoderKLVCVAE(SavedModelMixin, StreamsMixin, AutoencoderMixin):
    r"""VC-VAE, a video VAE with a keyframe anchor and Temporal Dynamic Difference Convolutions.

    Video is `(B, C, T, H, W)` in [-1, 1], latents are `(B, latent_channels, ceil(T / r_t), H / r_s, W / r_s)`. Any T >= 1
    is accepted and returned; a single image is a clip of one frame.

    Args:
        in_channels, out_channels, latent_channels, block_out_channels, layers_per_block, act_fn, norm_num_groups,
            mid_block_add_attention, use_quant_conv, use_post_quant_conv: as in `AutoencoderKL`; the defaults are Flux's.
        temporal_downsample: for each spatial downsampling, whether a temporal one follows. `(False, True, True)` is 4x8x8,
            `(True, True, True)` 8x8x8.
        temporal_operator: `"tdc"` (Eq. 5-7) or `"conv"`, the plain baselines (Eq. 1, 2).
        temporal_causality: `"group"` (a frame sees its group) or `"causal"` (a frame sees the past).
        temporal_padding: `"replicate"` or `"zeros"`, see `tdc.TemporalConv3d`.
        first_frame: `"in_sequence"` (Sec. 3.4) or `"separate"`, the 1 + r_t*k scheme of Table 6, which ignores
            `frame_convention`.
        frame_convention: how T becomes whole groups. `"4k"` repeats the last frame; `"4k+1"` repeats the first one, and
            `decode` without `num_frames` drops r_t - 1 frames at the start, as pipelines for causal VAEs expect.
        scaling_factor, shift_factor: of the latents; the defaults are Flux's. `from_pretrained(path, scaling_factor=…)` puts
            the new scale into `latents_std` too, and a new shift into `latents_mean`.
        latents_mean, latents_std: by channel; by default the shift, and one over the scale.
        temporal_compression_ratio, spatial_compression_ratio, scale_factor_temporal, scale_factor_spatial, z_dim,
            temperal_downsample: names under which pipelines read what follows from the above. Do not set them.
        invert_scale_latents: read by CogVideoX's image-to-video pipeline.

    Raises:
        ValueError: for a configuration that makes no network, naming the argument.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ("ResnetBlock", "Attention")
    _skip_layerwise_casting_patterns = ("norm",)
    _group_offload_block_modules = ("quant_conv", "post_quant_conv", "encoder", "decoder")
    _skip_keys = ("cache",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        temporal_operator: str = "tdc",
        temporal_causality: str = "group",
        temporal_padding: str = "replicate",
        first_frame: str = "in_sequence",
        frame_convention: str = "4k",
        scaling_factor: float = 0.3611,
        shift_factor: float | None = 0.1159,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        temporal_compression_ratio: int | None = None,
        spatial_compression_ratio: int | None = None,
        scale_factor_temporal: int | None = None,
        scale_factor_spatial: int | None = None,
        z_dim: int | None = None,
        temperal_downsample: tuple[bool, ...] | None = None,
        invert_scale_latents: bool = False,
    ):
        super().__init__()
        check_config(self.config)
        temporal_downsample = tuple(temporal_downsample)
        self.temporal_compression_ratio = 2 ** sum(temporal_downsample)
        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)
        self.temperal_downsample = temporal_downsample
        self.register_to_config(
            **default_statistics(self.config),
            temporal_compression_ratio=self.temporal_compression_ratio,
            spatial_compression_ratio=self.spatial_compression_ratio,
            scale_factor_temporal=self.temporal_compression_ratio,
            scale_factor_spatial=self.spatial_compression_ratio,
            z_dim=latent_channels,
            temperal_downsample=temporal_downsample,
        )

        design = TemporalDesign(temporal_operator, temporal_causality, temporal_padding)
        common = (layers_per_block, norm_num_groups, act_fn, mid_block_add_attention)
        channels = tuple(block_out_channels)
        self.encoder = Encoder(in_channels, latent_channels, channels, *common, temporal_downsample, design)
        self.decoder = Decoder(out_channels, latent_channels, channels, *common, temporal_downsample[::-1], design)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

        self._reset_switches()

    @classmethod
    def from_image_vae(cls, source: str, subfolder: str | None = None, **config) -> "AutoencoderKLVCVAE":
        """Build a VC-VAE whose keyframes are those of an image VAE, with nothing trained yet (Sec. 3.2, Eq. 3, 4).

        Args:
            source: a folder or hub id of an `AutoencoderKL`, or a safetensors file in diffusers' or BFL's layout.
            subfolder: of the folder or repository, for example `"vae"`.
            config: settings that differ from the image VAE's, for example `temporal_downsample`, `latent_channels`; and
                `token`, `revision`, `variant`, `cache_dir`, `local_files_only` for the hub.

        Raises:
            ValueError: if keys are missing or left over, naming them, or for a setting that does not exist.
            OSError: if the source cannot be read; for a gated repository it says how to get access.
        """
        hub_options = {k: config.pop(k) for k in HUB_OPTIONS if k in config}
        if unknown := unknown_arguments(config, set(inspect.signature(cls.__init__).parameters) - {"self"}):
            raise ValueError(
                f"config has {unknown}, which {cls.__name__} does not know: check the spelling (for another dtype or device "
                "call .to(…) on the result)"
            )
        image_vae = read_image_vae(source, subfolder=subfolder, **hub_options)
        for assumption in image_vae.assumptions:
            logger.warning("%s: %s", image_vae.source, assumption)
        vae = cls.from_config({**image_vae.video_config(), **config})
        inflate(vae, image_vae)
        return vae.eval()

    # Whole clips -------------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode a clip of any T >= 1.

        Args:
            x: `(B, C, T, H, W)` in [-1, 1], H and W multiples of the spatial compression.
            return_dict: False gives a tuple.

        Returns:
            The posterior over `(B, latent_channels, ceil(T / r_t), H / r_s, W / r_s)` as `.latent_dist`.

        Raises:
            ValueError: for a wrong shape or dtype.
        """
        posterior = DiagonalGaussianDistribution(self._encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, num_frames: int | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents.

        Args:
            z: `(B, latent_channels, n, h, w)`, unscaled.
            return_dict: False gives a tuple.
            num_frames: T of the clip that was encoded, or fewer frames to keep from its start (not for `"4k+1"`, which
                repeated the first frame as often as T asked for); None gives all `r_t * n` frames (`r_t * n - r_t + 1` for
                `"4k+1"`).

        Returns:
            The frames, `(B, C, T, H, W)`, as `.sample`, not clamped.

        Raises:
            ValueError: for a wrong shape, or more frames than the latents hold.
        """
        sample = self._decode(z, num_frames)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> AutoencoderKLVCVAEOutput | tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Reconstruct a clip: encode, take the posterior's mode or a sample of it, decode.

        Args:
            sample: `(B, C, T, H, W)` in [-1, 1].
            sample_posterior: sample instead of taking the mode (training).
            return_dict: False gives the tuple (reconstruction, posterior).
            generator: for the sample.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        reconstruction = self.decode(z, num_frames=sample.shape[2]).sample
        if not return_dict:
            return reconstruction, posterior
        return AutoencoderKLVCVAEOutput(sample=reconstruction, latent_dist=posterior)

    # Switches ----------------------------------------------------------------------------------------------------------

    def enable_auto_memory(
        self,
        height: int,
        width: int,
        num_frames: int | None = None,
        memory: int | str | None = None,
        **options,
    ) -> MemoryPlan:
        """Choose `groups_per_chunk` and tiles for a size of video and set them, so that it fits into memory.

        The choice is made once and for this size, not at every call: what a model computes does not then depend on what
        else happened to be in memory. It is an estimate (`memory_plan.py` says how good); nothing is run.

        Args:
            height, width: of the video in pixels, multiples of the spatial compression.
            num_frames: of a clip for `encode` and `decode`; None for `encode_stream` and `decode_stream`.
            memory: the budget of the process on the model's device, in bytes or as `"8GB"`; None is what is free now.
            options: of `memory_plan.plan`: `operations`, `batch_size`, `max_groups`.

        Returns:
            The plan, with estimates of the peak by its parts.

        Raises:
            ValueError: if nothing fits, with what the smallest setting takes.
        """
        chosen = plan(self, height, width, num_frames, memory, **options)
        apply_plan(self, chosen)
        return chosen

    @apply_forward_hook
    @torch.no_grad()
    def tiling_error(self, video: torch.Tensor) -> dict[str, float]:
        """How far the tiled result is from the whole one, with the geometry of `enable_tiling`.

        Args:
            video: `(B, C, T, H, W)` in [-1, 1], larger than a tile and small enough to be encoded whole.

        Returns:
            `latent_max` and `latent_rms`, the maximum and root mean square of the difference of the latents over the
            standard deviation of the whole ones; `sample_max` and `sample_psnr` (dB, peak-to-peak 2) of the decoded frames.
        """
        self._check(video, "video", encodes=True)
        missing, untiled = self.groups.missing(video.shape[2]), copy.copy(self)
        untiled.use_tiling = False
        whole, tiled = (
            vae._encode_frames(video, None, missing, keep_cache=False)[0].chunk(2, dim=1)[0] for vae in (untiled, self)
        )
        frames, tiled_frames = (vae._decode_frames(whole, None, keep_cache=False)[0] for vae in (untiled, self))
        latent_error = (tiled - whole).float() / whole.float().std()
        error = (tiled_frames - frames).float()
        mse = error.square().mean().item()
        return {
            "latent_max": latent_error.abs().max().item(),
            "latent_rms": latent_error.square().mean().sqrt().item(),
            "sample_max": error.abs().max().item(),
            "sample_psnr": float("inf") if mse == 0 else 10 * math.log10(4 / mse),
        }

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> "AutoencoderKLVCVAE":
        """As in diffusers; kernels of clips and of frames take their own `channels_last` format, whichever is named."""
        if memory_format in (torch.channels_last, torch.channels_last_3d):
            lay_channels_last(self)
        elif memory_format is not None:
            kwargs["memory_format"] = memory_format
        return super().to(*args, **kwargs) if args or kwargs else self

    def fuse_tdc(self, compile: bool = False) -> None:
        """Fold kernels once for inference, and pack them for this processor. The slices stay, and are what is saved.

        Results change by rounding at most. When weights change, kernels are folded again at the next call (see
        `KernelLayer.fuse` for what a GPU does not notice); `train()` and casting end it. Weights that are elsewhere, or that
        layerwise casting stores in a smaller dtype, are folded at every call as before, which a warning says.

        Args:
            compile: call `compile()` as well, which is for GPUs.
        """
        layers = [module for module in self.modules() if isinstance(module, KernelLayer)]
        left = [layer for layer in layers if not layer.fuse()]
        if left:
            kinds = ", ".join(sorted({f"{layer.weight.dtype} on {layer.weight.device}" for layer in left}))
            logger.warning(
                "fuse_tdc folds no kernels of %d of %d layers, whose weights are %s: they are folded at every call",
                *(len(left), len(layers), kinds),
            )
        if compile:
            self.compile()

    def compile(self, **options) -> None:
        """Compile the network with `torch.compile`, for GPUs: `encode`, `decode`, their chunks and streams use it then.

        Encoder and decoder are compiled, chunk by chunk: once for the start of a clip and once for all that follows, however
        long it is; and once more for other sizes of frames. Compilation happens at the first call, takes minutes at full
        size and is kept in `TORCHINDUCTOR_CACHE_DIR`. Call `fuse_tdc()` before: fused kernels become constants. To go back,
        load the model anew. `warm_up` does all this before the first clip.

        Args:
            options: of `torch.compile`. `dynamic=True` compiles for any height and width at once. On GPUs, unless `mode`,
                `options` or `backend` is given, Inductor is told what suits the network (`gpu_ops.INDUCTOR`).

        Raises:
            ValueError: for modes that record CUDA graphs: the next run of a graph overwrites its outputs, and with them what
                a chunk hands to the next one.
        """
        if options.get("mode") in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"mode is {options['mode']!r}, which records CUDA graphs: their next run overwrites what a chunk hands to "
                "the next; pass mode='max-autotune-no-cudagraphs' or leave it out"
            )
        if self.device.type == "cuda" and not {"mode", "options", "backend"} & options.keys():
            options["options"] = INDUCTOR
        for network in (self.encoder, self.decoder):
            network.compile(**options)

    @torch.no_grad()
    def warm_up(self, height: int, width: int, *, encode: bool = True, decode: bool = True) -> None:
        """Do at once what the first clip of a size would wait for: compiling, packing, choosing kernels.

        Two chunks of zeros, the start of a clip and what follows, go through the model as it is set: tiles, slices,
        `groups_per_chunk`, dtype and device. Pictures, and clips that end within a chunk, have a last chunk of another
        length, which still waits for compiling.

        Args:
            height, width: of frames, in pixels.
            encode, decode: which of both.

        Raises:
            ValueError: if frames cannot have that size.
        """
        count, ratio = 2 * self.groups_per_chunk, self.spatial_compression_ratio
        if min(height, width) < 1 or height % ratio or width % ratio:
            raise ValueError(f"height and width are {height} and {width}: pass positive multiples of {ratio}")
        if encode:
            shape = 1, self.config.in_channels, self.groups.frames(count), height, width
            self.encode(torch.zeros(shape, dtype=self.dtype, device=self.device))
        if decode:
            shape = 1, self.config.latent_channels, count, height // ratio, width // ratio
            self.decode(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def unfuse_tdc(self) -> None:
        """Undo `fuse_tdc`: kernels are folded at every call again. `train()` does it too."""
        for module in self.modules():
            if isinstance(module, KernelLayer):
                module.unfuse()

    def train(self, mode: bool = True) -> "AutoencoderKLVCVAE":
        """As in `nn.Module`. Training mode drops fused kernels, which would go stale."""
        if mode:
            self.unfuse_tdc()
        return super().train(mode)


# The module that a saved pipeline names for its components; it must be importable and hold the classes.
AutoencoderKLVCVAE.__module__ = "vc_vae_diffusers"


def lay_channels_last(module: nn.Module) -> None:
    """Lay out kernels with the channels last, in place: `channels_last_3d` those of clips, `channels_last` those of frames.

    `nn.Module.to` applies one layout to both, and fails for kernels of the other number of dimensions.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.ndim in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.ndim])
