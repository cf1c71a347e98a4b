"""Unmodified diffusers pipelines with a VC-VAE in place of their VAE: frame counts, values, offload, slicing, tiling, bf16.

All models are tiny and random, text embeddings are passed in. So this shows that the pipelines and the VAE fit together
exactly; what a denoiser trained on VC-VAE latents would draw is another matter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from tiny_models import MEAN, STD, seeded, tiny_vae

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE

SIZE, TEXT = 32, 16


def text(dtype: torch.dtype, tokens: int = 7, width: int = TEXT) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=seeded(3)).to(dtype)


def picture(index: int = 0) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 255, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def hunyuan(vae: AutoencoderKLVCVAE) -> DiffusionPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return HunyuanVideoPipeline(None, None, transformer, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)


def hunyuan_call(frames: int, dtype: torch.dtype) -> dict:
    mask = torch.ones(1, 7, dtype=dtype)
    pooled = torch.ones(1, 8, dtype=dtype)
    return {
        "num_frames": frames,
        "prompt_embeds": text(dtype),
        "pooled_prompt_embeds": pooled,
        "prompt_attention_mask": mask,
    }


def hunyuan15(vae: AutoencoderKLVCVAE) -> DiffusionPipeline:
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        image_embed_dim=TEXT,
        rope_axes_dim=(4, 6, 6),
        target_size=SIZE,
        task_type="t2v",
    )
    scheduler, guider = FlowMatchEulerDiscreteScheduler(shift=7.0), ClassifierFreeGuidance(guidance_scale=1.0)
    return HunyuanVideo15Pipeline(None, None, transformer, vae, scheduler, None, None, guider)


def hunyuan15_call(frames: int, dtype: torch.dtype) -> dict:
    call = {"num_frames": frames}
    for suffix in ("", "_2"):
        call[f"prompt_embeds{suffix}"] = text(dtype)
        call[f"prompt_embeds_mask{suffix}"] = torch.ones(1, 7)
    return call


def wan_transformer(in_channels: int = 4) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def wan(vae: AutoencoderKLVCVAE) -> DiffusionPipeline:
    return WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), wan_transformer())


def wan_i2v(vae: AutoencoderKLVCVAE) -> DiffusionPipeline:
    # Latents, the condition's latents and a mask of r_t channels.
    transformer = wan_transformer(in_channels=4 + 4 + 4)
    return WanImageToVideoPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer)


def wan_v2v(vae: AutoencoderKLVCVAE) -> DiffusionPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanVideoToVideoPipeline(None, None, wan_transformer(), vae, scheduler)


def skyreels(vae: AutoencoderKLVCVAE) -> DiffusionPipeline:
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return SkyReelsV2Pipeline(None, None, transformer, vae, scheduler)


def cogvideox_transformer(in_channels: int) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=TEXT,
        num_layers=1,
        sample_width=SIZE // 8,
        sample_height=SIZE // 8,
        sample_frames=9,
        max_text_seq_length=7,
    )


def cogvideox(vae: AutoencoderKLVCVAE) -> DiffusionPipeline:
    return CogVideoXPipeline(None, None, vae, cogvideox_transformer(4), CogVideoXDDIMScheduler())


def cogvideox_i2v(vae: AutoencoderKLVCVAE) -> DiffusionPipeline:
    return CogVideoXImageToVideoPipeline(None, None, vae, cogvideox_transformer(8), CogVideoXDDIMScheduler())


def text_call(frames: int, dtype: torch.dtype) -> dict:
    return {"num_frames": frames, "prompt_embeds": text(dtype), "guidance_scale": 1.0}


def image_call(frames: int, dtype: torch.dtype) -> dict:
    return {"image": picture(), **text_call(frames, dtype)}


def video_call(frames: int, dtype: torch.dtype) -> dict:
    video = [picture(index) for index in range(frames)]
    return {"video": video, "prompt_embeds": text(dtype), "guidance_scale": 1.0}


def doubled(call: dict) -> dict:
    """The same call for two prompts, which share an image."""
    return {name: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


def doubled_inputs(call: dict) -> dict:
    """The same call for two prompts with an image or a video each."""
    return {name: [x, x] if name in ("image", "video") else x for name, x in doubled(call).items()}


@dataclass(frozen=True)
class DropIn:
    """A pipeline, how to call it, the frames to ask for with "4k" to get 8, and how its latents map to the VAE's."""

    build: Callable[[AutoencoderKLVCVAE], DiffusionPipeline]
    call: Callable[[int, torch.dtype], dict]
    ask_for_8: int
    per_channel: bool
    frames_first: bool = False
    doubled: Callable[[dict], dict] = doubled

    def pipeline(self, convention: str = "4k") -> DiffusionPipeline:
        torch.manual_seed(1)
        pipeline = self.build(tiny_vae(frame_convention=convention, scaling_factor=0.7))
        pipeline.transformer.eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(self, pipeline: DiffusionPipeline, frames: int | None = None, output_type: str = "pt", two: bool = False):
        call = self.call(frames or self.ask_for_8, pipeline.transformer.dtype)
        call = self.doubled(call) if two else call
        arguments = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "generator": seeded(), **call}
        return pipeline(**arguments, output_type=output_type).frames

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """The pipeline's latents as the VAE takes them."""
        if self.frames_first:
            latents = latents.transpose(1, 2)
        if not self.per_channel:
            return latents / 0.7
        mean, std = (torch.tensor(values)[:, None, None, None] for values in (MEAN, STD))
        return latents * std + mean


PIPELINES = {
    "HunyuanVideo": DropIn(hunyuan, hunyuan_call, 8, per_channel=False),
    "HunyuanVideo1.5": DropIn(hunyuan15, hunyuan15_call, 8, per_channel=False),
    "Wan-T2V": DropIn(wan, text_call, 5, per_channel=True),
    "Wan-I2V": DropIn(wan_i2v, image_call, 5, per_channel=True),
    "Wan-V2V": DropIn(wan_v2v, video_call, 8, per_channel=True, doubled=doubled_inputs),
    "CogVideoX-T2V": DropIn(cogvideox, text_call, 8, per_channel=False, frames_first=True),
    "CogVideoX-I2V": DropIn(cogvideox_i2v, image_call, 8, per_channel=False, frames_first=True, doubled=doubled_inputs),
    "SkyReels-V2": DropIn(skyreels, text_call, 5, per_channel=True),
}
every_pipeline = pytest.mark.parametrize("drop_in", PIPELINES.values(), ids=PIPELINES.keys())


def to_pixels(sample: torch.Tensor) -> torch.Tensor:
    return (sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@every_pipeline
@torch.no_grad()
def test_groups_of_four_come_back_and_are_the_vaes_decoding(drop_in):
    pipeline = drop_in.pipeline()
    frames = drop_in.run(pipeline)
    assert frames.shape == (1, 8, 3, SIZE, SIZE)
    assert frames.std() > 1e-2
    latents = drop_in.unscale(drop_in.run(pipeline, output_type="latent"))
    assert latents.shape == (1, 4, 2, SIZE // 8, SIZE // 8)
    assert_close(frames, to_pixels(pipeline.vae.decode(latents).sample))


@every_pipeline
@torch.no_grad()
def test_the_4k_plus_1_convention_returns_the_frames_asked_for(drop_in):
    pipeline = drop_in.pipeline("4k+1")
    for frames in (5, 9):
        video = drop_in.run(pipeline, frames)
        assert video.shape == (1, frames, 3, SIZE, SIZE)
    latents = drop_in.unscale(drop_in.run(pipeline, 9, output_type="latent"))
    assert latents.shape == (1, 4, 3, SIZE // 8, SIZE // 8)
    assert_close(video, to_pixels(pipeline.vae.decode(latents, num_frames=9).sample))


@torch.no_grad()
def test_wan_rounds_frame_counts_to_one_more_than_a_multiple_of_four():
    """Why "4k+1" exists: with "4k" Wan returns 20 frames when asked for 16."""
    assert PIPELINES["Wan-T2V"].run(PIPELINES["Wan-T2V"].pipeline(), 16).shape[1] == 20
    assert PIPELINES["Wan-T2V"].run(PIPELINES["Wan-T2V"].pipeline("4k+1"), 17).shape[1] == 17


@torch.no_grad()
def test_wan_image_to_video_conditions_on_the_latent_of_the_image():
    """Its condition is the image and then empty frames: front padding keeps those out of latent 0."""
    pipeline = PIPELINES["Wan-I2V"].pipeline("4k+1")
    image = pipeline.video_processor.preprocess(picture(), height=SIZE, width=SIZE)
    generator, vae = seeded(), pipeline.vae
    _, condition = pipeline.prepare_latents(image, 1, 4, SIZE, SIZE, 9, torch.float32, "cpu", generator)
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (MEAN, STD))
    expected = (vae.encode(image.unsqueeze(2)).latent_dist.mode() - mean) / std
    assert_close(condition[:, 4:, :1], expected)
    end_padded = PIPELINES["Wan-I2V"].pipeline("4k")
    _, mixed = end_padded.prepare_latents(image, 1, 4, SIZE, SIZE, 9, torch.float32, "cpu", generator)
    assert (mixed[:, 4:, :1] - expected).abs().max() > 0.01


def sequential_offload(pipeline: DiffusionPipeline) -> None:
    # What enable_sequential_cpu_offload does; it would name the device "cpu:0", which accelerate cannot reload to.
    for model in (pipeline.transformer, pipeline.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert next(pipeline.vae.parameters()).device.type == "meta"


def count_hook_calls(pipeline: DiffusionPipeline, calls: list[str]) -> None:
    hook, pre_forward = pipeline.vae._hf_hook, pipeline.vae._hf_hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: calls.append("vae") or pre_forward(module, *args, **kwargs)


@every_pipeline
@torch.no_grad()
def test_model_offload_moves_the_vae_for_encode_and_decode(drop_in):
    expected = drop_in.run(drop_in.pipeline())
    pipeline, calls = drop_in.pipeline(), []
    pipeline.enable_model_cpu_offload(device="cpu")
    count_hook_calls(pipeline, calls)
    assert_close(drop_in.run(pipeline), expected)
    encodes = drop_in.call in (image_call, video_call)
    assert len(calls) == (2 if encodes else 1)


@every_pipeline
@pytest.mark.parametrize("level", ["sequential", "block_level", "leaf_level"])
@torch.no_grad()
def test_sequential_and_group_offload_change_nothing(drop_in, level, tmp_path):
    expected = drop_in.run(drop_in.pipeline())
    pipeline = drop_in.pipeline()
    if level == "sequential":
        sequential_offload(pipeline)
    else:
        pipeline.enable_group_offload(
            torch.device("cpu"), offload_type=level, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
        )
        assert list(tmp_path.rglob("*.safetensors"))  # weights are on the disk until a module needs them
    assert_close(drop_in.run(pipeline), expected)


@every_pipeline
@torch.no_grad()
def test_slicing_decodes_one_video_at_a_time(drop_in):
    pipeline, sizes = drop_in.pipeline(), []
    hook = pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    expected = drop_in.run(pipeline, two=True)
    assert set(sizes) == {2}
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    pipeline.vae.enable_slicing()
    sizes.clear()
    sliced = drop_in.run(pipeline, two=True)
    hook.remove()
    assert set(sizes) == {1}
    assert_close(sliced, expected)


@every_pipeline
@torch.no_grad()
def test_tiling_decodes_in_tiles(drop_in):
    pipeline, sizes = drop_in.pipeline(), []
    whole = drop_in.run(pipeline)
    pipeline.vae.enable_tiling(24, 24, 16, 16)
    hook = pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[3:])))
    tiled = drop_in.run(pipeline)
    latents = drop_in.unscale(drop_in.run(pipeline, output_type="latent"))
    hook.remove()
    assert max(sizes) <= (3, 3)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().max() > 1e-4  # tiles change the random network's norms: proof that they were used
    assert_close(tiled, to_pixels(pipeline.vae.decode(latents).sample))


@every_pipeline
@torch.no_grad()
def test_bfloat16(drop_in):
    pipeline = drop_in.pipeline()
    expected = drop_in.run(pipeline)
    pipeline.to(torch.bfloat16)
    frames = drop_in.run(pipeline).float()
    assert pipeline.vae.dtype == torch.bfloat16
    assert frames.isfinite().all()
    assert 0 < (frames - expected).abs().mean() < 0.05


@torch.no_grad()
def test_saved_and_loaded_as_a_component(tmp_path):
    drop_in = PIPELINES["Wan-T2V"]
    pipeline = drop_in.pipeline()
    expected = drop_in.run(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.vae, AutoencoderKLVCVAE)
    assert_close(drop_in.run(loaded), expected)
