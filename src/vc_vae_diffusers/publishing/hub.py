"""Publishing: model cards that say what was measured, and stubs that load without a prior import.

diffusers 0.42 imports no module because a repository names it. A folder that `add_remote_code` prepared carries Python
files which do the import, from the installed package or from the modules in them; with `trust_remote_code=True` they load
`DiffusionPipeline` and `AutoModel` alike, and a pipeline on the hub that has a class of ours cannot be loaded without them.
diffusers' own `push_to_hub` uploads a blank template as the card; the one here uploads ours.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors import safe_open

from ..files import scratch_folder, write_json, write_whole
from .picture import PICTURE, draw_reconstruction
from .remote_code import NEEDS, remote_code

# Names that published folders contain: they are for ever. The models' stub is named as the package, where diffusers looks
# for the class of a component that the caller passes instead.
MODEL_STUB, PIPELINE_STUB = "vc_vae_diffusers", "pipeline_latte_vcvae"
MODEL_NAMES = ("AutoencoderKLVCVAE", "LatteAdaLNTransformer3DModel")
PIPELINE_NAMES = ("LatteVCVAEPipeline", "LatteVCVAEUnconditionalPipeline")


@dataclass(frozen=True)
class MeasuredMetric:
    """One row of a card's results.

    Args:
        name: such as "PSNR".
        value: the number, and its unit if it has one.
        data: what it was measured on.
        protocol: the command or the settings that reproduce it.
        date: of the measurement, ISO.
    """

    name: str
    value: float
    data: str
    protocol: str
    date: str
    unit: str = ""


@dataclass(frozen=True)
class CardContent:
    """What only the author knows about published weights; the rest of the card is read from the folder.

    Args:
        name: title of the card.
        summary: what it is and what it is for, a paragraph.
        licence: an SPDX identifier in lower case, as the hub lists them ("apache-2.0", "other").
        training_data: what it was trained on and under which terms.
        training: how it was trained, or that it was not.
        limitations: what it cannot do.
        metrics: measured results; empty makes the card say that nothing was measured.
        comparison: Markdown below them, such as a table of other models under the same protocol.
        base_model: hub id of the weights it came from.
        datasets: hub ids of its data.
        tags: besides "video" and "vc-vae".
    """

    name: str
    summary: str
    licence: str
    training_data: str
    training: str
    limitations: str
    metrics: Sequence[MeasuredMetric] = ()
    comparison: str = ""
    base_model: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = field(default=())

    def __post_init__(self):
        for name in ("name", "summary", "licence", "training_data", "training", "limitations"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} of a model card is empty; write what a stranger must know, or that it is unknown.")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def add_model_code(folder: Path, carry: bool) -> None:
    """Make a saved model loadable by `AutoModel`: the stub, and `auto_map` in its configuration."""
    config = read_json(folder / "config.json")
    # The same text in every folder: diffusers copies stubs of all components to one place.
    write_whole(folder / f"{MODEL_STUB}.py", remote_code(("AutoVCVAEModel", *MODEL_NAMES), carry))
    write_json(
        folder / "config.json",
        {**config, "auto_map": {"AutoModel": f"{MODEL_STUB}.{config['_class_name']}"}},
        sort_keys=True,
    )


def is_our_model(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("_class_name") in MODEL_NAMES


def add_pipeline_code(folder: Path, carry: bool) -> None:
    """Make a saved pipeline loadable: stubs for its class and its components where they are ours, named by its index."""
    index = read_json(folder / "model_index.json")
    name = index["_class_name"][-1] if isinstance(index["_class_name"], list) else index["_class_name"]
    if name in PIPELINE_NAMES:
        write_whole(folder / f"{PIPELINE_STUB}.py", remote_code(PIPELINE_NAMES, carry))
        index["_class_name"] = [PIPELINE_STUB, name]
    components = [key for key, value in index.items() if isinstance(value, list) and (folder / key).is_dir()]
    ours = [key for key in components if is_our_model(folder / key)]
    for component in ours:
        add_model_code(folder / component, carry)
        index[component] = [MODEL_STUB, index[component][1]]
    # AutoModel(subfolder=...) reads the index; where foreign models are beside ours, an entry would claim them too.
    if name in PIPELINE_NAMES and ours == [key for key in components if list((folder / key).glob("*.safetensors"))]:
        index["auto_map"] = {"AutoModel": f"{MODEL_STUB}.AutoVCVAEModel"}
    write_json(folder / "model_index.json", index, sort_keys=True)


def add_remote_code(folder: str | os.PathLike, carry: bool = True) -> None:
    """Write the stubs that load a saved model or pipeline with `trust_remote_code=True` and no prior import.

    Works for pipelines of diffusers with a VC-VAE too, and may be repeated. From then on a pipeline loads only with
    `trust_remote_code=True`, whatever was imported.

    Args:
        folder: that `save_pretrained` wrote.
        carry: put the modules into the stubs that loading and inference take (`remote_code.py`), so that nobody has to
            install this package.

    Raises:
        ValueError: when the folder holds no model or pipeline with a class of this package.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        add_pipeline_code(folder, carry)
        if list(folder.rglob(f"{MODEL_STUB}.py")):
            return
    elif is_our_model(folder):
        add_model_code(folder, carry)
        return
    raise ValueError(
        f"{folder} holds no model of vc_vae_diffusers ({', '.join(MODEL_NAMES)}) and no pipeline with one; pass a folder"
        " that save_pretrained wrote."
    )


def weights_summary(folder: Path) -> tuple[int, str]:
    """Number of parameters and their types in the safetensors files right in a folder; variants are counted once."""
    counts, types = {}, set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                entry = file.get_slice(key)
                size = 1
                for length in entry.get_shape():
                    size *= length
                counts[key] = size
                types.add(entry.get_dtype())
    return sum(counts.values()), ", ".join(sorted(types))


INSTALL = "Install `vc_vae_diffusers` (`pip install .` in a clone of its repository), then"
CARRIED = (
    f"Needs {', '.join(NEEDS)}. The package `vc_vae_diffusers` is used if it is installed, and need not be: the Python "
    "files here carry what loading and inference take of it, which `trust_remote_code=True` allows to run."
)

CONFIG_ROWS = {
    "AutoencoderKLVCVAE": (
        "temporal_compression_ratio",
        "spatial_compression_ratio",
        "latent_channels",
        "block_out_channels",
        "temporal_operator",
        "temporal_causality",
        "first_frame",
        "frame_convention",
        "scaling_factor",
        "shift_factor",
    ),
    "LatteAdaLNTransformer3DModel": (
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "patch_size",
        "in_channels",
        "video_length",
        "sample_size",
        "num_classes",
    ),
}

_TRY_VAE = """
video = torch.rand(1, 3, 9, 64, 64) * 2 - 1  # (batch, RGB, frames, height, width) in [-1, 1]
with torch.no_grad():
    latents = vae.encode(video).latent_dist.mode()
    frames = vae.decode(latents, num_frames=video.shape[2]).sample
```"""

VAE_USAGE = (
    """```python
import torch
from diffusers import AutoModel  # or, without trust_remote_code: from vc_vae_diffusers import AutoencoderKLVCVAE

vae = AutoModel.from_pretrained("{where}", trust_remote_code=True)"""
    + _TRY_VAE
)

# The model that is part of the package.
BUNDLED_USAGE = (
    """```python
import torch
from vc_vae_diffusers import AutoencoderKLVCVAE, bundled_model_path

vae = AutoencoderKLVCVAE.from_pretrained(bundled_model_path())"""
    + _TRY_VAE
)

DENOISER_USAGE = """```python
from diffusers import AutoModel  # or, without trust_remote_code: from vc_vae_diffusers import LatteAdaLNTransformer3DModel

transformer = AutoModel.from_pretrained("{where}", trust_remote_code=True)
```

It denoises the latents of the VC-VAE it was trained with, in `LatteVCVAEUnconditionalPipeline`."""

PIPELINE_USAGE = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{where}", trust_remote_code=True)
```

Arguments and results are those of `{pipeline}`."""


def usage(folder: Path, where: str) -> str:
    """The code that loads this folder."""
    if (folder / "model_index.json").is_file():
        name = read_json(folder / "model_index.json")["_class_name"]
        return PIPELINE_USAGE.format(where=where, pipeline=name[-1] if isinstance(name, list) else name)
    name = read_json(folder / "config.json")["_class_name"]
    return (VAE_USAGE if name == "AutoencoderKLVCVAE" else DENOISER_USAGE).format(where=where)


def contents_table(folder: Path) -> str:
    """Class, size and main settings of every model in a saved folder, as a Markdown table."""
    rows = ["| model | parameters | types | settings |", "| --- | ---: | --- | --- |"]
    for path in sorted({folder, *(entry for entry in folder.iterdir() if entry.is_dir())}):
        if not list(path.glob("*.safetensors")):
            continue
        config = read_json(path / "config.json")
        parameters, types = weights_summary(path)
        name = config.get("_class_name") or (config.get("architectures") or ["?"])[0]
        settings = ", ".join(f"{key} {config[key]}" for key in CONFIG_ROWS.get(name, ()) if key in config)
        rows.append(f"| `{name}` | {parameters:,} | {types} | {settings} |")
    return "\n".join(rows)


def results_table(metrics: Sequence[MeasuredMetric]) -> str:
    if not metrics:
        return "Nothing was measured on these weights."
    rows = ["| metric | value | data | protocol | date |", "| --- | ---: | --- | --- | --- |"]
    for metric in metrics:
        value = f"{metric.value:g} {metric.unit}".strip()
        rows.append(f"| {metric.name} | {value} | {metric.data} | {metric.protocol} | {metric.date} |")
    return "\n".join(rows)


def card_data(content: CardContent, generates: bool, pictured: bool = False) -> ModelCardData:
    """The card's metadata, results included; the hub shows the picture, where there is one, as the model's example."""
    task = "video-generation" if generates else "video-reconstruction"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=metric.data.lower().replace(" ", "-"),
            dataset_name=metric.data,
            metric_type=metric.name.lower(),
            metric_name=metric.name,
            metric_value=metric.value,
        )
        for metric in content.metrics
    ]
    return ModelCardData(
        license=content.licence,
        library_name="diffusers",
        base_model=content.base_model,
        datasets=list(content.datasets) or None,
        tags=["video", "vc-vae", *content.tags],
        model_name=content.name,
        eval_results=results or None,
        widget=[{"text": content.name, "output": {"url": PICTURE}}] if pictured else None,
    )


def write_model_card(
    folder: str | Path,
    content: CardContent,
    where: str | None = None,
    use: str | None = None,
    caption: str | None = None,
) -> Path:
    """Write README.md of a folder that `save_pretrained` wrote: usage, contents, training, results, limits, licence.

    Args:
        folder: of a model or a pipeline.
        content: what cannot be read from the folder.
        where: what the usage section loads, by default the folder's own path; the repository's id when publishing.
        use: Markdown in place of the code that loads `where`, for a folder whose files do not carry the package's modules.
        caption: of the picture that `draw_reconstruction` wrote into the folder; None shows none.
    """
    folder = Path(folder)
    data = card_data(content, (folder / "model_index.json").is_file(), pictured=caption is not None)
    picture = f"\n\n![Frames and their reconstruction]({PICTURE})\n\n{caption}" if caption else ""
    sections = {
        "Use": f"{INSTALL}\n\n{use}" if use else f"{CARRIED}\n\n{usage(folder, where or str(folder))}",
        "Contents": contents_table(folder),
        "Training data": content.training_data,
        "Training": content.training,
        "Results": "\n\n".join(filter(None, (results_table(content.metrics), content.comparison))),
        "Limits": content.limitations,
        "Licence": content.licence,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {content.name}\n\n{content.summary}{picture}\n\n{body}\n")
    write_whole(folder / "README.md", str(card))
    return folder / "README.md"


def save_for_hub(
    model: ModelMixin | DiffusionPipeline,
    folder: str | Path,
    content: CardContent,
    where: str | None = None,
    variant: str | None = None,
    max_shard_size: str = "5GB",
    sample: str | Path | None = None,
) -> Path:
    """Save a model or pipeline as it is to be published: sharded safetensors, stubs, and a filled card with a picture.

    Args:
        model: a model of this package, or any pipeline with one.
        folder: where to; it may hold other variants of the same model.
        content: for the card.
        where: the repository's id, for the card's usage section.
        variant: such as "fp16", part of the weights' file names.
        max_shard_size: the largest weights file.
        sample: a video whose reconstruction the card shows; None as in `picture.draw_reconstruction`. A model without a
            VC-VAE, a lone transformer, has no picture.
    """
    folder = Path(folder)
    model.save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
    add_remote_code(folder)
    vae = getattr(model, "vae", model)
    caption = draw_reconstruction(vae, folder, sample) if type(vae).__name__ == MODEL_NAMES[0] else None
    write_model_card(folder, content, where, caption=caption)
    return folder


def push_to_hub(
    model: ModelMixin | DiffusionPipeline,
    repo_id: str,
    content: CardContent,
    variant: str | None = None,
    max_shard_size: str = "5GB",
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with vc_vae_diffusers",
    create_pr: bool = False,
    endpoint: str | None = None,
    sample: str | Path | None = None,
) -> str:
    """Publish a model or pipeline with its card and stubs; returns the address of the commit.

    Use it in place of the `push_to_hub` of diffusers, whose card is a blank template and which uploads no stubs.
    `endpoint` is the address of a hub other than the public one, `sample` that of `save_for_hub`.
    """
    api = HfApi(endpoint=endpoint, token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with scratch_folder(tempfile.gettempdir()) as folder:
        save_for_hub(model, folder, content, repo_id, variant, max_shard_size, sample)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr)
    return commit.commit_url
