"""Runs a protocol over models and samples: resumable after a kill, on one process or many, with one result file.

Every sample is measured on its own and written to a journal beside the result file. Processes share the samples out among
themselves; whoever measures a sample, its record is the same, and averages are taken in the order of the list. So a
restarted or distributed run ends in the numbers of an undisturbed one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..metrics.weights import tensor_digest
from ..processes import processes
from .journal import Journal, file_name
from .loading import ORIGINAL, SAMPLES, ModelSpec, load_model
from .networks import build_networks, check_clip_length, fvd_warnings
from .protocols import Protocol
from .reconstructor import Reconstructor
from .results import find_model, new_result, package_versions, read_result, write_result
from .samples import SampleList, list_samples
from .tasks import ClipTask, GenerationTask, ImageTask, Record, Task, Variant
from .tokbench_task import TokBenchTask, find_videos

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
TASKS = {"video": ClipTask, "image": ImageTask, "generation": GenerationTask}


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here may change a number beyond rounding, but `dtype`, which is recorded.

    Args:
        device: e.g. `"cuda"`; None lets accelerate choose one for each process.
        dtype: of the models; metrics are always float32.
        list_file: the samples, instead of all files of the data folder.
        weights: folder or file with the metric networks' weights, instead of the default places.
        saved_samples: of so many samples the first frames are kept as PNG, for the report's figures.
        token: for gated repositories.
        ocr: PARSeq's ONNX file, for TokBench; None takes the stand-in.
        faces: glintr100's ONNX file; None looks where weights are kept and takes the stand-in otherwise.
        progress: called with (row label, samples done by this process, samples it has to do).
    """

    device: str | None = None
    dtype: torch.dtype = torch.float32
    list_file: str | Path | None = None
    weights: str | Path | None = None
    saved_samples: int = 0
    token: str | None = None
    ocr: str | Path | None = None
    faces: str | Path | None = None
    progress: Progress | None = None


def run_evaluation(
    models: Sequence[ModelSpec], protocol: Protocol, data: str | Path, out: str | Path, options: RunOptions | None = None
) -> dict[str, Any]:
    """Evaluate models by one protocol and write the result file.

    If `out` exists, its models are kept and those that are missing are added; a journal beside it is continued. Under
    `accelerate launch` all processes call this, and share a file system.

    Args:
        models: what to evaluate, one row or more each.
        protocol: how.
        data: the folder of videos or images.
        out: the result file (JSON).
        options: device, dtype and the like.

    Returns:
        The result, as in the file, in every process.

    Raises:
        ValueError: for data, models or a file at `out` that do not fit, or if no sample can be measured.
        MissingWeightsError: if a metric's weights are missing.
    """
    options = options or RunOptions()
    out = Path(out)
    labels = [spec.label for spec in models]
    if len(set(labels)) != len(labels):
        raise ValueError(f"models have the labels {', '.join(labels)}, but each must have its own: use LABEL=SOURCE")
    state = processes(options.device)
    device = state.device if options.device is None else torch.device(options.device)
    check_clip_length(protocol)
    samples = find_videos(data, protocol) if protocol.kind == "tokbench" else list_samples(data, protocol, options.list_file)
    networks = build_networks(protocol, device, options.weights)
    result = _result_so_far(out, protocol, samples)
    if options.saved_samples and protocol.kind in ("tokbench", "generation"):
        raise ValueError(f"saved_samples is {options.saved_samples}, but frames are kept of videos and images only; use 0")
    frames_folder = out.with_name(f"{out.stem}_frames") if options.saved_samples else None
    if frames_folder is not None:
        result["frames"] = {
            "folder": frames_folder.name,
            "samples": [s.name for s in samples.samples[: options.saved_samples]],
        }
    if protocol.kind == "tokbench":
        task: Task = TokBenchTask(protocol, samples, networks, options.ocr, options.faces)
        models = [ModelSpec(ORIGINAL, ORIGINAL), *(spec for spec in models if spec.source != ORIGINAL)]
    else:
        task = TASKS[protocol.kind](protocol, samples, networks, frames_folder, options.saved_samples)
    _check_models(models, protocol, options)
    for spec in models:
        for entry in _evaluate_model(spec, task, result, out, state, device, options):
            result["models"] = [kept for kept in result["models"] if kept["label"] != entry["label"]] + [entry]
            if state.is_main_process:
                write_result(out, result)
        state.wait_for_everyone()
    if state.is_main_process:
        _remove_journals(out, [entry["label"] for entry in read_result(out)["models"]])
    state.wait_for_everyone()
    return read_result(out)


def _check_models(models: Sequence[ModelSpec], protocol: Protocol, options: RunOptions) -> None:
    """Read every model once before the first is measured: one that is missing is told at once and not hours later.

    Raises:
        ValueError, OSError: as reading does.
    """
    for spec in models:
        _check_kind(spec, protocol)
    for spec in models[1:]:  # the first is read next
        if spec.source.startswith(SAMPLES):
            list_samples(spec.source.removeprefix(SAMPLES), protocol)
        else:
            load_model(spec, dtype=options.dtype, posterior=protocol.posterior, token=options.token)


def _check_kind(spec: ModelSpec, protocol: Protocol) -> None:
    generated = protocol.kind == "generation"
    if generated != spec.source.startswith(SAMPLES):
        rule = "generated videos: LABEL=samples:FOLDER" if generated else "a model, not a folder of samples"
        raise ValueError(f"model is {spec.source!r}, but protocol {protocol.name!r} takes {rule}")


def _result_so_far(out: Path, protocol: Protocol, samples: SampleList) -> dict[str, Any]:
    description = {
        "root": str(samples.root),
        "source": samples.source,
        "count": len(samples.samples),
        "sha256": samples.sha256,
        "names": [sample.name for sample in samples.samples],
    }
    fresh = new_result(protocol.to_dict(), description)
    if not out.exists():
        return fresh
    found = read_result(out)
    if found["protocol"] != fresh["protocol"]:
        changed = sorted(k for k in fresh["protocol"] if found["protocol"].get(k) != fresh["protocol"][k])
        raise ValueError(
            f"{out} holds results of another protocol (it differs in {', '.join(changed)}); choose another file"
        )
    if found["samples"]["sha256"] != description["sha256"]:
        raise ValueError(
            f"{out} holds results of {found['samples']['count']} other samples (here are {description['count']}); "
            "choose another file"
        )
    return found


def _evaluate_model(
    spec: ModelSpec,
    task: Task,
    result: Mapping[str, Any],
    out: Path,
    state: PartialState,
    device: torch.device,
    options: RunOptions,
) -> list[dict[str, Any]]:
    """The rows of one model that the result does not have yet."""
    model = None
    if not isinstance(task, GenerationTask):
        model = load_model(spec, device=device, dtype=options.dtype, posterior=task.protocol.posterior, token=options.token)
    identity = _describe(model, spec, task, device, options)
    entries = []
    for variant in [Variant(spec.label)] if model is None else task.variants(model, spec.label):
        present = find_model(result, variant.label)
        if present is not None:
            differing = sorted(key for key in identity if present.get(key) != identity[key])
            if differing:
                raise ValueError(
                    f"{out} has a model labelled {variant.label!r} with another {', '.join(differing)}; "
                    "give this one another label, or write another file"
                )
            logger.info("%s is in %s already", variant.label, out)
            continue
        records = _measure_all(model, spec, variant, task, {**identity, "label": variant.label}, out, state, options)
        entries.append(_entry(variant, identity, records, task, spec))
    return entries


def _describe(
    model: Reconstructor | None, spec: ModelSpec, task: Task, device: torch.device, options: RunOptions
) -> dict[str, Any]:
    """All that a row's numbers depend on besides protocol and samples; also the identity of its journal."""
    description = {
        "source": spec.source,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "packages": package_versions(),
        "metric_backends": task.networks.backends,
    }
    if model is None:
        generated = list_samples(spec.source.removeprefix(SAMPLES), task.protocol)
        return {**description, "generated": len(generated.samples), "generated_sha256": generated.sha256}
    network = model.module
    return {
        **description,
        "class": type(model).__name__ if network is None else type(network).__name__,
        "dtype": str(options.dtype).removeprefix("torch."),
        "parameters": 0 if network is None else sum(parameter.numel() for parameter in network.parameters()),
        "weights_sha256": None if network is None else tensor_digest(network.state_dict()),
        "separate_first_frame": model.separate_first,
        "frame_rule": str(model.frame_rule),
        "compression": [model.temporal_compression, model.spatial_compression, model.spatial_compression],
        "latent_channels": model.latent_channels,
        "streamed": model.streams,
        "settings": model.settings,
    }


def _measure_all(
    model: Reconstructor | None,
    spec: ModelSpec,
    variant: Variant,
    task: Task,
    identity: dict[str, Any],
    out: Path,
    state: PartialState,
    options: RunOptions,
) -> list[Record]:
    """Measure what the journal does not have, this process's share of it; then read all of it, in the list's order."""
    samples = task.samples(spec.source.removeprefix(SAMPLES))
    header = {"protocol": task.protocol.to_dict(), "samples_sha256": task.data.sha256, **identity}
    header["saved_frames_of"] = sorted(task.saved)
    journal = Journal(_journal_root(out) / file_name(variant.label), header)
    if state.is_main_process:
        journal.create()
    state.wait_for_everyone()
    done = journal.records()
    state.wait_for_everyone()  # nobody writes before everybody has read
    pending = [sample for sample in samples if sample.name not in done][state.process_index :: state.num_processes]
    if done:
        logger.info("%s: continuing, %d of %d samples are measured", variant.label, len(done), len(samples))
    journal.open(state.process_index)
    try:
        for count, sample in enumerate(pending):
            if options.progress is not None:
                options.progress(variant.label, count, len(pending))
            journal.append(task.measure(model, sample, variant))
        if options.progress is not None:
            options.progress(variant.label, len(pending), len(pending))
    finally:
        journal.close()
    state.wait_for_everyone()
    records = journal.records()
    state.wait_for_everyone()
    if state.is_main_process and not journal.measured():  # nothing that another run could go on with
        _remove_journals(out, [variant.label])
    if lost := [sample.name for sample in samples if sample.name not in records]:
        raise OSError(
            f"{journal.folder} lost {len(lost)} records while the run went on; the same command measures them again"
        )
    return [records[sample.name] for sample in samples]


def _entry(variant: Variant, identity: dict[str, Any], records: list[Record], task: Task, spec: ModelSpec) -> dict[str, Any]:
    measured = [record for record in records if "skipped" not in record]
    skipped = [record for record in records if "skipped" in record]
    if not measured:
        raise ValueError(
            f"no sample could be measured for {variant.label}; give other files, the first: {skipped[0]['skipped']}"
        )
    for record in skipped:
        logger.warning("%s: skipped %s", variant.label, record["skipped"])
    entry = {"label": variant.label, **identity, "image_as_video": variant.as_video}
    entry["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    entry["measured"], entry["skipped"] = len(measured), skipped
    entry.update(task.summarise(measured))
    entry["warnings"] = _warnings(task.protocol, len(measured), len(skipped)) + fvd_warnings(entry["metrics"])
    entry["warnings"] += entry.pop("notes", [])
    entry["timing"] = _timing(measured)
    entry["videos"] = [task.video_values(record) for record in measured]
    return entry


def _warnings(protocol: Protocol, measured: int, skipped: int) -> list[str]:
    warnings = []
    if protocol.kind != "generation" and protocol.expected_samples not in (None, measured):
        warnings.append(f"{measured} samples were measured, the protocol means {protocol.expected_samples}")
    if skipped:
        warnings.append(f"{skipped} samples could not be used")
    return warnings


def _timing(records: list[Record]) -> dict[str, Any] | None:
    """Milliseconds a frame, over all records; the first call of a process is slower and is counted."""
    if "seconds" not in records[0]:
        return None
    frames = sum(record["frames"] for record in records)
    totals = {half: sum(record["seconds"][half] for record in records) for half in ("encode", "decode")}
    return {
        "frames": frames,
        **{f"{half}_seconds": total for half, total in totals.items()},
        **{f"{half}_ms_per_frame": 1000 * total / frames for half, total in totals.items()},
    }


def _journal_root(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _remove_journals(out: Path, labels: Sequence[str]) -> None:
    """The journals of these models; others belong to runs that may still be continued."""
    root = _journal_root(out)
    for label in labels:
        folder = root / file_name(label)
        if (folder / "header.json").exists():
            Journal(folder, {}).remove()
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()
