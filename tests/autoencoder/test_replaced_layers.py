"""Libraries that put layers in the place of ours, and hooks that keep features, find what PyTorch's layers give."""

import copy
import importlib

import diffusers
import pytest
import torch
from torch import nn

from vc_vae_diffusers.operators.evaluation.fusing import KernelLayer
from vc_vae_diffusers.operators.tdc import GroupCausalTDC, TemporalConv3d


def results(vae, video, num_frames: int | None = None):
    """What a model makes of a clip whole, in chunks, and of its first latent frame."""
    moments = vae.encode(video).latent_dist.parameters
    stream = torch.cat([p.parameters for p in vae.encode_stream(video.split(4, dim=2))], dim=2)
    z = moments.chunk(2, dim=1)[0]
    frames = vae.decode(z).sample
    parts = torch.cat(list(vae.decode_stream(z.split(1, dim=2))), dim=2)
    assert (stream - moments).abs().max() < 1e-3 * moments.abs().max()
    assert (parts - frames).abs().max() < 1e-3 * frames.abs().max()
    return moments, frames, vae.decode(z[:, :, :1]).sample, vae.encode(video[:, :, :1]).latent_dist.parameters


def largest(actual, expected) -> float:
    """The largest difference relative to the largest value."""
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))


# LoRA -------------------------------------------------------------------------------------------------------------------

TARGETS = [
    "encoder.conv_in",
    "encoder.down_blocks.1.downsamplers.0.conv",
    "encoder.down_blocks.1.temporal_downsampler",
    "encoder.mid_block.resnets.0.conv1",
    "decoder.up_blocks.0.resnets.0.conv2",
    "decoder.up_blocks.0.upsamplers.0.conv",
    "decoder.up_blocks.0.temporal_upsampler.conv",
    "decoder.conv_out",
]
DESIGNS = [{}, {"temporal_operator": "conv"}, {"temporal_causality": "causal"}, {"temporal_padding": "zeros"}]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("fused", [None, "before", "after"])
def test_lora_on_every_kind_of_convolution(make_vae, make_video, tmp_path, design, fused):
    """Beside a layer it adds what it adds when merged, across chunks and in images too; and it learns."""
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    vae, video = make_vae(**design), make_video(8)
    if fused == "before":
        vae.fuse_tdc()
    with torch.no_grad():
        plain = results(vae, video)
    model = peft.get_peft_model(vae, peft.LoraConfig(r=2, target_modules=TARGETS, lora_alpha=4))
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    if fused == "after":
        vae.fuse_tdc()
    assert len(lora) == 2 * len(TARGETS)
    with torch.no_grad():
        assert largest(results(vae, video), plain) < 1e-5  # B starts at zero
        for name, parameter in lora.items():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
        beside = results(vae, video)
    assert largest(beside, plain) > 0.05
    vae(video).sample.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in lora.values())
    with pytest.raises(ValueError, match=r"other layers than its configuration .*base_layer.*merge_and_unload first"):
        vae.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert not any("lora" in name for name, _ in merged.named_modules())
    with torch.no_grad():
        assert largest(results(merged, video), beside) < 1e-4


# Quantisation -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_quanto_quantises_the_whole_model(make_vae, make_video, tmp_path):
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto: pip install optimum-quanto ninja")
    vae, video = make_vae(), make_video(8)
    expected = results(vae, video)
    quanto.quantize(vae, weights=quanto.qint8)
    quanto.freeze(vae)
    replaced = [name for name, m in vae.named_modules() if isinstance(m, quanto.nn.QConv2d)]
    assert "decoder.up_blocks.0.upsamplers.0.conv" in replaced
    assert "encoder.down_blocks.0.downsamplers.0.conv" in replaced
    assert 1e-5 < largest(results(vae, video), expected) < 0.1
    vae.fuse_tdc()  # what is left of our own layers
    assert 1e-5 < largest(results(vae, video), expected) < 0.1
    with pytest.raises(ValueError, match="other layers than its configuration"):
        vae.save_pretrained(tmp_path)


@torch.no_grad()
def test_torchao_quantises_weights(make_vae, make_video, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    vae, video = make_vae(), make_video(8)
    expected = results(vae, video)
    quantization.quantize_(vae, quantization.Int8WeightOnlyConfig())
    assert 1e-5 < largest(results(vae, video), expected) < 0.1
    with pytest.raises(ValueError, match=r"no tensors with values .*before it is offloaded, sharded or quantised"):
        vae.save_pretrained(tmp_path)
    quantization.quant_api.swap_conv2d_1x1_to_linear(vae.decoder)
    vae.fuse_tdc()
    assert 1e-5 < largest(results(vae, video), expected) < 0.1


@torch.no_grad()
@pytest.mark.parametrize(("library", "backend"), [("torchao", "TorchAoConfig"), ("optimum.quanto", "QuantoConfig")])
def test_diffusers_quantises_on_loading(make_vae, make_video, tmp_path, library, backend):
    pytest.importorskip(library, reason="needs torchao and optimum-quanto: pip install torchao optimum-quanto ninja")
    vae, video = make_vae(), make_video(8)
    expected = results(vae, video)
    vae.save_pretrained(tmp_path)
    if backend == "TorchAoConfig":
        config = diffusers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    else:
        config = diffusers.QuantoConfig(weights_dtype="int8")
    loaded = type(vae).from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.float32)
    assert 1e-5 < largest(results(loaded, video), expected) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["encoder.conv_in", "encoder.mid_block.resnets.0.conv2", "decoder.conv_out"])
def test_a_plain_convolution_in_the_place_of_an_operator(make_vae, make_video, name):
    vae, video = make_vae(), make_video(8)
    expected = results(vae, video)
    layer: TemporalConv3d = vae.get_submodule(name)
    plain = nn.Conv3d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    plain.weight.copy_(layer.plain_kernel())
    plain.bias.copy_(layer.bias)
    parent, _, child = name.rpartition(".")
    setattr(vae.get_submodule(parent), child, plain)
    assert largest(results(vae, video), expected) < 1e-5


# Hooks ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_features_that_hooks_keep_are_not_overwritten(make_vae, make_video, fused):
    vae, video = make_vae().double(), make_video(8).double()  # in float32 the bound would depend on the processor
    expected = vae(video).sample
    if fused:
        vae.fuse_tdc()
    kept, copies, handles = [], [], []

    def keep(module, args, output):
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor):
                kept.append((module, tensor))
                copies.append(tensor.clone())

    for module in (*vae.encoder.modules(), *vae.decoder.modules()):
        handles.append(module.register_forward_hook(keep))
    sample = vae(video).sample
    assert (sample - expected).abs().max() < 1e-5
    assert {type(module) for module, _ in kept} >= {GroupCausalTDC, nn.GroupNorm, nn.SiLU}
    changed = [
        type(module).__name__ for (module, tensor), copied in zip(kept, copies, strict=True) if (tensor != copied).any()
    ]
    assert not changed
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(vae(video).sample, sample, rtol=0, atol=1e-5)


# Storage ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("first", ["fuse", "cast"])
def test_fusing_and_layerwise_casting_in_any_order(make_vae, make_video, storage, first, caplog):
    vae, video = make_vae(), make_video(8)
    reference = copy.deepcopy(vae)
    reference.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    expected = reference(video).sample
    if first == "fuse":
        vae.fuse_tdc()
    vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    if first == "cast":
        with caplog.at_level("WARNING"):
            vae.fuse_tdc()
        assert ("folds no kernels of" in caplog.text) == (storage == torch.float8_e4m3fn)
    for _ in range(2):
        torch.testing.assert_close(vae(video).sample, expected, rtol=0, atol=1e-5)
    layers = [layer for layer in vae.modules() if isinstance(layer, KernelLayer)]
    assert not any(layer.fused for layer in layers)
    assert {layer.weight.dtype for layer in layers} == {storage}
