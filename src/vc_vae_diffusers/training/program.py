"""How a training program is run from a command line: mistakes are one line, and not a traceback of every process.

Options are read first, by modules that need no PyTorch: a mistake there is said at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from collections.abc import Sequence

from ..names import memory_short, peer_gone, told

# What a user can put right. Every process has the first ones; the others, some by name, may happen to one alone.
_OF_ALL = (ValueError, ImportError)
_OF_ONE = {"DataError", "CheckpointError", "NonFiniteError", "VideoWriteError"}
_DEAD_WORKER = "DataLoader worker"  # how PyTorch begins what it says of one
# What PyTorch makes of an error in one: its traceback, then what it said.
_IN_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\n.*\n(?:[\w.]+\.)?\1: (.*)", re.DOTALL)


def main(name: str, argv: Sequence[str]) -> int:
    """Read the options of the program ``name`` (vcvae, latte, image_vae) and train by them, to the end or a signal."""
    config = importlib.import_module(f"{__package__}.{name}_options").Config.parse(argv)
    return importlib.import_module(f"{__package__}.{name}").train(config)


def run(name: str, argv: Sequence[str]) -> int:
    """Do :func:`main` and return the exit code: 1 for what a user can put right, 130 or 143 when stopped by a signal."""
    rank = os.environ.get("RANK", "0")
    try:
        stopped_by = main(name, argv)
    except KeyboardInterrupt:
        if rank == "0":
            print("Error: interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except Exception as raised:
        error = _as_raised(raised)
        of_all = isinstance(error, _OF_ALL)
        if not of_all and not _may_happen_to_one(error):
            raise
        if rank == "0" or not of_all:
            print(
                f"Error{'' if rank == '0' else f' on process {rank}'}: {_message(error, error is not raised)}",
                file=sys.stderr,
            )
    else:
        return 128 + stopped_by if stopped_by else 0
    gc.collect()  # an error of a worker holds the workers in a cycle; ended at exit only, they would print a traceback
    return 1


def _as_raised(error: Exception) -> Exception:
    """An error of a worker as it was there, without the traceback; every other error as it is."""
    caught = _IN_WORKER.match(str(error))
    return type(error)(caught[2].strip()) if caught else error


def _may_happen_to_one(error: Exception) -> bool:
    known = isinstance(error, OSError) or type(error).__name__ in _OF_ONE
    others = memory_short(error) or peer_gone(error)
    return known or others is not None or str(error).startswith(_DEAD_WORKER)


def _message(error: Exception, in_worker: bool) -> str:
    if short := memory_short(error):
        remedy = (
            "Use fewer --num_workers" if in_worker else "Make micro-batches smaller, or use --gradient_checkpointing true"
        )
        return f"{short}. {remedy}."
    if str(error).startswith(_DEAD_WORKER):
        return (
            f"{str(error).splitlines()[0].rstrip('. ')}. If memory ran out, use fewer --num_workers; the same call goes on."
        )
    return peer_gone(error) or told(error)
