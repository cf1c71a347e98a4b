"""What is done with one sample: reconstruct and score a clip, an image, or take features of generated clips.

A task turns a sample into a record (plain JSON, one journal line) and records into the averages of the result file.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..video import VideoReadError, write_image
from .baselines import FrameByFrameVAE
from .journal import file_name
from .networks import least_frames, summarise_fvd
from .protocols import Protocol
from .reconstructor import Reconstructor, Seconds
from .samples import Sample, SampleList, list_samples, open_sample, read_chunks, read_clip_frames
from .scoring import ClipScorer, MetricNetworks, encode_features, paired_chunks, summarise_frames

Record = dict[str, Any]
SAVED_FRAMES = 16
_REMEDY = "Take fewer frames, or leave the file out."


@dataclass(frozen=True)
class Variant:
    """One row of the result: a model, fed in one way.

    Args:
        label: of the row.
        as_video: for images: repeat the image to a group of frames.
        untouched: for TokBench: measure the source itself, not even resized.
    """

    label: str
    as_video: bool = False
    untouched: bool = False


class Task(ABC):
    """The work of a protocol kind.

    Args:
        protocol: what is measured.
        data: the samples.
        networks: of the metrics.
        frames_folder: where frames of the first `saved_samples` samples go; None saves none.
        saved_samples: how many samples' frames are saved.
    """

    def __init__(
        self,
        protocol: Protocol,
        data: SampleList,
        networks: MetricNetworks,
        frames_folder: Path | None = None,
        saved_samples: int = 0,
    ):
        self.protocol = protocol
        self.data = data
        self.networks = networks
        self.frames_folder = frames_folder
        self.saved = frozenset(sample.name for sample in data.samples[:saved_samples])

    def variants(self, model: Reconstructor, label: str) -> list[Variant]:
        """The rows that a model makes."""
        return [Variant(label)]

    def samples(self, source: str) -> tuple[Sample, ...]:
        """What is measured for a model."""
        return self.data.samples

    def measure(self, model: Reconstructor | None, sample: Sample, variant: Variant) -> Record:
        """The record of one sample; `skipped` says why if its file cannot be used."""
        seed = sample.seed(self.protocol.seed)
        devices = [] if model is None or model.device.type != "cuda" else [model.device]
        try:
            # Some decoders draw noise from the global generator: every sample has its own stream, whoever measures it.
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                record = self._measure(model, sample, variant, torch.Generator().manual_seed(seed))
        except VideoReadError as error:
            return {"sample": sample.name, "skipped": str(error)}
        return {"sample": sample.name, **record}

    @abstractmethod
    def _measure(self, model: Any, sample: Sample, variant: Variant, generator: torch.Generator) -> Record:
        """The record of one sample; `model` is a `Reconstructor`, None where clips were generated."""

    @abstractmethod
    def summarise(self, records: list[Record]) -> dict[str, Any]:
        """Averages of the records that were measured (at least one), for the result file."""

    def video_values(self, record: Record) -> Record:
        """What of a record the result file keeps for the sample."""
        return {key: value for key, value in record.items() if key != "features"}

    def _saver(self, variant: Variant, sample: Sample) -> FrameSaver | None:
        if self.frames_folder is None or sample.name not in self.saved:
            return None
        return FrameSaver(self.frames_folder / file_name(sample.name), variant.label)


class FrameSaver:
    """Writes the first frames of a clip and of its source as PNG, for the report's figures."""

    def __init__(self, folder: Path, label: str):
        self.reconstruction, self.source = folder / file_name(label), folder / "source"
        self.count = 0

    def add(self, reconstruction: torch.Tensor, source: torch.Tensor) -> None:
        """Write the next frames, both (1, 3, t, H, W)."""
        for folder, clip in ((self.reconstruction, reconstruction), (self.source, source)):
            folder.mkdir(parents=True, exist_ok=True)
            for offset, picture in enumerate(clip[0, :, : max(0, SAVED_FRAMES - self.count)].unbind(1)):
                path = folder / f"{self.count + offset:03d}.png"
                if folder is self.reconstruction or not path.exists():
                    write_image(path, picture)
        self.count += reconstruction.shape[2]


def _timed(model: Reconstructor) -> Record:
    """What a model did since `model.seconds` was reset, for a record."""
    shape = None if model.latent_shape is None else list(model.latent_shape)
    return {"seconds": {"encode": model.seconds.encode, "decode": model.seconds.decode}, "latent_shape": shape}


class ClipTask(Task):
    """Videos: frame metrics, temporal metrics, FVD features."""

    def _measure(self, model: Reconstructor, sample: Sample, variant: Variant, generator: torch.Generator) -> Record:
        protocol = self.protocol
        scorer = ClipScorer(protocol.metrics, self.networks, protocol.fvd_frames)
        saver = self._saver(variant, sample)
        # A model without a special first frame is not shown the one that is not scored.
        hidden = 1 if protocol.without_first_frame and not model.separate_first else 0
        unscored = 1 if protocol.without_first_frame and model.separate_first else 0
        model.seconds, size = Seconds(), (0, 0)
        with open_sample(sample, protocol, protocol.size) as reader:
            total = protocol.clip_frames
            if total is None and model.needs_length:
                total = sum(chunk.shape[2] for chunk in read_chunks(reader, protocol.frame_interval))
            chunks = _from_frame(hidden, read_chunks(reader, protocol.frame_interval))
            first = next(chunks, None)
            if first is None:
                raise VideoReadError(sample.path, "gives one frame, which is not scored", _REMEDY)
            chunks = itertools.chain([first], chunks)
            length = None if total is None else total - hidden
            for reconstruction, source in paired_chunks(model, chunks, generator, length):
                dropped = min(unscored, source.shape[2])
                unscored -= dropped
                if source.shape[2] > dropped:
                    size = (source.shape[3], source.shape[4])
                    scorer.add(reconstruction[:, :, dropped:], source[:, :, dropped:])
                    if saver is not None:
                        saver.add(reconstruction[:, :, dropped:], source[:, :, dropped:])
        self._check_length(sample, scorer.num_frames)
        record = {
            "frames": scorer.num_frames,
            "height": size[0],
            "width": size[1],
            "first_frame_index": 1 if protocol.without_first_frame else 0,
            "per_frame": scorer.values,
            **_timed(model),
        }
        features = scorer.features()
        return record if features is None else {**record, "features": features}

    def _check_length(self, sample: Sample, scored: int) -> None:
        protocol = self.protocol
        if protocol.num_frames is not None and scored < protocol.num_frames:
            found = scored + (1 if protocol.without_first_frame else 0)
            raise VideoReadError(sample.path, f"gives {found} frames, the protocol takes {protocol.clip_frames}", _REMEDY)
        least = least_frames(protocol)
        if scored < least:
            raise VideoReadError(sample.path, f"gives {scored} frames to score, the metrics need {least}", _REMEDY)

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        summary = summarise_frames(records)
        if "fvd" in self.protocol.metrics:
            features = [record["features"] for record in records]
            reconstructions, sources = ([pair[key] for pair in features] for key in ("reconstruction", "source"))
            summary["metrics"].update(summarise_fvd(self.protocol, reconstructions, sources))
        return summary


def _from_frame(start: int, chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The chunks without the first `start` frames."""
    for chunk in chunks:
        kept = chunk[:, :, start:]
        start = max(0, start - chunk.shape[2])
        if kept.shape[2]:
            yield kept


class ImageTask(Task):
    """Images: a model that codes the first frame on its own gets one frame, and in a second row, marked `*`, a video.

    Table 9 marks with a star what was represented by video frames. A model without a special first frame only has the
    video: one group of repeated frames, all of which are scored, the first one apart.
    """

    def variants(self, model: Reconstructor, label: str) -> list[Variant]:
        if isinstance(model, FrameByFrameVAE) or model.temporal_compression == 1:
            return [Variant(label)]
        if model.separate_first:
            return [Variant(label), Variant(f"{label}*", as_video=True)]
        return [Variant(label, as_video=True)]

    def _measure(self, model: Reconstructor, sample: Sample, variant: Variant, generator: torch.Generator) -> Record:
        image = read_clip_frames(sample, self.protocol, self.protocol.size, 1)
        alone = 1 if variant.as_video and model.separate_first else 0
        frames = alone + (model.temporal_compression if variant.as_video else 1)
        model.seconds = Seconds()
        source = image.expand(-1, -1, frames, -1, -1)
        reconstruction = model.reconstruct(source, generator)
        scorer = ClipScorer(self.protocol.metrics, self.networks, fvd_frames=0)
        scorer.add(reconstruction[:, :, alone:], source[:, :, alone:])
        saver = self._saver(variant, sample)
        if saver is not None:
            saver.add(reconstruction[:, :, alone:], source[:, :, alone:])
        return {
            "frames": frames - alone,
            "height": image.shape[3],
            "width": image.shape[4],
            "first_frame_index": 0,
            "per_frame": scorer.values,
            **_timed(model),
        }

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        return summarise_frames(records)


class GenerationTask(Task):
    """Generated clips: only their features, and those of the data they are compared with."""

    DATA, GENERATED = "data", "generated"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._data_records: dict[str, Record] = {}  # every folder of samples is compared with the same clips

    def samples(self, source: str) -> tuple[Sample, ...]:
        generated = list_samples(source, self.protocol)
        named = ((self.DATA, self.data.samples), (self.GENERATED, generated.samples))
        return tuple(Sample(f"{group}/{sample.name}", sample.path) for group, samples in named for sample in samples)

    def _measure(self, model: None, sample: Sample, variant: Variant, generator: torch.Generator) -> Record:
        protocol = self.protocol
        if sample.name in self._data_records:
            return self._data_records[sample.name]
        of_data = sample.name.startswith(f"{self.DATA}/")
        interval = protocol.frame_interval if of_data else 1
        with open_sample(sample, protocol, protocol.size) as reader:
            clip = torch.cat(list(read_chunks(reader, interval)), dim=2)
        assert protocol.num_frames is not None  # `Protocol` refuses others for generated clips
        assert protocol.num_frames is not None  # `Protocol` refuses others for generated clips
        if clip.shape[2] < protocol.num_frames:
            raise VideoReadError(
                sample.path, f"gives {clip.shape[2]} frames, the protocol takes {protocol.num_frames}", _REMEDY
            )
        clip = clip[:, :, : min(protocol.num_frames, protocol.fvd_frames)].to(self.networks.device)
        features = encode_features(self.networks.video_features(clip)[0])
        record = {"frames": clip.shape[2], "height": clip.shape[3], "width": clip.shape[4], "features": features}
        if of_data:
            self._data_records[sample.name] = record
        return record

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        groups: tuple[list, list] = ([], [])
        for record in records:
            groups[record["sample"].startswith(f"{self.GENERATED}/")].append(record["features"])
        data, generated = groups
        if not generated or not data:
            raise ValueError("no clip of the data or no generated clip could be read; see the skipped ones")
        return {"metrics": summarise_fvd(self.protocol, generated, data), "curves": {}, "first_frame": {}}
