"""The denoiser of the paper's generation experiment: Latte with adaLN-zero blocks (Sec. A.5, Fig. 7).

`LatteTransformer3DModel` of diffusers is the text-to-video Latte: one adaLN for all blocks, cross attention to
captions. The model that the paper trains on SkyTimelapse is the unconditional Latte-XL/2, whose blocks each own their
modulation. State-dict keys are those of the original release, so that such checkpoints load strictly.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import load_file
from torch import nn

from ..publishing.auto_map import PublishedModelMixin

# Latte's published sizes: number of blocks (half of them spatial, half temporal), width, attention heads.
LATTE_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

FREQUENCY_EMBEDDING_SIZE = 256
_COUNTS = ("patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "video_length")


def latte_size_config(size: str) -> dict[str, int]:
    """Configuration of a published size, written `name/patch` as in "XL/2".

    Raises:
        ValueError: when the name is none of S, B, L, XL, or the patch size is no positive integer.
    """
    name, separator, patch = size.partition("/")
    if name not in LATTE_SIZES or not separator or not patch.isdigit() or int(patch) < 1:
        raise ValueError(f"size is {size!r}; it must be one of {sorted(LATTE_SIZES)}, a slash and a patch size: 'XL/2'.")
    num_layers, width, num_heads = LATTE_SIZES[name]
    return {
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "patch_size": int(patch),
    }


def sincos_positions(dim: int, positions: torch.Tensor) -> torch.Tensor:
    """Fixed sine-cosine embedding of integer positions (N,), shape (N, dim): sines first, then cosines."""
    return get_1d_sincos_pos_embed_from_grid(dim, positions, output_type="pt")


def spatial_positions(dim: int, height: int, width: int) -> torch.Tensor:
    """Fixed sine-cosine positions of a token grid, (height * width, dim): the first half of dim encodes the column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sincos_positions(dim // 2, axis.reshape(-1)) for axis in (columns, rows)], dim=1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift normalised tokens x (B, G, N, D) by one vector (B, D) per sample."""
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


class PatchEmbedding(nn.Module):
    """Non-overlapping patches of each latent frame to tokens."""

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, C, H, W) -> (N, H*W/p^2, D)


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of the diffusion timestep, then a two-layer MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_EMBEDDING_SIZE, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        frequencies = get_timestep_embedding(
            timestep, FREQUENCY_EMBEDDING_SIZE, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.mlp(frequencies.to(dtype))


class LabelEmbedding(nn.Module):
    """Class labels to vectors; with dropout_prob > 0 the extra row `num_classes` is "no class", for guidance."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class LatteAttention(nn.Module):
    """Multi-head self-attention over the tokens of each group."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, groups, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch * groups, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # three of (B*G, heads, N, D/heads)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(batch, groups, tokens, dim))


class LatteMlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class LatteBlock(nn.Module):
    """Transformer block with adaLN-zero: attends over N in x (B, G, N, D), given one vector (B, D) per sample.

    Spatial and temporal blocks are the same module: groups are frames for the one, token places for the other.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = LatteAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = LatteMlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn[:, None, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class LatteFinalLayer(nn.Module):
    """Modulated norm and projection of each token to the values of its patch."""

    def __init__(self, dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class LatteAdaLNTransformer3DModel(PublishedModelMixin, ModelMixin, ConfigMixin):
    """Unconditional or class-conditional Latte for video latents (Sec. A.5: Latte-XL on SkyTimelapse; Ma et al. 2024).

    Spatial and temporal blocks alternate; each block owns its adaLN-zero modulation. The defaults are Latte-XL/2 for
    256x256 clips of 16 frames in 4x8x8 VC-VAE latents: 16 channels, 4 latent frames, 32x32.

    Args:
        sample_size: height and width of the latents, one integer or two.
        patch_size: side of the square patches; it divides both sizes.
        in_channels: latent channels.
        out_channels: None for 2 * in_channels: the noise and the variance interpolation of learned-range diffusion.
        num_layers: number of blocks, even; half are spatial, half temporal.
        num_attention_heads, attention_head_dim: their product is the width.
        mlp_ratio: hidden width of the MLP over the width.
        video_length: number of latent frames (pixel frames divided by the VAE's temporal compression).
        num_classes: None for an unconditional model.
        class_dropout_prob: share of labels replaced by "no class" in training; 0 leaves that class out.

    Raises:
        ValueError: for an odd number of blocks, a width that positions cannot fill, sizes that patches do not divide.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LatteBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["LatteBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "temp_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        video_length: int = 4,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
    ):
        super().__init__()
        check_numbers(self.config)
        dim = num_attention_heads * attention_head_dim
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        check_geometry(dim, num_layers, height, width, patch_size)
        self.out_channels = 2 * in_channels if out_channels is None else out_channels

        self.x_embedder = PatchEmbedding(in_channels, dim, patch_size)
        self.t_embedder = TimestepEmbedding(dim)
        if num_classes is not None:
            self.y_embedder = LabelEmbedding(num_classes, dim, class_dropout_prob)
        tokens = (height // patch_size) * (width // patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim), requires_grad=False)
        self.temp_embed = nn.Parameter(torch.zeros(1, video_length, dim), requires_grad=False)
        self.blocks = nn.ModuleList(LatteBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_layers))
        self.final_layer = LatteFinalLayer(dim, patch_size, self.out_channels)
        self.gradient_checkpointing = False
        self.initialize_weights(height // patch_size, width // patch_size)

    @classmethod
    def from_size(cls, size: str = "XL/2", **config: Any) -> "LatteAdaLNTransformer3DModel":
        """A randomly initialised model of a published size ("S/2" ... "XL/8"); `config` sets or overrides the rest."""
        return cls(**{**latte_size_config(size), **config})

    @classmethod
    def from_latte_checkpoint(
        cls, path: str | Path, num_attention_heads: int | None = None, class_dropout_prob: float = 0.1
    ) -> "LatteAdaLNTransformer3DModel":
        """Load a checkpoint of the original Latte release strictly; the geometry is read from its tensors.

        Args:
            path: `.safetensors`, or a `.pt` file holding a state dict: under "ema", else under "model", else bare.
            num_attention_heads: needed where the width is that of no published size.
            class_dropout_prob: the value it was trained with, which no tensor tells; above 0 the label table ends
                with "no class".

        Raises:
            ValueError: when the checkpoint is not of the unconditional or class-conditional Latte.
        """
        state_dict = read_checkpoint(path)
        model = cls(**config_of_checkpoint(state_dict, num_attention_heads, class_dropout_prob))
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
        if missing or unexpected:
            raise ValueError(
                f"{path} is not a checkpoint of the unconditional or class-conditional Latte: missing keys {missing},"
                f" unexpected keys {unexpected}."
            )
        return model.eval()

    def initialize_weights(self, rows: int, columns: int) -> None:
        """Latte's initialisation: Xavier for linear layers, zero for modulations and the output, fixed positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))  # as the linear layer that it is
        blocks: Any = self.blocks
        layer: Any
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if self.config.num_classes is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (*(block.adaLN_modulation[1] for block in blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        dim = self.pos_embed.shape[-1]
        with torch.no_grad():
            self.pos_embed.copy_(spatial_positions(dim, rows, columns))
            self.temp_embed.copy_(sincos_positions(dim, torch.arange(self.temp_embed.shape[1])))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise and variance interpolation, (B, out_channels, T, H, W).

        Args:
            hidden_states: noisy latents (B, in_channels, video_length, H, W).
            timestep: (B,) or one value for the batch, in [0, 1000).
            class_labels: (B,) integers for a class-conditional model; `num_classes` means "no class".
            return_dict: False returns a tuple of one tensor.

        Raises:
            ValueError: for latents of another geometry, or labels that the model needs or does not know.
        """
        self.check_inputs(hidden_states, class_labels)
        batch, channels, frames, height, width = hidden_states.shape
        patches = hidden_states.transpose(1, 2).reshape(batch * frames, channels, height, width)
        x = self.x_embedder(patches) + self.pos_embed.to(hidden_states.dtype)
        x = x.unflatten(0, (batch, frames))  # (B, T, S, D)

        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)
        condition = self.t_embedder(timestep, hidden_states.dtype)
        if class_labels is not None:
            condition = condition + self.y_embedder(class_labels)

        for index in range(0, len(self.blocks), 2):
            x = self.run_block(self.blocks[index], x, condition)
            x = x.transpose(1, 2)  # (B, S, T, D): the temporal block attends over T
            if index == 0:
                x = x + self.temp_embed.to(x.dtype)
            x = self.run_block(self.blocks[index + 1], x, condition)
            x = x.transpose(1, 2)

        sample = self.unpatchify(self.final_layer(x, condition), height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def run_block(self, block: nn.Module, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Call a block, recomputing it in the backward pass when gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, x, condition)
        return block(x, condition)

    def unpatchify(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens (B, T, S, p*p*C) to latents (B, C, T, height, width); within a token the channel varies fastest."""
        patch = self.config.patch_size
        batch, frames = x.shape[:2]
        x = x.reshape(batch, frames, height // patch, width // patch, patch, patch, self.out_channels)
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C, T, H/p, p, W/p, p)
        return x.reshape(batch, self.out_channels, frames, height, width)

    def check_inputs(self, hidden_states: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        """Refuse latents of another geometry than the configuration's, and labels that do not fit the model."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        expected = (self.config.in_channels, self.config.video_length, height, width)
        if hidden_states.ndim != 5 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; this model takes (batch, channels, latent"
                f" frames, height, width) = (batch, {', '.join(map(str, expected))}). Build the model with"
                " in_channels, video_length and sample_size of the latents (its positions are fixed)."
            )
        if (class_labels is None) != (self.config.num_classes is None):
            raise ValueError(
                f"class_labels is {class_labels!r} and num_classes is {self.config.num_classes}: a class-conditional"
                " model needs labels (num_classes means 'no class'), an unconditional one takes none."
            )
        if class_labels is not None and class_labels.shape != hidden_states.shape[:1]:
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)} for {hidden_states.shape[0]} samples; pass one"
                " integer for each."
            )


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse what is no number.

    Raises:
        ValueError: naming the argument and the rule.
    """
    size = config["sample_size"]
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size,)
    counts = [(name, config[name]) for name in _COUNTS] + [("sample_size", side) for side in sides]
    counts += [(name, config[name]) for name in ("out_channels", "num_classes") if config[name] is not None]
    for name, count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} is {config[name]!r}; it must be a whole number of at least 1.")
    for name in ("mlp_ratio", "class_dropout_prob"):
        if isinstance(config[name], bool) or not isinstance(config[name], int | float):
            raise ValueError(f"{name} is {config[name]!r}; it must be a number.")


def check_geometry(dim: int, num_layers: int, height: int, width: int, patch_size: int) -> None:
    """Refuse a configuration whose blocks do not pair, whose positions do not fit or whose patches do not tile.

    Raises:
        ValueError: naming the argument and the rule.
    """
    if num_layers % 2 or num_layers < 2:
        raise ValueError(f"num_layers is {num_layers}; it must be even and positive: blocks come in pairs.")
    if dim % 4:
        raise ValueError(
            f"num_attention_heads * attention_head_dim is {dim}; it must divide by 4 (sine and cosine of two axes)."
        )
    if height % patch_size or width % patch_size:
        raise ValueError(f"sample_size is {height}x{width}; both must divide by patch_size {patch_size}.")


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """State dict of a `.safetensors` or `.pt` file; of several in one file the EMA weights win."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("ema", "model"):
        if name in checkpoint:
            return checkpoint[name]
    return checkpoint


def config_of_checkpoint(
    state_dict: dict[str, torch.Tensor], num_attention_heads: int | None, class_dropout_prob: float
) -> dict[str, Any]:
    """Configuration that a Latte state dict was trained with, read from the shapes of its tensors.

    Raises:
        ValueError: when a tensor is missing, the token grid is no square, or the number of heads cannot be known.
    """
    try:
        dim, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
        tokens, video_length = state_dict["pos_embed"].shape[1], state_dict["temp_embed"].shape[1]
        out_values = state_dict["final_layer.linear.weight"].shape[0]
        hidden_dim = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the checkpoint has no tensor {error}; it is not one of Latte's.") from error
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"the checkpoint has {tokens} positions; Latte's are square grids.")
    heads_of_width = {width: heads for _, width, heads in LATTE_SIZES.values()}
    heads = num_attention_heads or heads_of_width.get(dim)
    if heads is None:
        raise ValueError(f"width {dim} is that of no published size {LATTE_SIZES}: pass num_attention_heads.")
    config = {
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": out_values // patch_size**2,
        "num_layers": len({key.split(".")[1] for key in state_dict if key.startswith("blocks.")}),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_ratio": hidden_dim / dim,
        "video_length": video_length,
    }
    if "y_embedder.embedding_table.weight" in state_dict:
        rows = state_dict["y_embedder.embedding_table.weight"].shape[0]
        config |= {"num_classes": rows - int(class_dropout_prob > 0), "class_dropout_prob": class_dropout_prob}
    return config
