"""What a run finds: processes, device, precision, and the memory that a step has."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import logging as verbosity

from ..extras import install_hint
from ..hardware import has_bfloat16
from ..processes import processes
from .checkpoints import checkpoint_to_resume
from .options import RunConfig

logger = logging.getLogger(__name__)


def prepare(run: RunConfig) -> Accelerator:
    """Join the processes of a run and set up logging, threads, precision and the tracker; refuse what cannot work.

    Raises:
        ValueError: if the output is another run's.
        ImportError: for a tracker that is not installed, which accelerate would pass over.
    """
    tracker = None if run.tracker == "none" else run.tracker
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        remedy = install_hint("train") if tracker == "tensorboard" else f"pip install {tracker}"
        raise ImportError(f"tracker={tracker!r} is not installed: {remedy}, or choose --tracker none")
    checkpoint_to_resume(checkpoints_of(run), run.resume)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses matrix products on GPUs
        torch.use_deterministic_algorithms(True)
    state = processes("cpu" if run.cpu else None)
    _log(state.is_main_process)
    precision = choose_precision(run.mixed_precision, state.device)
    try:
        Path(run.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: the folder {run.output} cannot be made ({error.strerror}); choose another") from error
    cpu = state.device.type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision=precision, log_with=tracker, project_dir=run.output)


def _log(main: bool) -> None:
    """Records of this package and of diffusers go where the program's others go.

    The main process says how training goes, unless diffusers' verbosity is another than its default: then that holds.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    verbosity.disable_default_handler()
    verbosity.enable_propagation()
    says = main and verbosity.get_verbosity() == logging.WARNING
    logging.getLogger(__package__).setLevel(logging.INFO if says else logging.NOTSET)


def checkpoints_of(run: RunConfig) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run.output) / "checkpoints"


def choose_precision(name: str, device: torch.device) -> str:
    """Return "no" or "bf16", accelerate's names, for one of them or "auto": bfloat16 where the hardware has it. Says which.

    A forced bfloat16 without the hardware is warned of: on a Zen 3 processor a step took thirty times as long.
    """
    able = has_bfloat16(device)
    if name == "auto":
        logger.info(
            "mixed_precision: %s, for %s", *(("bf16", f"{device} has it") if able else ("no", f"{device} lacks bf16"))
        )
        return "bf16" if able else "no"
    if name == "bf16" and not able:
        logger.warning(
            "mixed_precision bf16 is emulated on %s, which has no instructions for it: a step may take thirty times as long "
            "as in float32 (178 s against 6 s on a Zen 3 processor); use --mixed_precision auto",
            device,
        )
    return name
