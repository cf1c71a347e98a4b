"""The fuzzing of `make soak`, in small: what it looks for is not there in its first cases."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked, and their memory read from /proc")
@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV makes the files")
def test_hostile_files_in_small():
    only = ["a.mkv", "a.gif", "a.png", "latents", "config.json", "protocol.yaml", "result.json", "shard.tar"]
    words = ["--cases", "6", "--only", *only]
    done = subprocess.run([sys.executable, str(SOAK / "hostile_files.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("0 wrong outcomes")
    assert done.stdout.count("'refused'") == 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked, and disks mounted")
@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV makes the files")
def test_full_disks_in_small():
    done = subprocess.run([sys.executable, str(SOAK / "disk.py"), "--seconds", "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked, and their memory read from /proc")
@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV makes the files")
def test_hostile_words_in_small():
    done = subprocess.run([sys.executable, str(SOAK / "hostile_words.py"), "--cases", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("0 wrong outcomes")
    assert done.stdout.count("'refused'") > 10
