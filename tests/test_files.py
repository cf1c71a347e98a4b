"""Files that are whole or not there, with the permissions of others: what writes weights must not make them private."""

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys

import pytest
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from tiny_models import tiny_latte, tiny_vae

from vc_vae_diffusers import files
from vc_vae_diffusers.files import whole_file
from vc_vae_diffusers.training.any_vae import TrainableVAE
from vc_vae_diffusers.training.checkpoints import save_checkpoint, save_model
from vc_vae_diffusers.training.latent_cache import claim_folder


def test_files_that_are_no_text_or_no_json_are_named(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\x00\x9d\xff")
    for read in (files.read_text, files.read_json):
        with pytest.raises(ValueError, match=r"clip.mp4 is no text$"):
            read(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"clip.mp4 is no JSON \(Expecting"):
        files.read_json(path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json is a device, a pipe or a socket"):
        files.read_json(tmp_path / "pipe.json")


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def break_off(path) -> None:
    with files.whole_file(path) as partial:
        assert (partial.parent, partial.suffix) == (path.parent, path.suffix)
        partial.write_bytes(b"half of it")
        raise RuntimeError("halfway")


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.write_whole(path, "ä")
    assert path.read_bytes() == b"\xc3\xa4"
    files.write_whole(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    with pytest.raises(RuntimeError, match="halfway"):
        break_off(path)
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_follow_the_umask(tmp_path, umask):
    files.write_whole(tmp_path / "new.json", "{}")
    assert mode(tmp_path / "new.json") == 0o666 & ~umask
    private = tmp_path / "private"
    private.touch(mode=0o600)
    files.follow_umask(private)
    assert mode(private) == 0o666 & ~umask
    assert {path.name for path in tmp_path.iterdir()} == {"new.json", "private"}


def test_saved_models_can_be_read_by_others(tmp_path, umask):
    tiny_vae().save_pretrained(tmp_path / "whole")
    tiny_vae().save_pretrained(tmp_path / "parts", variant="fp16", max_shard_size="50KB")
    tiny_latte().save_pretrained(tmp_path / "latte")
    accelerator = Accelerator(cpu=True)
    model = TrainableVAE(tiny_vae(), [4])
    ema = EMAModel(model.parameters())
    saved = save_checkpoint(accelerator, model, ema, {"step": 1}, tmp_path / "checkpoints", keep=1)
    save_model(accelerator, model, tmp_path / "trained")
    claim_folder(tmp_path / "cache", {"size": 8})
    for folder, weights in (("whole", 1), ("parts", 2), ("latte", 1), ("trained", 1), (saved, 0), ("cache", 0)):
        modes = {path: mode(path) for path in (tmp_path / folder).rglob("*") if path.is_file()}
        assert set(modes.values()) == {0o666 & ~umask}, modes
        assert sum(path.suffix == ".safetensors" for path in modes) >= weights


def test_leftovers_of_killed_processes_go_with_the_next_write(tmp_path):
    code = "import os, sys; from vc_vae_diffusers import files; p = files.partial_path(sys.argv[1]); p.touch(); os._exit(1)"
    for name in ("clip.mp4", "weights", "a b.tar.gz"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    dead = sorted(tmp_path.iterdir())
    # One process after the other removed what the one before had left.
    assert [path.name.split(".")[1] for path in dead] == ["a b"]
    alive = files.partial_path(tmp_path / "mine.mp4")
    alive.touch()
    foreign = alive.with_name(alive.name.replace(files._host(), "00000000"))
    foreign.touch()
    own = tmp_path / ".notes.part"  # no name of ours
    own.touch()
    files.write_json(tmp_path / "new.json", {"b": 1, "a": 2})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {alive.name, foreign.name, own.name, "new.json"}
    assert (tmp_path / "new.json").read_text() == '{\n  "b": 1,\n  "a": 2\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "new.json", float("inf"))
    assert files.file_digest(tmp_path / "new.json") == hashlib.sha256((tmp_path / "new.json").read_bytes()).hexdigest()


def test_a_scratch_folder_goes_with_its_block_or_the_next_one(tmp_path):
    code = "import os, sys; from vc_vae_diffusers.files import scratch_folder\nwith scratch_folder(sys.argv[1]) as f: " + (
        "(f / 'half').touch(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (dead,) = tmp_path.iterdir()
    assert (dead / "half").exists()
    with files.scratch_folder(tmp_path) as first, files.scratch_folder(tmp_path) as second:
        assert {first, second} == set(tmp_path.iterdir())
        assert first.stat().st_mode & 0o077 == 0  # it may hold what visitors of the app upload
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_errors_of_a_full_disk_name_the_file(tmp_path, number):
    path = tmp_path / "out.bin"
    path.write_bytes(b"older")
    raised = [OSError(number, os.strerror(number)), SafetensorError(f"I/O error: no room (os error {number})")]
    for error in raised:
        with pytest.raises(OSError, match="free some or write elsewhere") as found, whole_file(path):
            raise error
        assert (found.value.errno, found.value.filename) == (number, str(path))
        assert found.value.__cause__ is error
    others = [OSError(errno.EIO, "not ours"), OSError(errno.ENOSPC, "named", "other"), SafetensorError("truncated")]
    for error in others:
        with pytest.raises(type(error)) as found, whole_file(path):
            raise error
        assert found.value is error
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["out.bin"]


@pytest.mark.parametrize("broken", ["gone", "a file"])
def test_what_cannot_be_written_is_named_as_it_was_asked_for(broken, tmp_path):
    target = tmp_path / "out" / "a.json"
    target.parent.mkdir()

    def write() -> None:
        with whole_file(target) as partial:
            partial.write_text("half")
            shutil.rmtree(target.parent)
            if broken == "a file":
                target.parent.write_text("")

    with pytest.raises(OSError, match=r"out/a\.json'$") as raised:
        write()
    assert raised.value.filename == str(target)
