"""The Latte pipelines against loops written out by hand, with tiny random models."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DDPMScheduler, LattePipeline, LatteTransformer3DModel
from diffusers.callbacks import PipelineCallback
from tiny_models import MEAN, STD, seeded, tiny_latte, tiny_vae

from vc_vae_diffusers.generation.pipeline_latte import (
    LatteVCVAEPipeline,
    LatteVCVAEUnconditionalPipeline,
    decode_video,
    denormalize_latents,
    normalize_latents,
)


def ddpm(**config) -> DDPMScheduler:
    return DDPMScheduler(
        **{"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace", **config}
    )


def tiny_pipeline(scheduler=None, vae=None, **transformer) -> LatteVCVAEUnconditionalPipeline:
    pipeline = LatteVCVAEUnconditionalPipeline(vae or tiny_vae(), tiny_latte(**transformer), scheduler or ddpm())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_pipeline(**config) -> LatteVCVAEPipeline:
    torch.manual_seed(2)
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    small |= {"cross_attention_dim": 16, "caption_channels": 6, "sample_size": 4, "patch_size": 2, "video_length": 3}
    small |= {"attention_bias": True, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000}
    small |= {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False, "norm_eps": 1e-6}
    transformer = LatteTransformer3DModel(**{**small, **config}).eval()
    pipeline = LatteVCVAEPipeline(None, None, tiny_vae(), transformer, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt() -> dict[str, torch.Tensor | None]:
    generator = seeded(5)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {"negative_prompt": None, **{name: torch.randn(1, 3, 6, generator=generator) for name in names}}


@torch.no_grad()
def test_unconditional_sampling_equals_the_loop_written_out():
    pipeline = tiny_pipeline()
    vae, transformer, scheduler = pipeline.vae, pipeline.transformer, ddpm()
    generator = seeded()
    latents = torch.randn(2, 4, 3, 4, 4, generator=generator)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        latents = scheduler.step(transformer(latents, t).sample, t, latents, generator=generator).prev_sample
    expected = vae.decode(latents * torch.tensor(STD)[:, None, None, None] + torch.tensor(MEAN)[:, None, None, None])
    expected = (expected.sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)

    frames = pipeline(batch_size=2, num_inference_steps=4, generator=seeded(), output_type="pt").frames
    assert frames.shape == (2, 12, 3, 32, 32)
    assert frames.std() > 0.01
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_output_types_agree():
    pipeline = tiny_pipeline()
    outputs = {
        kind: pipeline(num_inference_steps=2, generator=seeded(), output_type=kind, return_dict=False)[0]
        for kind in ("pil", "np", "pt", "latent")
    }
    assert outputs["latent"].shape == (1, 4, 3, 4, 4)
    decoded = decode_video(pipeline.vae, outputs["latent"], 12)
    video = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(outputs["pt"], video, rtol=0, atol=1e-6)
    assert outputs["np"].shape == (1, 12, 32, 32, 3)
    np.testing.assert_allclose(outputs["np"], video.permute(0, 1, 3, 4, 2).numpy(), rtol=0, atol=1e-6)
    assert len(outputs["pil"]) == 1
    assert len(outputs["pil"][0]) == 12
    pil = np.stack([np.asarray(frame) for frame in outputs["pil"][0]])
    assert np.abs(pil - outputs["np"][0] * 255).max() <= 0.5 + 1e-3


def test_each_generator_makes_its_own_video():
    pipeline = tiny_pipeline()
    both = pipeline(batch_size=2, num_inference_steps=3, generator=[seeded(1), seeded(2)], output_type="pt").frames
    for index, seed in enumerate((1, 2)):
        alone = pipeline(num_inference_steps=3, generator=[seeded(seed)], output_type="pt").frames[0]
        torch.testing.assert_close(both[index], alone, rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="1 generators for 2 videos"):
        pipeline(batch_size=2, generator=[seeded(1)])


def test_the_learned_variance_is_used_where_the_scheduler_takes_one():
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    learned = tiny_pipeline()(generator=seeded(), **arguments).frames
    fixed = tiny_pipeline(ddpm(variance_type="fixed_small"))(generator=seeded(), **arguments).frames
    assert (learned - fixed).abs().max() > 1e-3
    pipeline = tiny_pipeline(DDIMScheduler(clip_sample=False))
    without, with_eta = (pipeline(generator=seeded(), eta=eta, **arguments).frames for eta in (0.0, 1.0))
    assert (without - with_eta).abs().max() > 1e-3


@torch.no_grad()
def test_class_guidance_mixes_the_noise_and_keeps_the_conditional_variance():
    pipeline = tiny_pipeline(num_classes=3)
    pipeline.scheduler = ddpm(beta_end=0.001)  # little noise: one step amplifies rounding less
    transformer, scheduler = pipeline.transformer, ddpm(beta_end=0.001)
    latents = torch.randn(1, 4, 3, 4, 4, generator=seeded())
    scheduler.set_timesteps(2)
    t = scheduler.timesteps[0]
    labelled = transformer(latents, t, class_labels=torch.tensor([2])).sample
    unlabelled = transformer(latents, t, class_labels=torch.tensor([3])).sample
    noise = unlabelled[:, :4] + 4.0 * (labelled - unlabelled)[:, :4]
    expected = scheduler.step(torch.cat([noise, labelled[:, 4:]], dim=1), t, latents, generator=seeded(9)).prev_sample

    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = True
        return tensors

    pipeline(
        class_labels=[2],
        guidance_scale=4.0,
        num_inference_steps=2,
        latents=latents,
        generator=seeded(9),
        output_type="latent",
        callback_on_step_end=record,
    )
    assert len(seen) == 1  # interrupted after the first step
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)
    assert (noise - labelled[:, :4]).abs().max() > 1e-2


def test_labels_set_the_batch_and_are_checked():
    pipeline = tiny_pipeline(num_classes=3)
    frames = pipeline(class_labels=torch.tensor([0, 2]), num_inference_steps=1, output_type="np").frames
    assert frames.shape == (2, 12, 32, 32, 3)
    for arguments, message in [
        ({}, "pass labels to a"),
        ({"class_labels": [3]}, r"must be in \[0, 2\]"),
        ({"class_labels": []}, r"must be in \[0, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipeline(**arguments)
    with pytest.raises(ValueError, match="pass labels to a"):
        tiny_pipeline()(class_labels=[0])
    for unguided in (tiny_pipeline(), tiny_pipeline(num_classes=3, class_dropout_prob=0.0)):
        labels = None if unguided.transformer.config.num_classes is None else [1]
        with pytest.raises(ValueError, match="Pass guidance_scale=1"):
            unguided(class_labels=labels, guidance_scale=2.0)


def test_callbacks_see_every_step_and_may_replace_the_latents():
    class Zero(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            steps.append((step_index, int(timestep)))
            callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
            return callback_kwargs

    steps = []
    pipeline = tiny_pipeline()
    result = pipeline(num_inference_steps=3, output_type="latent", callback_on_step_end=Zero()).frames
    assert [step for step, _ in steps] == [0, 1, 2]
    assert [timestep for _, timestep in steps] == ddpm_timesteps(3)
    assert result.abs().max() == 0
    assert pipeline.num_timesteps == 3
    with pytest.raises(ValueError, match=r"\['prompt_embeds'\]"):
        pipeline(callback_on_step_end_tensor_inputs=["prompt_embeds"])


def ddpm_timesteps(steps: int) -> list[int]:
    scheduler = ddpm()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("convention", ["4k", "4k+1"])
def test_num_frames_crops_the_last_group_and_must_fit_the_transformer(convention):
    pipeline = tiny_pipeline(vae=tiny_vae(frame_convention=convention))
    arguments = {"num_inference_steps": 1, "output_type": "pt"}
    whole = pipeline(generator=seeded(), **arguments).frames
    assert whole.shape[1] == 12
    cropped = pipeline(num_frames=10, generator=seeded(), **arguments).frames
    expected = whole[:, :10] if convention == "4k" else whole[:, 2:]
    torch.testing.assert_close(cropped, expected, rtol=0, atol=1e-6)
    for frames in (8, 13):
        with pytest.raises(ValueError, match="ask for 12 frames"):
            pipeline(num_frames=frames, **arguments)
    with pytest.raises(ValueError, match=r"needs noise of shape \(1, 4, 3, 4, 4\)"):
        pipeline(latents=torch.zeros(1, 4, 3, 4, 5), **arguments)


@torch.no_grad()
def test_separate_first_frame_lengths_are_those_of_the_vae():
    vae = tiny_vae(first_frame="separate")
    for frames in (1, 2, 5, 6, 9):
        assert vae.encode(torch.zeros(1, 3, frames, 8, 8)).latent_dist.mode().shape[2] == vae.groups.latent_frames(frames)
        assert tiny_vae().encode(torch.zeros(1, 3, frames, 8, 8)).latent_dist.mode().shape[2] == -(-frames // 4)
    pipeline = tiny_pipeline(vae=vae)
    assert pipeline(num_inference_steps=1, output_type="pt").frames.shape[1] == 9
    with pytest.raises(ValueError, match="ask for 9 frames"):
        pipeline(num_frames=13, num_inference_steps=1)


def test_normalisation_is_by_channel_and_inverts():
    vae, latents = tiny_vae(), torch.randn(2, 4, 3, 4, 4, generator=seeded())
    normalised = normalize_latents(vae, latents)
    for channel in range(4):
        expected = (latents[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(normalised[:, channel], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(denormalize_latents(vae, normalised), latents, rtol=0, atol=1e-6)
    flux = tiny_vae(latents_mean=None, latents_std=None, scaling_factor=0.3611, shift_factor=0.1159)
    torch.testing.assert_close(normalize_latents(flux, latents), (latents - 0.1159) * 0.3611, rtol=0, atol=1e-6)


@torch.no_grad()
def test_decoding_is_streamed_in_bounded_chunks():
    vae, latents = tiny_vae(), torch.randn(2, 4, 3, 4, 4, generator=seeded())
    expected = vae.decode(denormalize_latents(vae, latents), num_frames=11).sample
    lengths = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, args: lengths.append(tuple(args[0].shape[:3:2])))
    vae.groups_per_chunk = 2
    for slicing, chunk_size, calls in [
        (False, None, [(2, 2), (2, 1)]),
        (False, 1, [(2, 1)] * 3),
        (True, None, [(1, 2), (1, 1)] * 2),
    ]:
        vae.use_slicing = slicing
        lengths.clear()
        video = decode_video(vae, latents, 11, chunk_size)
        assert lengths == calls
        torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)
    hook.remove()
    half = decode_video(vae.to(torch.bfloat16), latents, 11)
    assert half.dtype == torch.float32
    assert 0 < (half - expected).abs().max() < 0.2


def test_unconditional_pipeline_saves_and_loads(tmp_path):
    pipeline = tiny_pipeline(num_classes=3)
    pipeline.save_pretrained(tmp_path, variant="fp32", max_shard_size="10KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    loaded = LatteVCVAEUnconditionalPipeline.from_pretrained(tmp_path, variant="fp32")
    loaded.set_progress_bar_config(disable=True)
    arguments = {"class_labels": [1], "num_inference_steps": 2, "output_type": "pt"}
    expected = pipeline(generator=seeded(), **arguments).frames
    torch.testing.assert_close(loaded(generator=seeded(), **arguments).frames, expected, rtol=0, atol=1e-5)
    half = LatteVCVAEUnconditionalPipeline.from_pretrained(tmp_path, variant="fp32", dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.vae.dtype == half.transformer.dtype == torch.bfloat16
    frames = half(generator=seeded(), **arguments).frames
    assert frames.dtype == torch.float32
    assert 0 < (frames - expected).abs().max() < 0.1


@pytest.mark.parametrize("offload", ["model", "sequential", "group", "leaf", "layerwise"])
def test_offload_and_casting_change_nothing(offload, tmp_path):
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    expected = tiny_pipeline()(generator=seeded(), **arguments).frames
    pipeline = tiny_pipeline()
    if offload == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    elif offload == "sequential":
        # What enable_sequential_cpu_offload does; it would name the device "cpu:0", which accelerate cannot reload to.
        for model in (pipeline.vae, pipeline.transformer):
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
        assert pipeline.transformer.pos_embed.device.type == "meta"
    elif offload == "layerwise":
        pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        pipeline.vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    else:
        level = {"offload_type": "leaf_level"} if offload == "leaf" else {"num_blocks_per_group": 1}
        pipeline.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **level)
    frames = pipeline(generator=seeded(), **arguments).frames
    tolerance = 0.1 if offload == "layerwise" else 1e-5
    assert (frames - expected).abs().max() <= tolerance
    assert (pipeline(generator=seeded(), **arguments).frames - frames).abs().max() < 1e-5  # a second call too


@torch.no_grad()
def test_text_pipeline_equals_the_loop_written_out():
    pipeline, embeds = text_pipeline(), prompt()
    transformer, scheduler = pipeline.transformer, DDIMScheduler(clip_sample=False)
    latents = torch.randn(1, 4, 3, 4, 4, generator=seeded())
    scheduler.set_timesteps(3)
    text = torch.cat([embeds["negative_prompt_embeds"], embeds["prompt_embeds"]])
    for t in scheduler.timesteps:
        noise = transformer(torch.cat([latents] * 2), t.expand(2), text).sample
        unconditional, conditional = noise[:, :4].chunk(2)
        noise = unconditional + 7.5 * (conditional - unconditional)
        latents = scheduler.step(noise, t, latents).prev_sample
    expected = pipeline.vae.decode(denormalize_latents(pipeline.vae, latents), num_frames=11).sample
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)

    arguments = {"video_length": 11, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt"}
    frames = pipeline(**embeds, **arguments, generator=seeded(), decode_chunk_size=2).frames
    assert frames.shape == (1, 11, 3, 32, 32)
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_text_pipeline_is_a_latte_pipeline_that_names_frame_counts_and_reloads(tmp_path):
    pipeline, embeds = text_pipeline(), prompt()
    assert isinstance(pipeline, LattePipeline)
    arguments = {**embeds, "height": 32, "width": 32, "num_inference_steps": 1}
    with pytest.raises(ValueError, match=r"16 frames make 4 latent frames.*ask for 12 frames"):
        pipeline(**arguments)
    latents = pipeline(**arguments, video_length=12, output_type="latent", generator=seeded()).frames
    assert latents.shape == (1, 4, 3, 4, 4)
    pipeline.save_pretrained(tmp_path)
    loaded = LatteVCVAEPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
    again = loaded(**arguments, video_length=12, output_type="latent", generator=seeded()).frames
    torch.testing.assert_close(again, latents, rtol=0, atol=1e-5)
