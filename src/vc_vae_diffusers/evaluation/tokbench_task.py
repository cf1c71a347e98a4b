"""TokBench-Video in the runner: frames at the benchmark's size through the model and back (Table 3)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..metrics.tokbench import AnnotatedVideo, FrameGeometry, VideoScorer, bin_means, read_annotations
from ..metrics.tokbench_backends import DlibEmbedder, GlintEmbedder, ParseqReader, RapidOCRReader
from ..metrics.weights import GLINTR100, MissingWeightsError, find_weights
from ..video import VideoReader, VideoReadError, from_uint8, to_uint8
from .protocols import Protocol
from .reconstructor import Original, Reconstructor, Seconds
from .samples import CHUNK_FRAMES, Sample, SampleList
from .scoring import MetricNetworks
from .tasks import Record, Task, Variant

logger = logging.getLogger(__name__)


def find_videos(data: str | Path, protocol: Protocol) -> SampleList:
    """The annotated videos of the benchmark's folder; the hash covers the annotations too.

    Raises:
        ValueError: if annotations or videos are missing.
    """
    root = Path(data)
    videos = read_annotations(root)[: protocol.max_samples]
    samples = tuple(Sample(video.name, video.path) for video in videos)
    listing = "".join(f"{sample.name}\t{sample.path.stat().st_size}\n" for sample in samples)
    digest = hashlib.sha256(listing.encode())
    for path in sorted((root / "video_annotations").glob("*.json")):
        digest.update(path.read_bytes())
    return SampleList(root, samples, "annotated videos of TokBench", digest.hexdigest())


class TokBenchTask(Task):
    """Reads words and compares faces in reconstructed videos.

    Args:
        protocol: gives the short side and the bins.
        data: what `find_videos` found.
        networks: only their device is used.
        ocr: PARSeq's ONNX file; None takes rapidocr.
        faces: glintr100's file; None looks where weights are kept, and takes dlib if it is not there.

    Raises:
        ImportError: if a backend's package is missing.
    """

    def __init__(
        self,
        protocol: Protocol,
        data: SampleList,
        networks: MetricNetworks,
        ocr: str | Path | None = None,
        faces: str | Path | None = None,
    ):
        super().__init__(protocol, data, networks)
        self.videos: dict[str, AnnotatedVideo] = {video.name: video for video in read_annotations(data.root)}
        measured = [self.videos[sample.name] for sample in data.samples]
        self.reader = _reader(ocr) if any(video.words for video in measured) else None
        self.embedder = _embedder(faces) if any(video.faces for video in measured) else None
        if self.reader is not None:
            networks.backends.update({f"{name}[{self.reader.name}]": self.reader.description for name in ("t_acc", "t_ned")})
        if self.embedder is not None:
            networks.backends[f"f_sim[{self.embedder.name}]"] = self.embedder.description

    def variants(self, model: Reconstructor, label: str) -> list[Variant]:
        # The source as it is, and through the resizing alone: no model can be expected to do better than the second.
        if isinstance(model, Original):
            return [Variant("original", untouched=True), Variant("resized")]
        return [Variant(label)]

    def _measure(self, model: Reconstructor, sample: Sample, variant: Variant, generator: torch.Generator) -> Record:
        video = self.videos[sample.name]
        scorer = VideoScorer(video, self.reader, self.embedder)
        model.seconds = Seconds()
        with VideoReader(sample.path, dtype=torch.uint8, chunk_frames=CHUNK_FRAMES, threads=1) as reader:
            if (reader.height, reader.width) != (video.height, video.width):
                problem = f"is {reader.width}x{reader.height}, but its annotations are of {video.width}x{video.height}"
                raise VideoReadError(sample.path, problem, "Use the published videos.")
            frames = self._score(model, reader, scorer, variant, generator)
        annotated = set(video.words) | set(video.faces)
        return {
            "frames": frames,
            "height": video.height,
            "width": video.width,
            "words": [list(word) for word in scorer.words],
            "faces": [list(face) for face in scorer.faces],
            "frames_annotated_but_absent": sum(frame >= frames for frame in annotated),
            "seconds": {"encode": model.seconds.encode, "decode": model.seconds.decode},
            "latent_shape": None if model.latent_shape is None else list(model.latent_shape),
        }

    def _score(
        self,
        model: Reconstructor,
        reader: VideoReader,
        scorer: VideoScorer,
        variant: Variant,
        generator: torch.Generator,
    ) -> int:
        """Score all annotated frames of a video; returns how many frames it has."""
        assert self.protocol.size is not None  # of every protocol of TokBench
        assert self.protocol.size is not None  # of every protocol of TokBench
        geometry = FrameGeometry(reader.height, reader.width, self.protocol.size)
        sources: dict[int, np.ndarray] = {}
        seen = 0

        def shrunk() -> Iterator[torch.Tensor]:
            nonlocal seen
            for chunk in reader:
                frames = chunk.permute(1, 2, 3, 0).numpy()
                sources.update({seen + i: frame for i, frame in enumerate(frames) if scorer.wants(seen + i)})
                seen += len(frames)
                small = np.stack([geometry.shrink(frame) for frame in frames])
                yield from_uint8(torch.from_numpy(small).permute(3, 0, 1, 2)[None])

        if variant.untouched:
            for _ in shrunk():
                for index in sorted(sources):
                    source = sources.pop(index)
                    scorer.add(index, source, source)
            return seen
        length = sum(chunk.shape[1] for chunk in reader) if model.needs_length else None
        done = 0
        for reconstruction in model.reconstruct_stream(shrunk(), generator, length):
            for frame in to_uint8(reconstruction[0]).permute(1, 2, 3, 0).numpy():
                if done in sources:
                    scorer.add(done, geometry.restore(frame), sources.pop(done))
                done += 1
        return seen

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        words = [word for record in records for word in record["words"]]
        faces = [face for record in records for face in record["faces"]]
        if self.reader is not None:
            for name, column in (("t_acc", 1), ("t_ned", 2)):
                values = ((word[0], 100 * word[column]) for word in words)
                metrics[f"{name}[{self.reader.name}]"] = bin_means(values, self.protocol.text_bins)
        if self.embedder is not None:
            metrics[f"f_sim[{self.embedder.name}]"] = bin_means(faces, self.protocol.face_bins)
        absent = sum(record["frames_annotated_but_absent"] for record in records)
        notes = [f"{absent} annotated frames are beyond the end of their videos"] if absent else []
        return {"metrics": metrics, "curves": {}, "first_frame": {}, "notes": notes}


def _reader(path: str | Path | None) -> ParseqReader | RapidOCRReader:
    if path is not None:
        return ParseqReader(path)
    logger.warning("TokBench's OCR network (PARSeq) was not given: rapidocr stands in, under its own name")
    return RapidOCRReader()


def _embedder(path: str | Path | None) -> GlintEmbedder | DlibEmbedder:
    if path is None:
        try:
            find_weights(GLINTR100)
        except MissingWeightsError:
            logger.warning("TokBench's face network (glintr100) is not on this machine: dlib stands in, under its own name")
            return DlibEmbedder()
    return GlintEmbedder(path)
