"""The commands' `--dtype auto` is float32 in these tests, whatever the processor can do."""

import pytest

from vc_vae_diffusers import hardware


@pytest.fixture(autouse=True)
def no_bfloat16(monkeypatch):
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: False)
