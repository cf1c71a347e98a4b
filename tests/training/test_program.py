"""Training programs as people run them: `vcvae train`, help, mistakes, the first lines, progress, the last line."""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_models import tiny_vae
from torch._utils import ExceptionWrapper
from typer.testing import CliRunner
from vae_runs import STAGE_1, STAGE_2

from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.training import (
    image_vae_options,
    latte_options,
    log,
    machine,
    program,
    vcvae,
    vcvae_options,
)
from vc_vae_diffusers.training.data import DataError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ----------------------------------------------------------------------------------------------- options and mistakes


@pytest.mark.parametrize(
    ("name", "options"), [("vcvae", vcvae_options), ("latte", latte_options), ("image_vae", image_vae_options)]
)
def test_help_explains_every_option_and_its_default(name, options, capsys):
    with pytest.raises(SystemExit):
        program.main(name, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for group in dataclasses.fields(options.Config):
        for field in dataclasses.fields(group.default_factory):
            assert f"--{field.name}" in text
            assert len(field.metadata["help"]) > 5
            shown = " ".join((field.metadata["help"] % ()).split())
            assert shown in text, field.name
    assert "(default: 1000)" in text or "(default: 500)" in text or "(default: 10000)" in text


@pytest.mark.parametrize("name", ["vcvae", "latte", "image_vae"])
def test_help_is_laid_out_for_people(name, capsys):
    with pytest.raises(SystemExit):
        program.main(name, ["--help"])
    first, *lines = capsys.readouterr().out.splitlines()
    command = f"vcvae train {name.replace('_', '-')}"
    assert first == f"usage: {command} [--config FILE.yaml] [--OPTION VALUE ...]"
    assert any(line.strip().startswith(f"{command} --") for line in lines)  # an example, on a line of its own
    assert not any("default: None" in line or "default: []" in line for line in lines)
    assert all("the same as --" in line for line in lines if line.lstrip().startswith("--no_"))
    (steps,) = (line for line in lines if line.lstrip().startswith("--learning_rate"))
    assert "--learning-rate" not in steps


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--step", "3"], "Error: --step is no option; did you mean --steps?"),
        ([], "Error: --data is required; --help lists all options"),
        (
            ["--data", "x", "--output", "y"],
            "Error: give exactly one of --model, --from_image_vae and --model_config; there is none of them",
        ),
    ],
)
def test_a_mistake_is_one_line_of_one_process(argv, said, capsys, monkeypatch):
    assert program.run("vcvae", argv) == 1
    assert capsys.readouterr().err == said + "\n"
    monkeypatch.setenv("RANK", "1")
    assert program.run("vcvae", argv) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        ("vcvae", "learning_rate", "nan", "--learning_rate is nan, but must be a finite number from 0 on"),
        ("vcvae", "kl_weight", "-1", "--kl_weight is -1.0, but must be a finite number from 0 on"),
        ("vcvae", "seed", str(2**31), "--seed is 2147483648, but must be"),
        ("vcvae", "ema_decay", "1.5", "--ema_decay is 1.5, but must be at most 1"),
        ("vcvae", "max_grad_norm", "0", "--max_grad_norm is 0, which leaves nothing to learn from"),
        ("vcvae", "discriminator_layers", "0", "--discriminator_layers is 0, but must be at least 1"),
        ("vcvae", "validation_frames", "0", "--validation_frames is 0, but must be at least 1"),
        ("latte", "fps", "inf", "--fps is inf, but must be a finite number"),
        ("latte", "class_dropout_prob", "2", "--class_dropout_prob is 2.0, but must be at most 1"),
        ("latte", "sampling_steps", "0", "--sampling_steps is 0, but must be at least 1"),
        ("latte", "sample_fps", "0", "--sample_fps is 0, but must be above 0"),
        ("image_vae", "channels", "8", "--channels are [8], but must be four multiples of --norm_num_groups, 16"),
        ("image_vae", "sizes", "60", "--sizes are [60], but must be multiples of 8 pixels"),
        ("image_vae", "validation_size", "4", "--validation_size is 4, but must be a multiple of 8"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(name, option, value, said, capsys):
    required = {"vcvae": ["--model", "x"], "latte": ["--vae", "x"], "image_vae": ["--clips", "x"]}[name]
    assert program.run(name, ["--data", "x", "--output", "y", *required, f"--{option}", value]) == 1
    assert capsys.readouterr().err.startswith(f"Error: {said}")


def test_what_happens_to_one_process_is_said_by_it(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for error, said in (
        (OSError("the disk is gone"), "Error on process 1: the disk is gone\n"),
        (DataError("nothing to read"), "Error on process 1: nothing to read\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "Error on process 1: CUDA out of memory. Make micro-batches"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"), "Error on process 1: another process of"),
        (torch.distributed.DistBackendError("NCCL error"), "Error on process 1: another process of this run has ended"),
        (RuntimeError("can't start new thread"), "Error on process 1: out of memory, as it seems: can't start new thread."),
        (MemoryError(), "Error on process 1: out of memory. Make micro-batches"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "Error on process 1: DataLoader worker (pid 7) is",
        ),
    ):
        monkeypatch.setattr(program, "main", Mock(side_effect=error))
        assert program.run("vcvae", []) == 1
        assert capsys.readouterr().err.startswith(said)
    monkeypatch.setattr(program, "main", Mock(side_effect=KeyboardInterrupt))
    assert program.run("vcvae", []) == 130
    monkeypatch.setenv("RANK", "0")
    assert program.run("vcvae", []) == 130
    said = "Error: interrupted; the same command goes on from the last checkpoint, if there is one\n"
    assert capsys.readouterr().err == said
    for stopped_by, code in ((0, 0), (2, 130), (15, 143)):
        monkeypatch.setattr(program, "main", Mock(return_value=stopped_by))
        assert program.run("vcvae", []) == code
    monkeypatch.setattr(program, "main", Mock(side_effect=KeyError("a bug")))
    with pytest.raises(KeyError):
        program.run("vcvae", [])


@pytest.mark.parametrize(
    ("cause", "error", "said"),
    [
        (DataError("no frame"), DataError("no clip\nat all"), "Error: no clip\nat all\n"),
        (KeyError("x"), ValueError("a: b"), "Error: a: b\n"),
        (None, MemoryError("no memory is left for a.mp4"), "Error: no memory is left for a.mp4. Use fewer --num_workers"),
        (
            None,
            RuntimeError("can't start new thread"),
            "Error: out of memory, as it seems: can't start new thread. Use fewer",
        ),
    ],
)
def test_an_error_of_a_worker_is_said_as_it_was_raised_there(cause, error, said, monkeypatch, capsys):
    def fail(*_) -> None:
        try:
            try:
                raise cause or error
            except type(cause or error) as first:
                raise error from (first if cause else None)
        except Exception:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        wrapped.reraise()

    monkeypatch.setattr(program, "main", fail)
    assert program.run("vcvae", []) == 1
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset, to run on one processor")
def test_clips_that_serve_no_bucket_are_one_line_though_workers_read_them(data, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "vc_vae_diffusers", "train", "vcvae", "--model", tmp_path / "model", "--data", data]
    command += ["--output", tmp_path / "out", "--buckets", "size=512 frames=8 fps=24 batch=1", "--num_workers", "2"]
    command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), *map(str, command), "--cpu", "--tracker", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert "--num_workers is 2, more than the processors (1)" in said[-2]
    assert said[-1].startswith("Error: none of 100 files in a row serves bucket 512x512x8@24: ")
    assert said[-1].endswith("give --buckets with fewer or smaller frames, or other videos")
    assert all(" WARNING " in line for line in said[:-1])


def test_the_command_line_has_the_programs():
    runner = CliRunner()
    shown = runner.invoke(app, ["train", "--help"])
    assert shown.exit_code == 0
    assert all(name in shown.output for name in ("vcvae", "image-vae", "latte"))
    assert "--num_train_timesteps" in runner.invoke(app, ["train", "latte", "--help"]).output
    assert "--frame_stride" in runner.invoke(app, ["train", "image-vae", "--help"]).output
    wrong = runner.invoke(app, ["train", "vcvae", "--stepps", "3"])
    assert wrong.exit_code == 1
    assert "--stepps is no option; did you mean --steps?" in wrong.output


@pytest.mark.parametrize("name", ["vcvae", "latte", "image_vae"])
def test_the_scripts_for_accelerate_launch_are_the_same_programs(name):
    script = (EXAMPLES / f"train_{name}.py").read_text()
    assert f'sys.exit(program.run("{name}", sys.argv[1:]))' in script


def test_options_are_read_without_pytorch():
    code = "import sys; from vc_vae_diffusers.training import program; program.run('latte', ['--step', '3']); "
    code += "print({'torch', 'diffusers', 'accelerate', 'av'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_script_runs_and_reports_in_one_line():
    done = subprocess.run([sys.executable, str(EXAMPLES / "train_vcvae.py"), "--step", "3"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: --step is no option; did you mean --steps?\n"


# ------------------------------------------------------------------------------------------------ what a run says


def test_a_run_says_what_it_is_and_where_the_model_lies(arguments, tmp_path, caplog, monkeypatch, capsys):
    monkeypatch.setattr(log, "is_terminal", lambda: True)
    with caplog.at_level(logging.INFO):
        done = CliRunner().invoke(app, ["train", "vcvae", *arguments(tmp_path / "out", *STAGE_2, "--steps", "2")])
    assert done.exit_code == 0, done.output
    said = "\n".join(caplog.messages)
    model = vcvae.build_vae(vcvae_options.ModelConfig(model=str(tmp_path / "out" / "vae")))
    assert f"AutoencoderKLVCVAE, {model.num_parameters():,} parameters, {model.num_parameters():,} of them trained" in said
    assert "4 files to train on, 1 held out to validate on" in said
    assert "2 on 1 process, cpu, float32" in said
    assert "bucket 1  32x32x8@24: 33.3% of the steps, 4 clips" in said
    assert "memory    bucket 32x32x8@24: 2 at once in about" in said
    assert "likely to be killed" not in said
    assert f"the model is in {tmp_path / 'out' / 'vae'}" in caplog.messages[-1]
    shown = done.stderr.replace("\r", "\n")
    assert "2/2" in shown
    assert "frames/s" in shown
    assert " left" in shown
    assert "loss 0." in shown


@pytest.mark.parametrize(("terminal", "more"), [(False, []), (True, ["--progress", "false"])])
def test_no_bar_without_a_terminal_or_when_unwanted(arguments, tmp_path, monkeypatch, capsys, terminal, more):
    monkeypatch.setattr(log, "is_terminal", lambda: terminal)
    program.main("vcvae", arguments(tmp_path / "out", *STAGE_1, "--steps", "1", *more))
    assert "frames/s" not in capsys.readouterr().err


def test_deterministic_training_sets_what_cublas_needs(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    run = vcvae_options.RunConfig(output=str(tmp_path), cpu=True, tracker="none", deterministic=True)
    try:
        machine.prepare(run)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        machine.prepare(run)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_log_levels_and_folders_are_set_for_the_main_process(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "choose_precision", lambda name, device: "no")
    config = vcvae_options.RunConfig(output=str(tmp_path / "new" / "run"), cpu=True, tracker="none")
    accelerator = machine.prepare(config)
    assert (tmp_path / "new" / "run").is_dir()
    assert (accelerator.device.type, accelerator.num_processes) == ("cpu", 1)
