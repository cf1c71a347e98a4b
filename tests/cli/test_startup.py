"""What starting loads: help, the version, shell completion and mistakes in options need no PyTorch."""

import json
import os
import signal
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "av", "PIL", "huggingface_hub", "safetensors"}

CODE = """
import json, sys
from vc_vae_diffusers.cli import main
sys.argv = ["vcvae", *{arguments!r}]
try:
    main()
except SystemExit as end:
    code = end.code or 0
else:
    code = 0
sys.stdout.flush()
print("\\n" + json.dumps([code, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""


def start(*arguments: object, **variables: str) -> tuple[int, set[str], str]:
    """Exit code, top-level modules that are loaded at the end, and what was printed."""
    code = CODE.format(arguments=[str(argument) for argument in arguments])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables}, check=True
    )
    *_, last = done.stdout.splitlines()
    exit_code, modules = json.loads(last)
    return exit_code, set(modules), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "reconstruct"),
        (["-h"], 0, "reconstruct"),
        (["--version"], 0, "vcvae 0."),
        ([], 2, "reconstruct"),
        (["reconstruct", "--help"], 0, "--groups-per-chunk"),
        (["evaluate", "-h"], 0, "tokbench-video-256"),
        (["report", "--help"], 0, "table1/webvid"),
        (["plan", "--heigth", "1"], 2, "No such option"),
        (["info", "../nope"], 1, "neither a folder here nor a hub id"),
        (["reconstruct", "nope.mp4", "out.mp4"], 1, "IN: nope.mp4 does not exist"),
        (["reconstruct", __file__, "out.mp4", "--dtype", "int8"], 1, "--dtype: 'int8'"),
        (["reconstruct", __file__, "out.mp3"], 1, "must be a video here"),
        (["reconstruct", __file__, __file__], 1, "is IN as well"),
        (["plan", "--height", "1", "--width", "1", "--memory", "8"], 1, "--memory: 8 has no unit; say 8GB"),
        (["stats", "--data", ".", "--write"], 1, "--write: would change the model that is part of the installed package"),
        (["stats", "--data", ".", "--dtype", "auto"], 1, "--dtype: auto would let the machine decide a number"),
        (["evaluate", "--model", "original", "--data", ".", "--out", "x", "--dtype", "auto"], 1, "let the machine decide"),
        (["evaluate", "--model", "original", "--data", "nope", "--out", "x.json"], 2, "'--data'"),
        (["evaluate", "--model", "original", "--data", ".", "--out", "x.json", "--metrics", "psmr"], 1, "--metrics: psmr"),
        (["report", "nope.json"], 2, "nope.json"),
        (["report", __file__, "--paper", "table2"], 1, "--paper: table2"),
    ],
)
def test_help_and_mistakes_load_nothing_heavy(arguments, code, text):
    exit_code, modules, printed = start(*arguments, COLUMNS="200")
    assert text in printed
    assert exit_code == code, printed
    assert not modules & HEAVY


def test_info_reads_files_without_pytorch():
    exit_code, modules, printed = start("info", COLUMNS="200")
    assert exit_code == 0
    assert "4x8x8" in printed
    assert not modules & {"torch", "diffusers", "transformers", "av"}


def test_shells_complete_commands_and_values():
    for words, expected in (("vcvae rec", "reconstruct"), ("vcvae evaluate --protocol ucf", "ucf101")):
        variables = {"_VCVAE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        _, modules, printed = start(**variables)
        assert expected in printed.splitlines()
        assert not modules & HEAVY


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_an_interrupt_while_python_starts_is_one_line(tmp_path):
    """The interrupt comes from the import itself, so that it surely comes during it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == os.environ['AT']:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    for at in ("typer", "torch"):
        environment = {**os.environ, "AT": at, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        done = subprocess.run(
            [sys.executable, "-m", "vc_vae_diffusers", "demo", "--out", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.stderr.splitlines()[-1].startswith("Error: interrupted"), done.stderr
        assert "Traceback" not in done.stderr
        assert done.returncode == 130


def test_the_app_says_which_extra_it_needs():
    code = "import sys; sys.modules['gradio'] = None; from vc_vae_diffusers.cli import main; sys.argv[1:] = ['app']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'the app needs gradio: pip install ".[app]"' in done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_second_sigterm_does_not_cut_the_cleaning_up_short():
    program = (
        "import os, signal\n"
        "from vc_vae_diffusers.cli import stopping\n"
        "try:\n"
        "    with stopping.Stopping():\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        finally:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "            print('cleaned', flush=True)\n"
        "except stopping.Terminated:\n"
        "    print('terminated', signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.splitlines() == ["cleaned", "terminated True"], run.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_second_interrupt_ends_at_once_and_removes_what_is_unfinished(tmp_path):
    program = (
        "import os, pathlib, signal, sys\n"
        "from vc_vae_diffusers import files\n"
        "from vc_vae_diffusers.cli import stopping\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with stopping.Stopping(), files.scratch_folder(sys.argv[1]), files.whole_file(sys.argv[1] + '/a.mp4') as partial:\n"
        "    partial.write_text('half')\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print(len(os.listdir(sys.argv[1])), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('still here')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.returncode) == ("2\n", 130), run.stderr
    assert run.stderr.strip() == "Error: interrupted twice; no partial output was left"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_an_interrupt_that_foreign_code_loses_or_renames_is_told_as_one(tmp_path):
    program = (
        "import os, signal, sys, time, weakref\n"
        "from vc_vae_diffusers import cli\n"
        "from vc_vae_diffusers.cli import app, info\n"
        "class Foreign:\n"
        "    pass\n"
        "def loses():\n"
        "    foreign = Foreign()\n"
        "    weakref.finalize(foreign, os.kill, os.getpid(), signal.SIGINT)\n"
        "    del foreign\n"
        "    time.sleep(30)\n"
        "def renames():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException:\n"
        "        raise OSError('weights cannot be read') from None\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv[2:], how = [], sys.argv[2]\n"
        "info.check_model = lambda *words: globals()[how]()\n"
        "cli.main()\n"
    )
    for how in ("loses", "renames"):
        command = [sys.executable, "-c", program, "info", how]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert run.stderr == "Error: interrupted; no partial output was left\n", how
        assert run.returncode == 130
