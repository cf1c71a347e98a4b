"""What a scale of the ablations fixes: sizes, steps, rates, seeds; read from `small.yaml` or `paper.yaml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ClipSettings:
    """Which clips are trained on, chosen by and measured on, and how they are cut."""

    train: str  # list file or "FILE:SECTION", relative to the YAML file, or to --data where it is not found there
    validation: str  # likewise: learning rates are chosen on these, nothing is reported on them
    test: str | None  # likewise; None is every clip of --data in neither of the others
    size: int  # side of the square clips
    cache_short_side: int | None  # decoded once to this short side and kept as uint8; None reads the files as it goes
    fps: tuple[float, ...]  # a training clip draws one of these rates; a slower video keeps its own
    window_fps: tuple[float, ...]  # of the test windows of a clip, one window a rate
    window_side: tuple[int, ...]  # short side to which each test window is resized before the centre crop
    test_frames: int  # of a test window; models of 1 + r_t k frames see one more in front, which is not scored


@dataclass(frozen=True)
class ImageSettings:
    """The image VAEs: trained here (steps), or given (strong, weak)."""

    network: dict[str, Any]  # options of AutoencoderKL
    steps: int  # of the stronger
    weak_steps: int  # of the weaker: the same run, earlier
    batch: int
    learning_rate: float
    ema_decay: float
    kl_weight: float
    strong: str | None = None  # folder or hub id, instead of training; "ID:SUBFOLDER" names a subfolder
    weak: str | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """One run. Clips and noise are functions of seed and step alone, so that arms of one seed are pairs."""

    steps: int
    sweep_steps: int  # after these the rates of a sweep are compared; the best one goes on
    rates: tuple[float, ...]  # of the sweep; it grows by a neighbour while the best lies at its edge
    warmup_steps: int
    frames: int  # of a training clip at 4x8x8
    batch: int
    long_frames: int  # at 8x8x8
    long_batch: int
    ema_decay: float
    lpips_weight: float
    lpips_frames: int  # frames of a batch drawn for LPIPS at every step
    kl_weight: float
    max_grad_norm: float
    curve: tuple[int, ...]  # steps at which the test clips' first windows are measured
    checkpoint_every: int
    gradients_every: int  # steps between two looks at the gradients of the slices
    autocast: bool = False  # bfloat16
    gradient_checkpointing: bool = False
    loader_workers: int = 0


@dataclass(frozen=True)
class Settings:
    """A scale.

    Attributes:
        seeds: of the runs that are trained and reported.
        sweep_seed: of the runs that decide the rates.
    """

    name: str
    seeds: tuple[int, ...]
    clips: ClipSettings
    image: ImageSettings
    training: TrainingSettings
    sweep_seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING)
    if unknown or missing:
        raise ValueError(f"{where}: unknown settings {unknown}, missing settings {missing}; see {kind.__name__}")
    tuples = {name for name, field in fields.items() if str(field.type).startswith("tuple")}
    floats = {name for name, field in fields.items() if str(field.type) == "float"}
    for name in values:
        if name in floats:
            values[name] = float(values[name])  # YAML reads 1e-5 as text
        elif name in tuples:
            number = float if "float" in str(fields[name].type) else int
            values[name] = tuple(number(value) for value in values[name])
    return kind(**values)


def load_settings(scale: str, seeds: Sequence[int] = ()) -> Settings:
    """Read a scale by name (`small`, `paper`) or from a YAML file, with its own seeds or with others.

    Raises:
        ValueError: for a scale that does not exist, and for unknown or missing settings.
    """
    path = Path(scale) if scale.endswith((".yaml", ".yml")) else FOLDER / f"{scale}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        raise ValueError(f"scale is {scale!r}, but there is no {path}: pass one of {known} or a YAML file")
    values = yaml.safe_load(path.read_text())
    parts = {"clips": ClipSettings, "image": ImageSettings, "training": TrainingSettings}
    for name, kind in parts.items():
        values[name] = _build(kind, values.get(name) or {}, f"{path}, {name}")
    values["name"] = path.stem
    settings = _build(Settings, values, str(path))
    return dataclasses.replace(settings, seeds=tuple(seeds)) if seeds else settings
