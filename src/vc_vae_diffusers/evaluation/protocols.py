"""Protocols: everything that decides a number besides the model and the data, as named presets in YAML.

A protocol is written whole into every result file. The presets are `protocols/*.yaml` of this package; a file of the
same form can be given instead of a name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..extras import parse_yaml
from ..files import read_text

FRAME_METRICS = ("psnr", "ssim", "lpips_alex", "lpips_vgg")
STEP_METRICS = ("flicker", "temporal_difference_psnr")
METRICS = (*FRAME_METRICS, *STEP_METRICS, "fvd")
KINDS = ("video", "image", "tokbench", "generation")
KINDS_WITH_FRAMES = ("video", "image")  # frames of the first samples can be kept
_KINDS = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "None": (type(None),)}  # by annotation
RESIZE_KERNEL = "bilinear, antialias, float32 RGB (torch.nn.functional.interpolate)"
TOKBENCH_RESIZE_KERNEL = "bilinear (PIL), uint8, both ways; long side padded with black to a multiple of 32"


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how.

    Args:
        name: of the preset.
        description: one line.
        kind: `"video"` (clips), `"image"` (one image, repeated to one group of frames, Table 9), `"tokbench"` (text and
            faces, Table 3) or `"generation"` (FVD between a folder of samples and the data).
        tables: what of the paper it answers, e.g. `("table1/ucf101",)`; the report puts the paper's numbers beside.
        num_frames: T, the frames that are scored, from the start of a video; None is the whole video.
        frame_interval: every how many-th frame of the data is taken.
        fps: resample to this rate; None keeps the file's.
        size: short side and centre crop in pixels; None keeps the size. For TokBench the short side.
        without_first_frame: load T + 1 frames; models that code the first frame on its own see all of them, the others
            the last T, and all are scored on the last T (Sec. 4.1: "calculated without the first frame").
        metrics: of `METRICS`.
        fvd_frames: at most so many frames of a clip go into the FVD.
        fvd_batch_size: bs of `fvd_batch_mean@bs`.
        sample_list: file with one path a line that the data must have, e.g. UCF-101's `testlist01.txt`.
        expected_samples: how many samples the paper or the field uses; another number is a warning.
        max_samples: take so many.
        sample_seed: draw them at random with this seed instead of taking the first ones.
        posterior: `"mode"` or `"sample"`.
        seed: of sampled posteriors and of decoders that draw noise; every sample has its own stream.
        text_bins, face_bins: TokBench's edges of small, medium and large.

    Raises:
        ValueError: for a field that makes no sense, naming it.
    """

    name: str
    description: str = ""
    kind: str = "video"
    tables: tuple[str, ...] = ()
    num_frames: int | None = 16
    frame_interval: int = 1
    fps: float | None = None
    size: int | None = 256
    without_first_frame: bool = True
    metrics: tuple[str, ...] = METRICS
    fvd_frames: int = 16
    fvd_batch_size: int = 2
    sample_list: str | None = None
    expected_samples: int | None = None
    max_samples: int | None = None
    sample_seed: int | None = None
    posterior: str = "mode"
    seed: int = 0
    text_bins: tuple[float, ...] = ()
    face_bins: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        _check_choice("kind", self.kind, KINDS)
        _check_choice("posterior", self.posterior, ("mode", "sample"))
        for metric in self.metrics:
            _check_choice("metrics", metric, METRICS)
        least = {"num_frames": 1, "size": 1, "fps": 1e-6, "max_samples": 1, "expected_samples": 1}
        for name, smallest in {**least, "frame_interval": 1, "fvd_frames": 1, "fvd_batch_size": 2}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} is {value} in protocol {self.name!r}, but it must be at least {smallest}")
        if self.fps is not None and self.frame_interval != 1:
            raise ValueError(
                f"fps is {self.fps} and frame_interval {self.frame_interval} in protocol {self.name!r}, but they exclude "
                "each other; keep one of them"
            )
        self._check_kind()

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value, annotation = getattr(self, field.name), str(field.type)
            if annotation.startswith("tuple") and isinstance(value, (list, tuple)):
                object.__setattr__(self, field.name, tuple(value))
                items, kinds = tuple(value), _KINDS[annotation.removeprefix("tuple[").removesuffix(", ...]")]
            else:
                items, kinds = (value,), sum((_KINDS.get(kind, ()) for kind in annotation.split(" | ")), ())
            if not all(isinstance(item, kinds) and (bool in kinds or not isinstance(item, bool)) for item in items):
                raise ValueError(
                    f"{field.name} is {value!r} in protocol {self.name!r}, but must be {annotation}; correct it"
                )

    def _check_kind(self) -> None:
        if self.kind == "tokbench":
            for name in ("text_bins", "face_bins"):
                edges = getattr(self, name)
                if len(edges) != 4 or list(edges) != sorted(set(edges)):
                    raise ValueError(
                        f"{name} is {edges} in protocol {self.name!r}, but TokBench has three bins: give four rising edges"
                    )
            if self.size is None:
                raise ValueError(f"size is None in protocol {self.name!r}, but TokBench needs the short side; set it")
        if self.kind == "image" and set(self.metrics) - set(FRAME_METRICS):
            raise ValueError(
                f"metrics are {self.metrics} in protocol {self.name!r}, but images have only {', '.join(FRAME_METRICS)}; "
                "remove the others"
            )
        if self.kind == "generation" and self.metrics != ("fvd",):
            raise ValueError(f"metrics are {self.metrics} in protocol {self.name!r}, but generation has fvd alone; set it")

    @property
    def clip_frames(self) -> int | None:
        """Frames read from a video: T, or T + 1 when the first is not scored."""
        if self.num_frames is None:
            return None
        return self.num_frames + (1 if self.without_first_frame and self.kind == "video" else 0)

    @property
    def resize_kernel(self) -> str:
        """How frames reach `size`, in words, for the result file."""
        return TOKBENCH_RESIZE_KERNEL if self.kind == "tokbench" else RESIZE_KERNEL

    def to_dict(self) -> dict[str, Any]:
        """All fields and the resize kernel, as plain JSON types."""
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}
        return {**fields, "resize_kernel": self.resize_kernel}


def protocol_names() -> list[str]:
    """The presets, sorted."""
    folder = resources.files(__package__) / "protocols"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_protocol(name: str, overrides: Mapping[str, Any] | None = None) -> Protocol:
    """A preset by name, or a YAML file by path, with some fields replaced.

    Args:
        name: a preset's name, or a path that ends in `.yaml`.
        overrides: fields to replace. A protocol that was changed is called `NAME (changed)`, so that its results are not
            taken for the preset's.

    Raises:
        ValueError: for an unknown name or field, or a value that makes no sense.
        ImportError: if PyYAML is missing.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            text = read_text(Path(name))
        except ValueError as error:
            raise ValueError(f"protocol: {error}; pass a .yaml file") from error
    elif name in protocol_names():
        text = (resources.files(__package__) / "protocols" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"protocol is {name!r}, but it must be a .yaml file or one of {', '.join(protocol_names())}; choose one"
        )
    fields = parse_yaml(text, f"protocol {name!r}", "eval")
    if not isinstance(fields, dict):
        raise ValueError(f"protocol {name!r} holds {type(fields).__name__}, but it must be a mapping of fields")
    known = {field.name for field in dataclasses.fields(Protocol)}
    for key in (*fields, *(overrides or {})):
        if key not in known:
            raise ValueError(f"protocol {name!r} has the field {key!r}, but there are only {', '.join(sorted(known))}")
    fields.setdefault("name", Path(name).stem)
    preset = Protocol(**fields)
    if not overrides:
        return preset
    changed = dataclasses.replace(preset, **overrides)
    return preset if changed == preset else dataclasses.replace(changed, name=f"{preset.name} (changed)")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} has {value!r}, but it must be one of {', '.join(allowed)}; choose one")
