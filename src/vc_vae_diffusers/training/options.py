"""Options of training programs: dataclasses whose values come from the defaults, a YAML file, then the command line.

Reading them needs no PyTorch, so that a mistake is said at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from transformers import HfArgumentParser

from ..extras import parse_yaml
from ..files import read_text

Tracker = Literal["tensorboard", "trackio", "wandb", "none"]
# Those of diffusers that need nothing but the numbers of steps.
Schedule = Literal["constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"]


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its line in ``--help``; required ones are None until :meth:`Config.check`."""
    metadata = {"help": text.replace("%", "%%")}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class OptimConfig:
    """How every program optimises; each has defaults of its own."""

    steps: int = option(500_000, "optimizer steps")
    learning_rate: float = option(1e-5, "of the model")
    lr_scheduler: Schedule = option("constant_with_warmup", "of the learning rate, diffusers' get_scheduler")
    warmup_steps: int = option(0, "steps over which the learning rate rises")
    adam_beta1: float = option(0.9, "AdamW's decay of the gradients' mean")
    adam_beta2: float = option(0.999, "AdamW's decay of their squares' mean")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    ema_decay: float = option(0.999, "of the weights' moving average, which is what is validated and saved")


@dataclass
class RunConfig:
    """How every program runs."""

    output: str = option(None, "folder of everything that the run writes (required)")
    resume: bool = option(True, "go on from the last checkpoint under output; false refuses a folder that has some")
    seed: int = option(0, "of weights, clips, crops and noise")
    mixed_precision: Literal["auto", "no", "bf16"] = option(
        "auto", "autocast, the weights stay float32; auto: bf16 where the hardware has it, on a GPU or a CPU"
    )
    cpu: bool = option(False, "train on the CPU though there is a GPU")
    num_threads: int = option(0, "CPU threads of this process; 0 leaves torch's choice")
    deterministic: bool = option(False, "deterministic CUDA kernels, for exact resume on GPUs")
    checkpoint_every: int = option(1000, "steps between checkpoints")
    keep_checkpoints: int = option(2, "how many of the last ones stay, at least 1")
    log_every: int = option(10, "steps between rows of OUTPUT/log.jsonl")
    progress: bool = option(True, "a progress bar, where stderr is a terminal")
    tracker: Tracker = option("tensorboard", "where figures go besides log.jsonl")


@dataclass
class Config:
    """The groups of options of one program, as attributes: ``config.run.output``."""

    if TYPE_CHECKING:  # in each program's own order
        optim: OptimConfig
        run: RunConfig

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Config:
        """Read the options, and check them by :meth:`check`.

        Raises:
            ValueError: in one line, for unknown options, wrong values and what :meth:`check` refuses.
        """
        groups: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(cls)}
        module = sys.modules[cls.__module__]
        parser = _Parser(
            list(groups.values()),
            prog=f"vcvae train {module.__name__.rpartition('.')[2].removesuffix('_options').replace('_', '-')}",
            usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]",
            description=module.__doc__,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        parser.add_argument("--config", type=Path, help="YAML file of these options; the command line wins over it")
        base = parser.take_yaml(argv)
        *values, left = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        parser.refuse(left)
        config = cls(**dict(zip(groups, values, strict=False)))
        config.expand(base)
        config.check()
        return config

    def flat(self) -> dict[str, Any]:
        """All options in one dictionary, as they stand in a YAML file."""
        return {key: value for part in dataclasses.asdict(self).values() for key, value in part.items()}

    def expand(self, base: Path) -> None:
        """Replace the ``@LIST`` entries of the data's patterns; lists are relative to ``base``."""
        data = getattr(self, "data", None)
        for name in ("include", "exclude", "holdout"):
            if any(pattern.startswith("@") for pattern in getattr(data, name, ())):
                from .data import expand_patterns  # which loads PyTorch

                setattr(data, name, expand_patterns(getattr(data, name), base))

    def check(self) -> None:
        """Refuse what cannot be; programs add their own rules."""
        self.require("output")
        self.check_numbers()
        self.at_least_one("steps", "checkpoint_every", "keep_checkpoints", "log_every")
        self.at_most_one("adam_beta1", "adam_beta2", "ema_decay")
        if self.optim.max_grad_norm == 0:
            raise ValueError("--max_grad_norm is 0, which leaves nothing to learn from; use a large one for no limit")

    def require(self, *names: str) -> None:
        """Raises ValueError for the first of the options that is not given."""
        for name in names:
            if self.flat()[name] is None:
                raise ValueError(f"--{name} is required; --help lists all options")

    def require_json(self, name: str) -> None:
        """Raises ValueError if the text of the option is no JSON object."""
        text = self.flat()[name]
        try:
            if isinstance(json.loads(text), dict):
                return
        except ValueError:
            pass
        raise ValueError(f"--{name} is {text!r}, but must be a JSON object in quotes, as '{{\"key\": 1}}'")

    def check_numbers(self) -> None:
        """Raises ValueError for the first number that is negative, infinite or undefined, or too large to count with."""
        for name, value in self.flat().items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not 0 <= number < (2**31 if isinstance(number, int) else math.inf):
                    raise ValueError(f"--{name} is {number}, but must be a finite number from 0 on, a whole one below 2^31")

    def at_most_one(self, *names: str) -> None:
        """Raises ValueError for the first of the options that is above 1."""
        for name in names:
            if self.flat()[name] > 1:
                raise ValueError(f"--{name} is {self.flat()[name]}, but must be at most 1")

    def at_least_one(self, *names: str) -> None:
        """Raises ValueError for the first of the options that is below 1."""
        for name in names:
            if self.flat()[name] < 1:
                raise ValueError(f"--{name} is {self.flat()[name]}, but must be at least 1")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they were written, every option by one name, defaults where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.const is False:
            return f"the same as --{action.dest} false"
        return action.help if action.default in (None, []) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        plain = copy(action)
        spelled = [name for name in action.option_strings if "-" not in name[2:]]  # --from-image-vae is taken as well
        plain.option_strings = spelled or action.option_strings
        return super()._format_action_invocation(plain)


class _Parser(HfArgumentParser):
    """Options spelled out, mistakes as one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists all options")

    def refuse(self, left: Sequence[str]) -> None:
        """Raises ValueError for what is no option, with the one that was meant."""
        if left:
            known = [name for action in self._actions for name in action.option_strings]
            raise ValueError(f"{left[0]} is no option{_meant(left[0].split('=')[0], known)}")

    def take_yaml(self, argv: Sequence[str]) -> Path:
        """Make the values of the file of ``--config`` the defaults, and return its folder."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", type=Path)
        file = first.parse_known_args(argv)[0].config
        if file is None:
            return Path()
        values = _read_yaml(file)
        known = {action.dest: action for action in reversed(self._actions)}  # --flip, not --no_flip
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{file}: {name} is no option{_meant(str(name), known)}")
            values[name] = _as_declared(value, known[name], f"{file}: {name}")
        self.set_defaults(**values)
        return file.parent


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; --help lists all options"


def _read_yaml(file: Path) -> dict[Any, Any]:
    values = parse_yaml(read_text(file), str(file), "train") or {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; write one option a line, as steps: 1000")
    return values


def _as_declared(value: Any, action: argparse.Action, where: str) -> Any:
    """A value of a YAML file as the command line would give it: to YAML 1e-5 is text and no is false; dictionaries are JSON.

    Raises:
        ValueError: for what the option cannot be, beginning with ``where``.
    """
    if action.nargs in ("+", "*"):
        return [_as_one(item, action, where) for item in (value if isinstance(value, list) else [value])]
    if value is None and action.default is None:
        return None
    return _as_one(value, action, where)


def _as_one(value: Any, action: argparse.Action, where: str) -> Any:
    if action.choices and value is False:
        value = "no"
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    kind = action.type if callable(action.type) else str
    try:
        if value is None or isinstance(value, list):
            raise ValueError
        converted = kind(text)
        if action.choices and converted not in action.choices:
            raise ValueError
    except (ValueError, argparse.ArgumentTypeError) as error:
        names = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}
        wanted = (
            "one of " + ", ".join(action.choices)
            if action.choices
            else names.get(getattr(kind, "__name__", ""), "one value")
        )
        raise ValueError(f"{where}: {value!r} must be {wanted}") from error
    return converted
