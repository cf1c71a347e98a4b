"""TokBench-Video (Wu et al., 2025): is text in reconstructed frames still read, and are faces still recognised?

T-ACC and T-NED compare what an OCR network reads in the crop of every annotated word with the annotation. F-Sim is the
cosine of the face embeddings of source and reconstruction, aligned by the annotated key points. Values are averaged within
three bins of relative size, and the mean is the unweighted mean of the bins (that reproduces Table 3).

The networks are in `tokbench_backends.py`; every value is named with its backend, as `t_acc[parseq]`. Differences from
TokBench's scripts: frames stay in memory (theirs pass through a lossy codec), values are rounded (theirs truncated), and a
word with characters that the OCR does not know counts as an error (theirs drop its whole batch).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..extras import install_hint

PAD_MULTIPLE = 32
BIN_NAMES = ("small", "medium", "large")
TEXT_SETS = ("ch3", "ds")
FACE_SET = "face_clip_3s"


class TextReader(Protocol):
    """An OCR network that reads crops of single words."""

    name: str
    description: str

    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        """The word in every crop, (h, w, 3) uint8 RGB."""


class FaceEmbedder(Protocol):
    """A face recognition network."""

    name: str
    description: str

    def embed(self, frame: np.ndarray, key_points: np.ndarray) -> np.ndarray:
        """The embedding of the face with these (5, 2) key points in a frame (H, W, 3) uint8 RGB."""


# Annotations -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """An annotated word: box (left, top, right, bottom) in pixels of the original frame, right and bottom exclusive."""

    box: tuple[int, int, int, int]
    text: str
    ratio: float


@dataclass(frozen=True)
class Face:
    """An annotated face: eyes, nose and mouth corners in pixels of the original frame."""

    key_points: tuple[tuple[float, float], ...]
    ratio: float


@dataclass
class AnnotatedVideo:
    """A video of the benchmark with its annotations by frame number, from 0.

    Args:
        name: set and file, unique.
        path: of the video.
        height, width: as annotated.
        words, faces: by frame.
    """

    name: str
    path: Path
    height: int
    width: int
    words: dict[int, list[Word]] = field(default_factory=dict)
    faces: dict[int, list[Face]] = field(default_factory=dict)


def text_ratio(box: Sequence[float], text: str, height: int, width: int) -> float:
    """Relative size of a character: max(w, h) / (number of characters * max(H, W)).

    Args:
        box: left, top, right, bottom.
        text: the word.
        height, width: of the frame.
    """
    return max(box[2] - box[0], box[3] - box[1]) / (len(text) * max(height, width))


def read_annotations(root: str | Path) -> list[AnnotatedVideo]:
    """Read the benchmark's folder: `video_annotations/` and `videos/`, as published (`Junfeng5/TokBench`).

    Sets that are absent as a whole are left out.

    Returns:
        The annotated videos, sorted by name.

    Raises:
        ValueError: if no annotation file is there, one is malformed, or a video of it is missing.
    """
    root = Path(root)
    videos: list[AnnotatedVideo] = []
    for name in TEXT_SETS:
        path = root / "video_annotations" / f"text_{name}.json"
        if path.is_file():
            videos += _read_text_set(path, root / "videos" / "text_data" / name, name)
    path = root / "video_annotations" / "videoface_meta.json"
    if path.is_file():
        videos += _read_face_set(path, root / "videos" / "face_data" / FACE_SET)
    if not videos:
        raise ValueError(
            f"data is {root}, which has neither text_ch3.json, text_ds.json nor videoface_meta.json in video_annotations/; "
            "give the folder of the dataset Junfeng5/TokBench"
        )
    missing = [video.path for video in videos if not video.path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} annotated videos are missing below {root}, the first is {missing[0]}; add them")
    return sorted(videos, key=lambda video: video.name)


def _read_text_set(path: Path, folder: Path, set_name: str) -> list[AnnotatedVideo]:
    videos: dict[str, AnnotatedVideo] = {}
    for number, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        try:
            name, height, width = entry["video_name"], int(entry["height"]), int(entry["width"])
            frame = int(Path(entry["file_name"]).stem.rsplit("-frame", 1)[1]) - 1
            words = [_word(annotation, height, width) for annotation in entry["annotations"]]
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"entry {number} of {path} cannot be read ({error!r}); use the published file") from error
        if name not in videos:
            videos[name] = AnnotatedVideo(f"{set_name}/{name}", folder / f"{name}.mp4", height, width)
        if words:
            videos[name].words.setdefault(frame, []).extend(words)
    return list(videos.values())


def _word(annotation: dict[str, Any], height: int, width: int) -> Word:
    box = tuple(int(value) for value in annotation["bbox"])  # truncated, as TokBench does
    if len(box) != 4:
        raise ValueError(f"bbox has {len(box)} values instead of left, top, right, bottom")
    text = annotation["rec"]
    ratio = annotation.get("ratio")
    return Word(box, text, text_ratio(box, text, height, width) if ratio is None else float(ratio))


def _read_face_set(path: Path, folder: Path) -> list[AnnotatedVideo]:
    videos = []
    for number, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        try:
            name = entry["video_name"]
            video = AnnotatedVideo(
                f"{FACE_SET}/{name}", folder / name, int(entry["video_height"]), int(entry["video_width"])
            )
            for frame, faces in enumerate(entry["frame_anns"]):
                found = [Face(tuple((float(x), float(y)) for x, y in face["kps"]), float(face["ratio"])) for face in faces]
                if any(len(face.key_points) != 5 for face in found):
                    raise ValueError("a face has not five key points")
                if found:
                    video.faces[frame] = found
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"entry {number} of {path} cannot be read ({error!r}); use the published file") from error
        videos.append(video)
    return videos


# Frames ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameGeometry:
    """How a frame reaches the model and comes back: short side resized, long side padded with black, half on each side."""

    height: int
    width: int
    short_side: int

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) after resizing."""
        scale = self.short_side / min(self.height, self.width)
        if self.height <= self.width:
            return self.short_side, round(self.width * scale)
        return round(self.height * scale), self.short_side

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) that the model sees: the long side a multiple of 32."""
        height, width = self.resized
        if self.height <= self.width:
            return height, -(-width // PAD_MULTIPLE) * PAD_MULTIPLE
        return -(-height // PAD_MULTIPLE) * PAD_MULTIPLE, width

    @property
    def offset(self) -> tuple[int, int]:
        """(rows, columns) before the picture."""
        rows, columns = ((outer - inner) // 2 for outer, inner in zip(self.padded, self.resized, strict=True))
        return rows, columns

    def shrink(self, frame: np.ndarray) -> np.ndarray:
        """An original frame (H, W, 3) uint8 as the model gets it."""
        height, width = self.resized
        rows, columns = self.offset
        result = np.zeros((*self.padded, 3), np.uint8)
        result[rows : rows + height, columns : columns + width] = _resize(frame, height, width)
        return result

    def restore(self, frame: np.ndarray) -> np.ndarray:
        """A frame from the model, uint8, without padding and at the original size."""
        height, width = self.resized
        rows, columns = self.offset
        return _resize(frame[rows : rows + height, columns : columns + width], self.height, self.width)


def _resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BILINEAR))


# Scores ----------------------------------------------------------------------------------------------------------------


def text_scores(read: str, truth: str) -> tuple[float, float]:
    """(T-ACC, T-NED) of one word: exact match with case, and 1 - Levenshtein distance / length of the longer.

    Raises:
        ImportError: if rapidfuzz is missing.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError(f"TokBench needs rapidfuzz: {install_hint('eval')}") from error
    longest = max(len(read), len(truth))
    similarity = 1.0 if longest == 0 else 1.0 - Levenshtein.distance(read, truth) / longest
    return float(read == truth), similarity


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of two embeddings, in float64."""
    first, second = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


class VideoScorer:
    """Scores the annotated frames of one video, frame by frame.

    Args:
        video: with its annotations.
        reader: for words; None leaves them out.
        embedder: for faces; None leaves them out.

    Attributes:
        words: (ratio, T-ACC, T-NED, read, truth) of every word scored.
        faces: (ratio, similarity) of every face scored.
    """

    def __init__(self, video: AnnotatedVideo, reader: TextReader | None, embedder: FaceEmbedder | None):
        self.video, self.reader, self.embedder = video, reader, embedder
        self.words: list[tuple[float, float, float, str, str]] = []
        self.faces: list[tuple[float, float]] = []

    def wants(self, frame: int) -> bool:
        """Whether anything is annotated in a frame."""
        words = self.reader is not None and frame in self.video.words
        return words or (self.embedder is not None and frame in self.video.faces)

    def add(self, frame: int, reconstruction: np.ndarray, source: np.ndarray) -> None:
        """Score one frame, both (H, W, 3) uint8 RGB at the original size."""
        if self.reader is not None:
            self._add_words(self.reader, self.video.words.get(frame, []), reconstruction)
        if self.embedder is not None:
            for face in self.video.faces.get(frame, []):
                points = np.asarray(face.key_points, np.float64)
                pair = [self.embedder.embed(picture, points) for picture in (reconstruction, source)]
                self.faces.append((face.ratio, cosine(*pair)))

    def _add_words(self, reader: TextReader, words: Iterable[Word], reconstruction: np.ndarray) -> None:
        kept, crops = [], []
        for word in words:
            left, top, right, bottom = (max(0, value) for value in word.box)
            crop = reconstruction[top:bottom, left:right]
            if min(crop.shape[:2]) > 1:  # TokBench drops crops of one pixel or none
                kept.append(word)
                crops.append(crop)
        for word, read in zip(kept, reader.read(crops) if crops else [], strict=True):
            self.words.append((word.ratio, *text_scores(read, word.text), read, word.text))


def bin_means(values: Iterable[tuple[float, float]], edges: Sequence[float]) -> dict[str, Any]:
    """Means of values by relative size, and the unweighted mean of the bins.

    Args:
        values: (ratio, value).
        edges: of three half-open bins [e0, e1), [e1, e2), [e2, e3); values outside them are left out.

    Returns:
        `small`, `medium`, `large` and their `value` (the mean), `nan` where a bin is empty; `counts` by bin.
    """
    bins: dict[str, list[float]] = {name: [] for name in BIN_NAMES}
    for ratio, value in values:
        for name, low, high in zip(BIN_NAMES, edges[:-1], edges[1:], strict=True):
            if low <= ratio < high:
                bins[name].append(value)
    means = {name: math.fsum(inside) / len(inside) if inside else math.nan for name, inside in bins.items()}
    return {"value": sum(means.values()) / len(means), **means, "counts": [len(bins[name]) for name in BIN_NAMES]}
