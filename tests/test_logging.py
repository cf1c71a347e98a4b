"""diffusers' verbosity governs what this package says, and nothing is said twice."""

import logging
import os
import subprocess
import sys

import pytest
from diffusers.utils import logging as verbosity

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.training import machine
from vc_vae_diffusers.training.options import RunConfig


def test_verbosity_governs_the_package(make_vae, tmp_path, caplog):
    make_vae().save_pretrained(tmp_path)

    def said() -> bool:
        caplog.clear()
        AutoencoderKLVCVAE.from_pretrained(tmp_path, frame_conventoin="4k")
        return "does not know frame_conventoin" in caplog.text

    assert said()
    verbosity.set_verbosity_error()
    assert not said()
    verbosity.set_verbosity_info()
    assert said()
    assert logging.getLogger("vc_vae_diffusers.autoencoder.saving").isEnabledFor(logging.INFO)


@pytest.mark.parametrize(("chosen", "lines"), [(None, 1), ("error", 0)])
def test_a_warning_is_one_line_on_stderr(chosen, lines):
    code = (
        "import logging, vc_vae_diffusers, diffusers.utils\n"
        "logging.getLogger('vc_vae_diffusers.video').warning('said')\n"
        "logging.getLogger('vc_vae_diffusers.video').info('not said')\n"
    )
    environment = {**os.environ, **({} if chosen is None else {"DIFFUSERS_VERBOSITY": chosen})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["said"] * lines


@pytest.mark.parametrize(("before", "after"), [(logging.WARNING, logging.INFO), (logging.ERROR, logging.ERROR)])
def test_training_says_more_unless_less_was_asked_for(tmp_path, before, after):
    verbosity.set_verbosity(before)
    machine.prepare(RunConfig(output=str(tmp_path), cpu=True, tracker="none"))
    assert logging.getLogger("vc_vae_diffusers.training").getEffectiveLevel() == after
