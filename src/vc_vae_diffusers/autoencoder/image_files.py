"""Files of image VAEs: where they are, on this machine or on the hub, and what is in them. Not in the paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..files import read_json
from ..names import hub_problem

HUB_OPTIONS = ("token", "revision", "variant", "cache_dir", "local_files_only", "use_safetensors")
WEIGHTS_NAME = "diffusion_pytorch_model"
_ACCESS = "pass a token that may read it (token=…, --token)"
BFL_FILE = "ae.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# What training leaves beside a VAE's weights, and what wraps their names.
_LEFT_BY_TRAINING = ("loss.", "model_ema.")
_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:module|_orig_mod)\.")


@dataclass
class WeightFile:
    """What a file holds.

    Args:
        state: the VAE's weights, as they are named in it.
        neighbours: names of other weights, which tell what the VAE belongs to.
        architecture: what the file says that it is, if it does.
    """

    state: dict[str, torch.Tensor]
    neighbours: list[str] = field(default_factory=list)
    architecture: str = ""


# Where they are -------------------------------------------------------------------------------------------------------


class Source:
    """A folder or a hub repository, asked for files by name.

    Args:
        source: of the user: a path or a hub id.
        hub_options: `token`, `revision`, `cache_dir`, `local_files_only`.
    """

    def __init__(self, source: str, hub_options: dict):
        self.name, self.hub_options = source, hub_options
        # Names that a cache without a network knows nothing of.
        self.unreachable: list[str] = []
        self.is_folder = Path(source).is_dir()
        if self.is_folder:
            return
        try:
            huggingface_hub.utils.validate_repo_id(source)
        except HFValidationError:
            owner = ""
        else:
            owner = source.rpartition("/")[0]
        if not owner or Path(source).suffix in (".safetensors", *_PICKLED):
            raise OSError(f"{source} is neither a file or folder that exists nor a hub id (owner/name): check the path")

    def fetch(self, name: str) -> Path | None:
        """The local path of a file, None if there is no such file or it cannot be known.

        Raises:
            OSError: if the hub refuses.
        """
        if self.is_folder:
            path = Path(self.name) / name
            return path if path.is_file() else None
        options = dict(self.hub_options)
        if self.unreachable:  # one wait for the network is enough
            options["local_files_only"] = True
        try:
            return Path(huggingface_hub.hf_hub_download(self.name, name, **options))
        except LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, HfHubHTTPError):
                raise OSError(hub_problem(self.name, error, name, _ACCESS)) from error
            self.unreachable.append(name)
            return None
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise OSError(hub_problem(self.name, error, name, _ACCESS)) from error

    def weights(self, folder: str, variant: str | None, suffix: str) -> list[Path]:
        """The files of a VAE's weights in a folder: one, or the shards that an index names. Empty if there are none."""
        dotted = f".{variant}" if variant else ""
        single = self.fetch(_join(folder, f"{WEIGHTS_NAME}{dotted}{suffix}"))
        if single is not None:
            return [single]
        index = self.fetch(_join(folder, f"{WEIGHTS_NAME}{suffix}.index{dotted}.json"))
        if index is None:
            return []
        shards = sorted(set(read_json(index)["weight_map"].values()))
        found = {shard: self.fetch(_join(folder, shard)) for shard in shards}
        if missing := [shard for shard, path in found.items() if path is None]:
            raise OSError(f"{self.name} lacks {', '.join(missing)}, which {index.name} names: fetch it again")
        return [path for path in found.values() if path is not None]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}".lstrip("/")


def locate(source: str, subfolder: str | None, hub_options: dict) -> tuple[Path | None, list[Path]]:
    """Find the configuration (None if there is none) and the weights of an image VAE.

    Raises:
        OSError: if there is nothing to read, saying what was looked for.
    """
    path = Path(source)
    if path.is_file():
        sibling = path.parent / "config.json"
        return (sibling if sibling.exists() and path.name.startswith(WEIGHTS_NAME) else None), [path]
    variant, pickled = hub_options.get("variant"), hub_options.get("use_safetensors") is False
    place = Source(source, {k: v for k, v in hub_options.items() if k not in ("variant", "use_safetensors")})
    suffix = ".bin" if pickled else ".safetensors"
    weights_name = f"{WEIGHTS_NAME}{f'.{variant}' if variant else ''}{suffix}"
    folders = (subfolder,) if subfolder is not None else ("", "vae")
    for folder in folders:
        config_file = place.fetch(_join(folder, "config.json"))
        if config_file is None or "block_out_channels" not in read_json(config_file):
            continue
        if weights_files := place.weights(folder, variant, suffix):
            return config_file, weights_files
        if not place.unreachable:
            message = f"{source} has {folder or '.'}/config.json but no {weights_name}: pass variant=… or another folder"
            if not pickled and place.weights(folder, variant, ".bin"):
                message += ", or, in Python, use_safetensors=False to read its pickled weights"
            raise OSError(message)
    for folder in dict.fromkeys(("", *folders)):
        weights_file = place.fetch(_join(folder, BFL_FILE))
        if weights_file is not None:
            return None, [weights_file]
    if place.unreachable:
        raise OSError(
            f"{source} is not a local path, the hub cannot be reached, and {', '.join(place.unreachable)} are not in its "
            "cache: download the folder elsewhere and pass its path"
        )
    raise OSError(
        f"{source} holds no image VAE: looked for config.json with {weights_name} in {[f or '.' for f in folders]} and for "
        f"{BFL_FILE}; pass subfolder=…, or the file itself"
    )


# What is in them ------------------------------------------------------------------------------------------------------


def load_weights(files: Sequence[Path], pickled: bool = False) -> WeightFile:
    """Read a VAE's weights; of a whole checkpoint only those, which stand under `first_stage_model.` or `vae.`.

    Args:
        files: one file, or its shards.
        pickled: whether pickled files may be read (their tensors alone, `weights_only`).

    Raises:
        ValueError: for files that are damaged, or pickled without having been asked for.
    """
    whole = WeightFile({})
    for path in files:
        read = _read_pickled if path.suffix in _PICKLED else _read_safetensors
        if read is _read_pickled and not pickled:
            raise ValueError(
                f"source is {path}, only safetensors files are read: convert it first, for example with "
                "safetensors.torch.save_file(torch.load(path, weights_only=True), …), or, in Python, use_safetensors=False"
            )
        part = read(path)
        whole.state |= part.state
        whole.neighbours += part.neighbours
        whole.architecture = whole.architecture or part.architecture
    return whole


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt") as file:
            names, neighbours = _own_names(list(file.keys()))
            state = {own: file.get_tensor(name) for own, name in names.items()}
            return WeightFile(state, neighbours, (file.metadata() or {}).get("modelspec.architecture", ""))
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is incomplete or of another format, fetch it again"
        ) from error


def _read_pickled(path: Path) -> WeightFile:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever the bytes make it raise
        raise ValueError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}): it is incomplete, or holds code that is not "
            "run"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    names, neighbours = _own_names([name for name, value in state.items() if isinstance(value, torch.Tensor)])
    return WeightFile({own: state[name] for own, name in names.items()}, neighbours)


def _own_names(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """The VAE's weights by their names without what wraps them, and the names of other weights."""
    plain = {_WRAPPERS.sub("", name): name for name in names}
    prefix = next((p for p in ("first_stage_model.", "vae.") if any(name.startswith(p) for name in plain)), "")
    own = {name.removeprefix(prefix): original for name, original in plain.items() if name.startswith(prefix)}
    own = {name: original for name, original in own.items() if not name.startswith(_LEFT_BY_TRAINING)}
    return own, [name for name in plain if not name.startswith(prefix)]
