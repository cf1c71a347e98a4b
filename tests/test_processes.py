"""Processes that a launcher started know each other, on machines without an accelerator too."""

import os
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState

from vc_vae_diffusers.processes import processes

# Each rank writes a file of its own: lines that two processes print at once can run into each other.
SCRIPT = """
import pathlib, sys
from vc_vae_diffusers.processes import processes
state = processes()
pathlib.Path(sys.argv[1], str(state.process_index)).write_text(f"of {state.num_processes}")
state.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_ranks_of_torchrun_join_on_the_cpu(tmp_path):
    (tmp_path / "join.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    command = [*launch, str(tmp_path / "join.py"), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {rank.name: rank.read_text() for rank in ranks.iterdir()} == {"0": "of 2", "1": "of 2"}


def test_alone_it_is_the_only_one():
    state = processes("cpu")
    assert (state.process_index, state.num_processes, state.device.type) == (0, 1, "cpu")
