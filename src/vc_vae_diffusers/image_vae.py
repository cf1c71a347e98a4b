"""Image VAE weights: reading them from any layout, and inflating them to a video VAE (Sec. 3.2, Eq. 3 and 4).

`read_image_vae` understands diffusers' and BFL's (latent-diffusion) layouts, in a file, a folder or a hub repository.
`inflate` copies the weights by name; the temporal layers that an image VAE does not have keep the initialisation that makes
a fresh video VAE select and broadcast keyframes.
"""

import inspect
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from .tdc import TemporalConv3d

HUB_OPTIONS = ("token", "revision", "variant", "cache_dir", "local_files_only")
WEIGHTS_NAME = "diffusion_pytorch_model"
BFL_FILE = "ae.safetensors"

# scaling_factor and shift_factor by latent channels, for files that come without a configuration.
_FACTORS = {16: (0.3611, 0.1159, "FLUX.1"), 4: (0.18215, None, "Stable Diffusion 1.x")}

# What both configurations have in common.
_SHARED_CONFIG = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "norm_num_groups",
    "mid_block_add_attention",
    "use_quant_conv",
    "use_post_quant_conv",
    "scaling_factor",
    "shift_factor",
)


@dataclass
class ImageVAE:
    """An image VAE as read: its `AutoencoderKL` configuration and its weights in diffusers' layout.

    Args:
        config: keyword arguments of `AutoencoderKL`.
        state: weights by diffusers' names.
        source: where they came from.
        assumptions: what the source did not say and was assumed, one sentence each.
    """

    config: dict
    state: dict[str, torch.Tensor]
    source: str
    assumptions: list[str] = field(default_factory=list)

    def video_config(self) -> dict:
        """The part of the configuration that a video VAE shares; what it does not name has `AutoencoderKL`'s defaults."""
        defaults = {name: p.default for name, p in inspect.signature(AutoencoderKL.__init__).parameters.items()}
        return {name: self.config.get(name, defaults[name]) for name in _SHARED_CONFIG}

    def build(self) -> AutoencoderKL:
        """The image VAE itself, in eval mode."""
        vae = AutoencoderKL.from_config(self.config)
        vae.load_state_dict(self.state)
        return vae.eval()


@dataclass
class InflationReport:
    """What `inflate` did, as parameter names.

    Args:
        copied: taken over as they are (norms, attention, spatial resampling, biases).
        inflated: 2-D kernels put into the anchor slice of a temporal operator.
        widened: of these two, those whose latent channels were extended.
        created: parameters an image VAE does not have, initialised by Eq. 3 and 4.
    """

    copied: list[str]
    inflated: list[str]
    widened: list[str]
    created: list[str]


# Reading ---------------------------------------------------------------------------------------------------------------


def read_image_vae(source: str | Path, subfolder: str | None = None, **hub_options) -> ImageVAE:
    """Read an image VAE.

    Args:
        source: a safetensors file, a folder, or a hub id. In a folder or repository the VAE is looked for in `subfolder`
            (or, when that is None, at the root and in `vae/`), then as BFL's `ae.safetensors`.
        subfolder: of the folder or repository.
        hub_options: `token`, `revision`, `variant`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: if keys are missing or left over, naming them, or the file is not safetensors.
        OSError: if there is nothing to read; for a gated repository it says how to get access.
    """
    config_file, weights_file = _locate(str(source), subfolder, hub_options)
    if weights_file.suffix != ".safetensors":
        raise ValueError(
            f"source is {weights_file}, only safetensors files are read: convert it first, for example with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), …)"
        )
    state = _to_diffusers_layout(_load_vae(weights_file), str(weights_file))
    assumptions: list[str] = []
    config = _guess_config(state, str(weights_file), assumptions) if config_file is None else _read_config(config_file)
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        assumptions.append("its latents_mean and latents_std are left out, they mean something else for video: pass them")
    _check_keys(state, config, str(weights_file))
    return ImageVAE(config, state, str(source), assumptions)


def _locate(source: str, subfolder: str | None, hub_options: dict) -> tuple[Path | None, Path]:
    """Find the configuration (None if there is none) and the weights."""
    path = Path(source)
    if path.is_file():
        sibling = path.parent / "config.json"
        return (sibling if sibling.exists() and path.name.startswith(WEIGHTS_NAME) else None), path
    variant = hub_options.get("variant")
    weights_name = f"{WEIGHTS_NAME}.{variant}.safetensors" if variant else f"{WEIGHTS_NAME}.safetensors"
    folders = (subfolder,) if subfolder is not None else ("", "vae")
    unreachable: list[str] = []
    for folder in folders:
        config_file = _fetch(source, f"{folder}/config.json".lstrip("/"), hub_options, unreachable)
        if config_file is not None and "block_out_channels" in json.loads(config_file.read_text()):
            weights_file = _fetch(source, f"{folder}/{weights_name}".lstrip("/"), hub_options, unreachable)
            if weights_file is None and not unreachable:
                raise OSError(
                    f"{source} has {folder or '.'}/config.json but no {weights_name}: pass variant=… or another folder"
                )
            if weights_file is not None:
                return config_file, weights_file
    for folder in dict.fromkeys(("", *folders)):
        weights_file = _fetch(source, f"{folder}/{BFL_FILE}".lstrip("/"), hub_options, unreachable)
        if weights_file is not None:
            return None, weights_file
    if unreachable:
        raise OSError(
            f"{source} is not a local path, the hub cannot be reached, and {', '.join(unreachable)} are not in its cache: "
            "download the folder elsewhere and pass its path"
        )
    raise OSError(
        f"{source} holds no image VAE: looked for config.json with {weights_name} in {[f or '.' for f in folders]} and for "
        f"{BFL_FILE}; pass subfolder=…, or the file itself"
    )


def _fetch(source: str, name: str, hub_options: dict, unreachable: list[str]) -> Path | None:
    """The local path of a file of a folder or a hub repository, None if it has no such file.

    Without a network the cache cannot tell what a repository does not have: such names go to `unreachable`.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise OSError(f"{source} is neither a file or folder that exists nor a hub id: check the path")
    options = {k: v for k, v in hub_options.items() if k != "variant"}
    if unreachable:  # one wait for the network is enough
        options["local_files_only"] = True
    try:
        return Path(huggingface_hub.hf_hub_download(source, name, **options))
    except GatedRepoError as error:
        raise OSError(
            f"{source} is gated: accept its licence on its hub page with your account, then log in with `hf auth login` or "
            "pass a token of that account (token=…, --token)"
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{source} is not a local path, and not a hub repository that you can see: check the spelling, or pass a token "
            "(token=…, --token) if it is private"
        ) from error
    except LocalEntryNotFoundError:
        unreachable.append(name)
        return None
    except EntryNotFoundError:
        return None


def _read_config(config_file: Path) -> dict:
    """The configuration of an `AutoencoderKL`, without diffusers' own notes in it."""
    config = json.loads(config_file.read_text())
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(
            f"{config_file} is of a {config['_class_name']}, only an AutoencoderKL can be inflated: pass the "
            "folder or subfolder of one"
        )
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _load_vae(weights_file: Path) -> dict[str, torch.Tensor]:
    """Load a file; of a whole checkpoint only the VAE, which stands under `first_stage_model.` or `vae.`."""
    try:
        with safe_open(weights_file, framework="pt") as file:
            keys = list(file.keys())
            prefixes = [p for p in ("first_stage_model.", "vae.") if any(k.startswith(p) for k in keys)]
            prefix = prefixes[0] if prefixes else ""
            return {k.removeprefix(prefix): file.get_tensor(k) for k in keys if k.startswith(prefix)}
    except SafetensorError as error:
        raise ValueError(
            f"{weights_file} cannot be read as safetensors ({error}): it is incomplete or of another format, fetch it again"
        ) from error


_BFL_RULES = (
    (r"(encoder)\.down\.(\d+)\.block\.(\d+)\.", r"\1.down_blocks.\2.resnets.\3."),
    (r"(encoder)\.down\.(\d+)\.downsample\.", r"\1.down_blocks.\2.downsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", r".conv_norm_out."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
)
# Names of the attention in diffusers before 0.18, still found in files.
_OLD_ATTENTION_RULES = (
    (r"\.attentions\.0\.query\.", r".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", r".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", r".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", r".attentions.0.to_out.0."),
)


def _to_diffusers_layout(state: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Rename BFL's keys; 1x1 convolutions of the attention become linear. Diffusers' own layout passes through."""
    if any(k.startswith("encoder.down_blocks.0.") for k in state):
        rules = _OLD_ATTENTION_RULES
    elif any(k.startswith("encoder.down.0.") for k in state):
        stages = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
        up = tuple(
            (rf"decoder\.up\.{stages - 1 - i}\.{old}", rf"decoder.up_blocks.{i}.{new}")
            for i in range(stages)
            for old, new in ((r"block\.(\d+)\.", r"resnets.\1."), (r"upsample\.", "upsamplers.0."))
        )
        rules = (*_BFL_RULES, *up)
    else:
        some = sorted(state)[:5]
        raise ValueError(f"{source} is not an image VAE in diffusers' or BFL's layout: its keys start with {some}")
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if re.search(r"attentions\.0\.to_(q|k|v|out\.0)\.weight$", key) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        renamed[key] = tensor
    return renamed


def _guess_config(state: dict[str, torch.Tensor], source: str, assumptions: list[str]) -> dict:
    """Read the architecture off the shapes; say what they cannot tell."""
    stages = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down_blocks."))
    first_convs = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(stages)]
    telling = ["encoder.conv_in.weight", *first_convs, "decoder.conv_in.weight", "decoder.conv_out.weight"]
    missing = [name for name in telling if name not in state]
    if missing:
        raise ValueError(f"{source} does not hold a whole image VAE; missing keys: {', '.join(missing)}")
    channels = [state[name].shape[0] for name in first_convs]
    layers = 1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.down_blocks.0.resnets."))
    latent_channels = state["decoder.conv_in.weight"].shape[1]
    if latent_channels not in _FACTORS:
        raise ValueError(
            f"{source} has {latent_channels} latent channels and comes without a configuration, so that its scaling factor "
            "is unknown: pass the folder of a diffusers VAE"
        )
    scaling_factor, shift_factor, family = _FACTORS[latent_channels]
    assumptions.append(
        f"no configuration came with the file: scaling_factor {scaling_factor} and shift_factor {shift_factor} of {family} "
        "and 32 norm groups were assumed (others share the shapes: pass scaling_factor and shift_factor for them)"
    )
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": latent_channels,
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
    }


def _check_keys(state: dict[str, torch.Tensor], config: dict, source: str) -> None:
    with torch.device("meta"):
        expected = {k: v.shape for k, v in AutoencoderKL.from_config(config).state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    wrong = sorted(k for k in set(expected) & set(state) if expected[k] != state[k].shape)
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not hold the AutoencoderKL of its configuration; {'; '.join(problems)}")


# Inflating -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def inflate(video_vae: nn.Module, image_vae: ImageVAE) -> InflationReport:
    """Give a freshly built video VAE the weights of an image VAE, by name (Sec. 3.2).

    A 2-D kernel goes into the anchor slice of its temporal operator, all other slices are zero: center initialisation for
    group causal layers, tail for causal ones. With more latent channels than the image VAE has, the first ones are the image
    VAE's and the rest zero: means, log-variances and the decoder's input (Sec. 4.1). Not in the paper: quant convolutions
    are widened by the identity, since zeros on both sides would never learn.

    Args:
        video_vae: with the module names of `AutoencoderKL`; changed in place.
        image_vae: from `read_image_vae`.

    Raises:
        ValueError: if a weight of the image VAE has no place, or does not fit.
    """
    state = dict(image_vae.state)
    operators = {f"{name}.weight": m for name, m in video_vae.named_modules() if isinstance(m, TemporalConv3d)}
    report = InflationReport([], [], [], [])
    for name, parameter in video_vae.named_parameters():
        if name not in state:
            report.created.append(name)
            continue
        value = state.pop(name).to(parameter)
        operator = operators.get(name)
        shape = parameter.shape if operator is None else parameter[:, :, 0].shape
        if value.shape != shape:
            value = _widen(name, value, shape)
            report.widened.append(name)
        if operator is None:
            parameter.copy_(value)
            report.copied.append(name)
        else:
            parameter.zero_()
            parameter[:, :, operator.anchor] = value
            report.inflated.append(name)
    if state:
        raise ValueError(
            f"the video VAE has no place for {sorted(state)} of {image_vae.source}: build it with the same layers"
        )
    return report


def _widen(name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Extend the latent channels of one tensor; moments are extended in both halves."""
    module, kind = name.rsplit(".", 1)
    moments = module in ("encoder.conv_out", "quant_conv")
    if module not in ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in") or any(
        new < old for new, old in zip(shape, value.shape, strict=True)
    ):
        raise ValueError(f"{name} has shape {tuple(value.shape)} in the image VAE and {tuple(shape)} in the video VAE")
    rows = _latent_index(value.shape[0], shape[0], moments)
    if kind == "bias":
        widened = value.new_zeros(shape)
        widened[rows] = value
        return widened
    columns = _latent_index(value.shape[1], shape[1], moments)
    if module in ("quant_conv", "post_quant_conv"):
        widened = torch.eye(shape[0], dtype=value.dtype, device=value.device)[:, :, None, None]
    else:
        widened = value.new_zeros(shape)
    widened[rows[:, None], columns] = value
    return widened


def _latent_index(old: int, new: int, moments: bool) -> torch.Tensor:
    """Where `old` channels go among `new`: in front, or in front of each half for means and log-variances."""
    if old == new or not moments:
        return torch.arange(old)
    return torch.cat([torch.arange(old // 2), new // 2 + torch.arange(old // 2)])
