"""Generation with Latte on VC-VAE latents (Sec. A.5, Fig. 7): text to video, and unconditional or by class.

diffusers' `LattePipeline` makes one latent for every frame and decodes them as images. `LatteVCVAEPipeline` is that
pipeline with a video VAE: `video_length` counts frames, latents are 5-D and `r_t` times shorter.
`LatteVCVAEUnconditionalPipeline` samples from the denoiser of the paper, `LatteAdaLNTransformer3DModel`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, LattePipeline, LatteTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.latte.pipeline_latte import LattePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from transformers import T5EncoderModel, T5Tokenizer

from ..autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from ..autoencoder.frame_groups import FrameGroups
from ..publishing.auto_map import HubPipelineMixin
from ..video_processor import VCVAEVideoProcessor
from .latte_transformer import LatteAdaLNTransformer3DModel

LEARNED_VARIANCES = ("learned", "learned_range")


def channel_statistics(vae: AutoencoderKLVCVAE, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel, shaped for (B, C, T, H, W).

    With the default configuration they are `shift_factor` and `1 / scaling_factor` of the image VAE.
    """
    mean, std = (like.new_tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean[:, None, None, None], std[:, None, None, None]


def normalize_latents(vae: AutoencoderKLVCVAE, latents: torch.Tensor) -> torch.Tensor:
    """Latents of the VAE to those a denoiser is trained on: (z - mean) / std for each channel."""
    mean, std = channel_statistics(vae, latents)
    return (latents - mean) / std


def denormalize_latents(vae: AutoencoderKLVCVAE, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalize_latents`: z * std + mean for each channel."""
    mean, std = channel_statistics(vae, latents)
    return latents * std + mean


def check_latent_length(groups: FrameGroups, num_frames: int, trained: int) -> int:
    """Return the latent frames of a clip, which must be as many as the denoiser has fixed temporal positions for.

    Raises:
        ValueError: naming a frame count that fits.
    """
    length = groups.latent_frames(num_frames)
    if length != trained:
        raise ValueError(
            f"{num_frames} frames make {length} latent frames; this transformer was built for video_length={trained}"
            f" latent frames: ask for {groups.total(trained)} frames."
        )
    return length


@torch.no_grad()
def decode_video(
    vae: AutoencoderKLVCVAE, latents: torch.Tensor, num_frames: int, decode_chunk_size: int | None = None
) -> torch.Tensor:
    """Normalised latents to `num_frames` frames, (B, 3, T, H, W) in [-1, 1], float32.

    Decoding is streamed into the result, so that beside it no more than a chunk of frames is in memory;
    `decode_chunk_size` bounds the latent frames of a chunk where it is below the VAE's own `groups_per_chunk`.
    """
    latents = denormalize_latents(vae, latents.float()).to(vae.dtype)
    ratio = vae.spatial_compression_ratio
    height, width = latents.shape[3] * ratio, latents.shape[4] * ratio
    video = latents.new_empty(len(latents), vae.config.out_channels, num_frames, height, width, dtype=torch.float32)
    batch_size = 1 if vae.use_slicing else len(latents)
    for part, target in zip(latents.split(batch_size), video.split(batch_size), strict=True):
        chunks = part.split(decode_chunk_size or part.shape[2], dim=2)
        start = 0
        for frames in vae.decode_stream(chunks, num_frames=num_frames):
            target[:, :, start : start + frames.shape[2]] = frames
            start += frames.shape[2]
    return video


class LatteVCVAEPipeline(HubPipelineMixin, LattePipeline):
    """Text to video: diffusers' `LattePipeline` with an `AutoencoderKLVCVAE`.

    All arguments are those of `LattePipeline`. `video_length` is the number of frames that come back; the transformer,
    a `LatteTransformer3DModel` with the channels of the VAE's latents, was built for `video_length / r_t` latent frames.
    `decode_chunk_size` is the most latent frames that are decoded at a time; results do not depend on it.

    A transformer trained on the latents of another VAE must be retrained: nothing maps them to these.
    """

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLVCVAE,
        transformer: LatteTransformer3DModel,
        scheduler: KarrasDiffusionSchedulers,
    ):
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.video_processor = VCVAEVideoProcessor.for_vae(self.vae)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        num_frames: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise for `num_frames` frames: (B, C, ceil(num_frames / r_t), H / r_s, W / r_s).

        Raises:
            ValueError: when the transformer was built for another number of latent frames.
        """
        length = check_latent_length(self.vae.groups, num_frames, self.transformer.config.video_length)
        return super().prepare_latents(
            batch_size, num_channels_latents, length, height, width, dtype, device, generator, latents
        )

    def decode_latents(self, latents: torch.Tensor, video_length: int, decode_chunk_size: int = 14) -> torch.Tensor:
        """Denoised latents to frames, (B, 3, video_length, H, W) in [-1, 1], float32."""
        return decode_video(self.vae, latents, video_length, decode_chunk_size)


class LatteVCVAEUnconditionalPipeline(HubPipelineMixin, DiffusionPipeline):
    """Sample videos without a prompt, or by class label, as the paper does with Latte-XL on SkyTimelapse (Fig. 7).

    Args:
        vae: decodes the latents.
        transformer: predicts noise, and with a learned-range scheduler the variance.
        scheduler: `DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")`
            samples as Latte does; any scheduler for noise prediction works.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKLVCVAE,
        transformer: LatteAdaLNTransformer3DModel,
        scheduler: KarrasDiffusionSchedulers,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.video_processor = VCVAEVideoProcessor.for_vae(self.vae)

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: list[int] | torch.Tensor | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LattePipelineOutput | tuple:
        """Sample videos.

        Args:
            batch_size: number of videos; with labels or latents it is theirs.
            class_labels: one integer for each video, for a class-conditional transformer.
            num_frames: None for all that the transformer's latent frames hold; fewer crops the last group.
            num_inference_steps: denoising steps; Latte uses 250.
            guidance_scale: above 1, classifier-free guidance of the noise; the variance stays the conditional one.
            eta: only for schedulers that know it (DDIM).
            generator: one, or one for each video.
            latents: initial noise (B, C, t, h, w) in place of the generator's.
            output_type: "pil", "np" (B, T, H, W, 3) in [0, 1], "pt" (B, T, 3, H, W) in [0, 1], or "latent": the
                normalised latents.
            callback_on_step_end: called after each step with (pipeline, step, timestep, {"latents": ...}); may return
                new latents.

        Returns:
            `LattePipelineOutput` whose `frames` hold the videos, or a tuple of them.

        Raises:
            ValueError: for a frame count, labels, guidance or latents that the transformer does not fit.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; only {self._callback_tensor_inputs} exist."
            )
        num_frames = self.check_num_frames(num_frames)
        device = self._execution_device
        labels = self.prepare_labels(class_labels, guidance_scale, device)
        if labels is not None:
            batch_size = len(labels)
        elif latents is not None:
            batch_size = len(latents)
        latents = self.prepare_latents(batch_size, device, generator, latents)
        self._guidance_scale, self._interrupt = guidance_scale, False

        latents = self.denoise(
            latents,
            labels,
            num_inference_steps,
            self.prepare_step_kwargs(generator, eta),
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        if output_type == "latent":
            video = latents
        else:
            video = decode_video(self.vae, latents, num_frames)
            video = self.video_processor.postprocess_video(video, output_type=output_type)
        self.maybe_free_model_hooks()
        return LattePipelineOutput(frames=video) if return_dict else (video,)

    def denoise(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        num_inference_steps: int,
        step_kwargs: dict[str, Any],
        callback: Callable[..., dict] | None,
        callback_inputs: Sequence[str],
    ) -> torch.Tensor:
        """Run the scheduler's steps from noise to latents, with a progress bar and the caller's callback."""
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        num_warmup_steps = max(len(timesteps) - num_inference_steps * self.scheduler.order, 0)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self.predict(latents, t, labels)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]
                if callback is not None:
                    outputs = callback(self, i, t, dict.fromkeys(callback_inputs, latents))
                    latents = outputs.pop("latents", latents)
                if i == len(timesteps) - 1 or (i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
        return latents

    def check_num_frames(self, num_frames: int | None) -> int:
        """The number of frames to return.

        Raises:
            ValueError: when its latents do not fit the transformer.
        """
        groups, trained = self.vae.groups, self.transformer.config.video_length
        if num_frames is None:
            return groups.total(trained)
        check_latent_length(groups, num_frames, trained)
        return num_frames

    def prepare_labels(
        self, class_labels: list[int] | torch.Tensor | None, guidance_scale: float, device: torch.device
    ) -> torch.Tensor | None:
        """Labels on the device, (B,).

        Raises:
            ValueError: for labels outside the classes, or guidance of a model that knows no "no class".
        """
        num_classes = self.transformer.config.num_classes
        if (class_labels is None) != (num_classes is None):
            raise ValueError(
                f"class_labels is {class_labels} and the transformer has num_classes={num_classes}: pass labels to a"
                " class-conditional transformer and to no other."
            )
        if guidance_scale > 1 and (num_classes is None or self.transformer.config.class_dropout_prob == 0):
            raise ValueError(
                f"guidance_scale is {guidance_scale}; it needs a class-conditional transformer trained with"
                " class_dropout_prob > 0. Pass guidance_scale=1."
            )
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, dtype=torch.long, device=device).reshape(-1)
        if labels.numel() == 0 or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"class_labels are {labels.tolist()}; they must be in [0, {num_classes - 1}].")
        return labels

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Initial noise, (B, C, t, h, w) in float32: 250 steps lose too much in half precision.

        Raises:
            ValueError: for latents of another geometry, or a list of generators of another length.
        """
        config = self.transformer.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, config.in_channels, config.video_length, height, width)
        if latents is None:
            if isinstance(generator, list) and len(generator) != batch_size:
                raise ValueError(f"{len(generator)} generators for {batch_size} videos: pass one, or one for each.")
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this call needs noise of shape {shape}.")
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

    def prepare_step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict[str, Any]:
        """Those of `eta` and `generator` that this scheduler's step takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}

    def predict(self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The transformer's output for one step, guided, in float32; with its variance if the scheduler takes one."""
        model_input = self.scheduler.scale_model_input(latents, t).to(self.transformer.dtype)
        guided = self._guidance_scale > 1
        if guided:
            assert labels is not None  # there is guidance with classes only
            model_input = torch.cat([model_input, model_input])
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        output = self.transformer(model_input, t, class_labels=labels, return_dict=False)[0].float()
        channels = latents.shape[1]
        noise, variance = output[:, :channels], output[:, channels:]
        if guided:
            conditional, unconditional = noise.chunk(2)
            noise = unconditional + self._guidance_scale * (conditional - unconditional)
            variance = variance.chunk(2)[0]
        if self.scheduler.config.get("variance_type") in LEARNED_VARIANCES:
            return torch.cat([noise, variance], dim=1)
        return noise
