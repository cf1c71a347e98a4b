"""Image VAEs for tests: published configurations, and the latent-diffusion layout of their keys, written out."""

import torch
from diffusers import AutoencoderKL

FOUR_STAGES = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "block_out_channels": [128, 256, 512, 512],
}
# As published. Stable Diffusion 1 and XL do not name the keys that came later, whose defaults count: quant convs, no shift.
FLUX = {
    **FOUR_STAGES,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "mid_block_add_attention": True,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3 = {**FLUX, "scaling_factor": 1.5305, "shift_factor": 0.0609}
SDXL = {**FOUR_STAGES, "latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024}
SMALL = {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}


def random_image_vae(config: dict, seed: int = 0) -> AutoencoderKL:
    """An `AutoencoderKL` with random weights; norms differ from each other too, so that a swap of keys shows."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vae


def bfl_keys(layers: int = 2, channels: tuple[int, ...] = (128, 256, 512, 512)) -> dict[str, str]:
    """Every key of the latent-diffusion layout, and the key of the same weight in diffusers' layout."""
    keys: dict[str, str] = {}

    def add(bfl: str, diffusers: str) -> None:
        keys.update({f"{bfl}.{kind}": f"{diffusers}.{kind}" for kind in ("weight", "bias")})

    def add_block(bfl: str, diffusers: str, shortcut: bool) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            add(f"{bfl}.{name}", f"{diffusers}.{name}")
        if shortcut:
            add(f"{bfl}.nin_shortcut", f"{diffusers}.conv_shortcut")

    stages = len(channels)
    for i in range(stages):
        for j in range(layers):
            changes = j == 0 and i > 0 and channels[i] != channels[i - 1]
            add_block(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}", changes)
        if i < stages - 1:
            add(f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv")
        for j in range(layers + 1):  # up.3 is the first stage of the decoder
            changes = j == 0 and i < stages - 1 and channels[i] != channels[i + 1]
            add_block(f"decoder.up.{i}.block.{j}", f"decoder.up_blocks.{stages - 1 - i}.resnets.{j}", changes)
        if i > 0:
            add(f"decoder.up.{i}.upsample.conv", f"decoder.up_blocks.{stages - 1 - i}.upsamplers.0.conv")
    for side in ("encoder", "decoder"):
        add(f"{side}.conv_in", f"{side}.conv_in")
        add(f"{side}.conv_out", f"{side}.conv_out")
        add(f"{side}.norm_out", f"{side}.conv_norm_out")
        add_block(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", False)
        add_block(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", False)
        attention = f"{side}.mid_block.attentions.0"
        for bfl, diffusers in (
            ("norm", "group_norm"),
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("proj_out", "to_out.0"),
        ):
            add(f"{side}.mid.attn_1.{bfl}", f"{attention}.{diffusers}")
    return keys


def to_bfl(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The weights in the latent-diffusion layout, where the attention is made of 1x1 convolutions."""
    state = vae.state_dict()
    keys = bfl_keys(vae.config.layers_per_block, tuple(vae.config.block_out_channels))
    converted = {}
    for bfl, diffusers in keys.items():
        tensor = state.pop(diffusers)
        linear = ".attn_1." in bfl and tensor.ndim == 2
        converted[bfl] = tensor[:, :, None, None].contiguous() if linear else tensor.contiguous()
    return {**converted, **state}  # quant convs, if any, have the same names
