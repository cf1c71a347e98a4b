"""LatteAdaLNTransformer3DModel against a literal reference, the published sizes and the original state-dict layout."""

import math

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file

from vc_vae_diffusers.generation.latte_transformer import (
    LATTE_SIZES,
    LatteAdaLNTransformer3DModel,
    LatteBlock,
    latte_size_config,
    spatial_positions,
)

TINY = {
    "sample_size": (4, 6),
    "in_channels": 3,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "video_length": 3,
}


def randomised(seed: int = 0, **config) -> LatteAdaLNTransformer3DModel:
    """A tiny model whose zero-initialised layers are random too, so that every layer shows in the output."""
    torch.manual_seed(seed)
    model = LatteAdaLNTransformer3DModel(**{**TINY, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def latents(batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def reference_block(weights: dict, prefix: str, tokens: torch.Tensor, condition: torch.Tensor, heads: int):
    """One adaLN-zero block on tokens (N, D) of one group, attention written out as softmax of dot products."""
    dim = tokens.shape[1]

    def linear(name, x):
        return x @ weights[f"{prefix}.{name}.weight"].T + weights[f"{prefix}.{name}.bias"]

    def norm(x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    shift1, scale1, gate1, shift2, scale2, gate2 = linear("adaLN_modulation.1", F.silu(condition)).split(dim)
    qkv = linear("attn.qkv", norm(tokens) * (1 + scale1) + shift1)
    width = dim // heads
    outputs = []
    for head in range(heads):
        query, key, value = (qkv[:, part * dim + head * width :][:, :width] for part in range(3))
        outputs.append(torch.softmax(query @ key.T / math.sqrt(width), dim=1) @ value)
    tokens = tokens + gate1 * linear("attn.proj", torch.cat(outputs, dim=1))
    hidden = F.gelu(linear("mlp.fc1", norm(tokens) * (1 + scale2) + shift2), approximate="tanh")
    return tokens + gate2 * linear("mlp.fc2", hidden)


def reference_forward(model, sample: torch.Tensor, timestep: float, label: int | None = None) -> torch.Tensor:
    """Latte for one sample (C, T, H, W) with loops over frames, places and patches, in float64."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    patch, heads, depth = model.config.patch_size, model.config.num_attention_heads, model.config.num_layers
    _, frames, height, width = sample.shape
    rows, columns = height // patch, width // patch

    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64) * timestep
    embedded = torch.cat([frequencies.cos(), frequencies.sin()])
    hidden = F.silu(weights["t_embedder.mlp.0.weight"] @ embedded + weights["t_embedder.mlp.0.bias"])
    condition = weights["t_embedder.mlp.2.weight"] @ hidden + weights["t_embedder.mlp.2.bias"]
    if label is not None:
        condition = condition + weights["y_embedder.embedding_table.weight"][label]

    kernel = weights["x_embedder.proj.weight"].flatten(1)
    x = torch.zeros(frames, rows * columns, kernel.shape[0], dtype=torch.float64)
    for t in range(frames):
        for place in range(rows * columns):
            i, j = divmod(place, columns)
            values = sample[:, t, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].double().reshape(-1)
            x[t, place] = kernel @ values + weights["x_embedder.proj.bias"] + weights["pos_embed"][0, place]
    for index in range(0, depth, 2):
        x = torch.stack([reference_block(weights, f"blocks.{index}", x[t], condition, heads) for t in range(frames)])
        if index == 0:
            x = x + weights["temp_embed"][0][:, None]
        columns_of_time = [
            reference_block(weights, f"blocks.{index + 1}", x[:, s], condition, heads) for s in range(x.shape[1])
        ]
        x = torch.stack(columns_of_time, dim=1)

    final = weights["final_layer.adaLN_modulation.1.weight"] @ F.silu(condition)
    shift, scale = (final + weights["final_layer.adaLN_modulation.1.bias"]).chunk(2)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    x = x @ weights["final_layer.linear.weight"].T + weights["final_layer.linear.bias"]
    output = torch.zeros(model.out_channels, frames, height, width, dtype=torch.float64)
    for t in range(frames):
        for place in range(rows * columns):
            i, j = divmod(place, columns)
            values = x[t, place].reshape(patch, patch, model.out_channels).permute(2, 0, 1)
            output[:, t, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = values
    return output


def original_keys(depth: int, conditional: bool) -> set[str]:
    """State-dict keys of the original Latte release."""
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    layers += [f"blocks.{index}.{name}" for index in range(depth) for name in block]
    keys = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"pos_embed", "temp_embed"}
    return keys | {"y_embedder.embedding_table.weight"} if conditional else keys


@torch.no_grad()
def test_forward_equals_the_literal_reference():
    model, sample = randomised(), latents()
    output = model(sample, torch.tensor([7, 60])).sample  # float32 phases: exact to 1e-6 rad at small timesteps
    for index, timestep in enumerate((7, 60)):
        expected = reference_forward(model, sample[index], timestep)
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(output[index].double(), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_class_conditional_forward_equals_the_reference_and_the_label_matters():
    model, sample = randomised(num_classes=5), latents(batch=1)
    output = model(sample, 3, class_labels=torch.tensor([4])).sample
    torch.testing.assert_close(output[0].double(), reference_forward(model, sample[0], 3, 4), rtol=0, atol=2e-5)
    no_class = model(sample, 3, class_labels=torch.tensor([5])).sample
    assert (no_class - output).abs().max() > 1e-2


def test_published_parameter_counts():
    # Latte's table of model sizes (decimals cut, not rounded): trainable parameters with 4 latent channels.
    published = {"S": 32.48, "B": 129.54, "L": 456.81, "XL": 673.68}
    for name, millions in published.items():
        with torch.device("meta"):
            model = LatteAdaLNTransformer3DModel.from_size(f"{name}/2", in_channels=4, video_length=16)
        assert math.floor(model.num_parameters(only_trainable=True) / 1e4) / 100 == millions, name
        assert len(model.blocks) == LATTE_SIZES[name][0]


def test_default_model_is_the_papers_on_vc_vae_latents():
    with torch.device("meta"):
        model = LatteAdaLNTransformer3DModel()
    assert model.num_parameters(only_trainable=True) == 673_847_552  # 673.7M + 12 more channels in and 24 more out
    assert model.config.in_channels == 16
    assert model.config.video_length == 4
    assert model.out_channels == 32


def test_state_dict_has_the_original_layout():
    for conditional in (False, True):
        model = LatteAdaLNTransformer3DModel(**TINY, num_classes=5 if conditional else None)
        assert set(model.state_dict()) == original_keys(4, conditional)
    assert model.state_dict()["y_embedder.embedding_table.weight"].shape == (6, 16)
    assert model.state_dict()["blocks.0.adaLN_modulation.1.weight"].shape == (96, 16)
    assert model.state_dict()["final_layer.linear.weight"].shape == (2 * 2 * 6, 16)


@pytest.mark.parametrize("layout", ["ema", "model", "bare", "safetensors"])
def test_original_checkpoints_load_strictly(tmp_path, layout):
    source = randomised(sample_size=8, num_classes=3)
    state_dict = source.state_dict()
    path = tmp_path / ("latte.safetensors" if layout == "safetensors" else "latte.pt")
    if layout == "safetensors":
        save_file(state_dict, path)
    elif layout == "ema":  # the EMA weights win over the raw ones
        torch.save({"model": {name: value + 1 for name, value in state_dict.items()}, "ema": state_dict}, path)
    else:
        torch.save({"model": state_dict} if layout == "model" else state_dict, path)
    model = LatteAdaLNTransformer3DModel.from_latte_checkpoint(path, num_attention_heads=2)
    assert dict(model.config)["num_classes"] == 3
    assert not model.training
    for name, value in state_dict.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_checkpoints_of_other_models_are_refused(tmp_path):
    state_dict = randomised(sample_size=8).state_dict()
    torch.save({**state_dict, "text_embedding_projection.1.weight": torch.zeros(1)}, tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"unexpected keys \['text_embedding_projection.1.weight'\]"):
        LatteAdaLNTransformer3DModel.from_latte_checkpoint(tmp_path / "text.pt", num_attention_heads=2)
    with pytest.raises(ValueError, match="pass num_attention_heads"):
        LatteAdaLNTransformer3DModel.from_latte_checkpoint(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"no tensor 'x_embedder.proj.weight'"):
        LatteAdaLNTransformer3DModel.from_latte_checkpoint(tmp_path / "other.pt")


def test_published_width_needs_no_heads(tmp_path):
    model = LatteAdaLNTransformer3DModel(
        **{**TINY, "sample_size": 4, "num_layers": 2, "num_attention_heads": 6, "attention_head_dim": 64}
    )
    torch.save(model.state_dict(), tmp_path / "s.pt")
    assert LatteAdaLNTransformer3DModel.from_latte_checkpoint(tmp_path / "s.pt").config.num_attention_heads == 6


def test_positions_are_those_of_the_release():
    expected = get_2d_sincos_pos_embed(16, 4, base_size=4)
    torch.testing.assert_close(spatial_positions(16, 4, 4).double(), expected.double(), rtol=0, atol=1e-6)
    rectangle = spatial_positions(16, 2, 3).reshape(2, 3, 16)
    assert torch.equal(rectangle[0, 1, :8], rectangle[1, 1, :8])  # the first half encodes the column alone
    assert torch.equal(rectangle[1, 0, 8:], rectangle[1, 2, 8:])  # the second half the row alone
    assert not torch.equal(rectangle[0, 1, :8], rectangle[0, 2, :8])


def test_an_untrained_model_predicts_zero():
    output = LatteAdaLNTransformer3DModel(**TINY)(latents(), 500).sample
    assert output.shape == (2, 6, 3, 4, 6)
    assert output.abs().max() == 0


def test_gradient_checkpointing_recomputes_and_changes_no_gradient():
    model = randomised().train()
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        calls.clear()
        if enabled:
            model.enable_gradient_checkpointing()
        model(latents(), 10).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        assert len(calls) == 4 * (1 + enabled)  # each block ran again in the backward pass
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-9)


def test_label_dropout_in_training_only():
    model, sample = randomised(num_classes=5, class_dropout_prob=1.0), latents(batch=1)
    label, no_class = torch.tensor([2]), torch.tensor([5])
    with torch.no_grad():
        labelled, unlabelled = (model(sample, 3, class_labels=value).sample for value in (label, no_class))
        dropped = model.train()(sample, 3, class_labels=label).sample
    assert (labelled - unlabelled).abs().max() > 1e-2
    assert torch.equal(dropped, unlabelled)


def test_save_and_load_keep_weights_positions_and_frozen_parameters(tmp_path):
    model = randomised()
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp32")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    loaded = LatteAdaLNTransformer3DModel.from_pretrained(tmp_path, variant="fp32")
    with torch.no_grad():
        assert torch.equal(loaded(latents(), 5).sample, model(latents(), 5).sample)
    assert not loaded.pos_embed.requires_grad
    assert not loaded.temp_embed.requires_grad
    half = LatteAdaLNTransformer3DModel.from_pretrained(tmp_path, variant="fp32", dtype=torch.bfloat16)
    with torch.no_grad():
        difference = half(latents().bfloat16(), 5).sample.float() - model(latents(), 5).sample
    assert half.dtype == torch.bfloat16
    assert 0 < difference.abs().max() < 0.1


def test_layerwise_casting_and_repeated_block_compilation():
    model, sample = randomised(), latents()
    with torch.no_grad():
        expected = model(sample, 5).sample
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(sample, 5).sample, expected, rtol=0, atol=1e-6)
    model = randomised()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert model.pos_embed.dtype == torch.float32
    with torch.no_grad():
        assert 0 < (model(sample, 5).sample - expected).abs().max() < 0.1


def test_wrong_inputs_are_refused_with_a_remedy():
    model = LatteAdaLNTransformer3DModel(**TINY)
    with pytest.raises(ValueError, match=r"has shape \(1, 3, 4, 4, 6\).*\(batch, 3, 3, 4, 6\)"):
        model(torch.zeros(1, 3, 4, 4, 6), 0)
    with pytest.raises(ValueError, match="an unconditional one takes none"):
        model(latents(), 0, class_labels=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="needs labels"):
        LatteAdaLNTransformer3DModel(**TINY, num_classes=2)(latents(), 0)
    with pytest.raises(ValueError, match=r"shape \(1,\) for 2 samples"):
        LatteAdaLNTransformer3DModel(**TINY, num_classes=2)(latents(), 0, class_labels=torch.tensor([1]))
    for config, message in [
        ({"num_layers": 3}, "must be even"),
        ({"attention_head_dim": 7}, "must divide by 4"),
        ({"sample_size": (4, 5)}, "must divide by patch_size 2"),
        ({"num_layers": [2]}, r"num_layers is \[2\]; it must be a whole number of at least 1"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"sample_size": "4"}, "sample_size is '4'"),
        ({"sample_size": [4, 4, 4]}, "sample_size is"),
        ({"num_classes": True}, "num_classes is True"),
        ({"mlp_ratio": None}, "mlp_ratio is None; it must be a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            LatteAdaLNTransformer3DModel(**{**TINY, **config})
    for size in ("XXL/2", "XL", "XL/two", "XL/0"):
        with pytest.raises(ValueError, match="'XL/2'"):
            latte_size_config(size)


def test_blocks_are_what_devices_split_by():
    assert LatteAdaLNTransformer3DModel._no_split_modules == [LatteBlock.__name__]


def test_a_transformer_without_its_weights_is_not_saved(tmp_path):
    model = randomised()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"weights are no tensors with values .*before it is offloaded"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
