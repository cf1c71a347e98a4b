"""The paper's claims, tried: train and measure every arm of a suite, side by side and over several seeds.

    python examples/ablations/run.py table4 --data CLIPS_DIR --out runs/ablations
    python examples/ablations/run.py all --data CLIPS_DIR --out runs/ablations --workers 8
    python examples/ablations/run.py all --data CLIPS_DIR --out runs/ablations --report
    python examples/ablations/run.py table4 --data CLIPS_DIR --out runs/ablations --seeds 3    # again, at the rates found

Suites: table2, table4, table5, table6, table8, table9, shootout, why; `all` is all of them. A run that was stopped goes on
when the same command is given again; several such commands may share one OUT. `--report` trains nothing and writes
tables, figures and sentences of what is there to OUT/report; results are small JSON files, OUT/results.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from arms import ARMS, SUITES
from schedule import is_done, is_ready, plan, time_left
from settings import load_settings
from training_runs import Place, Task, run_task

_WAIT = 3.0  # seconds until a worker without work looks again


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=[*SUITES, "all"], metavar="SUITE")
    parser.add_argument("--data", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help="these arms only")
    parser.add_argument("--scale", default="small", help="small, paper, or a YAML file")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=(), help="instead of the scale's; rates stay as they were found"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that train at once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--device", default=None, help="cuda where there is one, else cpu")
    parser.add_argument("--report", action="store_true", help="only report on what is there")
    parser.add_argument(
        "--publish", type=Path, help="with --report: also copy results and pages there, see docs/ablations.md"
    )
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two lines of progress")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.suites = list(SUITES) if "all" in args.suites else list(dict.fromkeys(args.suites))
    return args


def claim(place: Place, suites: list[str], arms: list[str] | None, failed: set[str]) -> tuple[Task, int] | str:
    """The first run that can be had, with its lock; or "wait" or "finished"."""
    waiting = False
    for task in plan(place, suites, arms).tasks:
        if is_done(place, task) or task.run in failed:
            continue
        if not is_ready(place, task):
            waiting = True
            continue
        folder = place.work / task.run
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            waiting = True
            continue
        if is_done(place, task):  # by another worker, since we looked
            os.close(lock)
            continue
        return task, lock
    return "wait" if waiting and not _only_waits_for(place, suites, arms, failed) else "finished"


def _only_waits_for(place: Place, suites: list[str], arms: list[str] | None, failed: set[str]) -> bool:
    """Whether everything that is left needs an image VAE that failed here."""
    left = [task for task in plan(place, suites, arms).tasks if not is_done(place, task) and task.run not in failed]
    return all(not is_ready(place, task) and f"image-s{task.seed}" in failed for task in left)


def work(place: Place, suites: list[str], arms: list[str] | None = None) -> int:
    """Carry out runs until there are none left; returns how many failed."""
    failed: set[str] = set()
    while (claimed := claim(place, suites, arms, failed)) != "finished":
        if claimed == "wait":
            time.sleep(_WAIT)
            continue
        task, lock = claimed
        try:
            run_task(place, task)
        except Exception:
            failed.add(task.run)
            (place.work / task.run / "error.txt").write_text(traceback.format_exc())
            print(f"{task.run} failed, see {place.work / task.run / 'error.txt'}", flush=True)
        finally:
            os.close(lock)
    return len(failed)


def watch(place: Place, args: argparse.Namespace) -> int:
    """Start the workers and tell how far they are until all have ended."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    workers = [subprocess.Popen(command, env=environment) for _ in range(args.workers)]
    try:
        said = 0.0
        while any(worker.poll() is None for worker in workers):
            if time.monotonic() - said >= args.every:
                said = time.monotonic()
                print(progress_line(place, args), flush=True)
            time.sleep(0.5)
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()
    return sum(worker.wait() != 0 for worker in workers)


def progress_line(place: Place, args: argparse.Namespace) -> str:
    done, total, seconds = time_left(place, args.suites, args.arms)
    left = "" if seconds is None else f", {seconds / args.workers / 60:.0f} minutes left at the pace so far"
    return f"{time.strftime('%H:%M:%S')} {done} of {total} steps ({100 * done / max(1, total):.1f} %){left}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(args.threads)
    place = Place(args.data, args.out, load_settings(args.scale, args.seeds), device)
    if args.worker:
        return 1 if work(place, args.suites, args.arms) else 0
    failed = 0 if args.report else watch(place, args)
    from reporting import publish, report

    print(report(place, args.suites))
    if args.publish is not None:
        publish(place, args.suites, args.publish)
    return failed


if __name__ == "__main__":
    sys.exit(main())
