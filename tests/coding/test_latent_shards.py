"""The latents of a collection: the same shards however they came to be, everything beside the videos carried along."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from typer.testing import CliRunner
from video_files import encode, numbered_frames

from vc_vae_diffusers import AutoencoderKLVCVAE
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.coding import latent_shards
from vc_vae_diffusers.coding.latent_file import LatentFile, to_int8
from vc_vae_diffusers.training import stored_latents
from vc_vae_diffusers.training.data import DataError
from vc_vae_diffusers.video import VideoReader, probe

runner = CliRunner()


@pytest.fixture
def model(make_vae, tmp_path) -> Path:
    make_vae().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def collection(tmp_path) -> Path:
    """Five videos in two folders, captions, a JSON file, and one that cannot be read."""
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    for k, name in enumerate(["a.mp4", "b.mkv", "deep/c.v2.mp4", "deep/d.mp4"]):
        encode(folder / name, numbered_frames(4 + k, 16, 24), rate=12)
    (folder / "a.txt").write_text("a caption")
    (folder / "a.json").write_text(json.dumps({"caption": "a caption", "frames": "theirs"}))
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("of the broken one")
    return folder


def run(*words: object, code: int = 0):
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + result.stderr
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_a_folder_becomes_shards_and_videos_again(collection, model, tmp_path):
    out = tmp_path / "latents"
    result = run("encode", collection, out, "--shards", 2, "--model", model, "--dtype", "float32", "--json")
    index = json.loads(result.stdout)
    assert index["samples"] == 4
    assert index["shards"] == {"latents-00000.tar": 2, "latents-00001.tar": 1, "latents-00002.tar": 1}
    assert list(index["unreadable"]) == ["broken.mp4"]
    assert "unreadable: broken.mp4: " in result.stderr
    assert str(collection) not in json.dumps(index["unreadable"])
    first = members(out / "latents-00000.tar")
    assert list(first) == ["a.json", "a.safetensors", "a.txt", "b.json", "b.safetensors"]
    assert first["a.txt"] == b"a caption"
    facts = json.loads(first["a.json"])
    assert (facts["caption"], facts["frames"], facts["fps"], facts["source"]) == ("a caption", 4, "12", "a.mp4")
    assert (facts["width"], facts["height"], facts["shape"]) == (24, 16, [1, 4, 1, 2, 3])
    vae = AutoencoderKLVCVAE.from_pretrained(model).eval()
    with VideoReader(collection / "a.mp4", batch_dim=True) as reader, torch.no_grad():
        expected = vae.encode(torch.cat(list(reader), dim=2)).latent_dist.mode()
    assert (load(first["a.safetensors"])["latents"] - expected).abs().max() < 1e-4
    assert set(members(out / "latents-00001.tar")) == {"deep/c_v2.json", "deep/c_v2.safetensors"}
    run("decode", out / "latents-00001.tar", tmp_path / "back", "--model", model)
    assert probe(tmp_path / "back" / "deep__c_v2.mp4").num_frames == 6
    assert not (out / ".samples").exists()


def test_a_killed_run_goes_on_and_ends_alike(collection, model, tmp_path, monkeypatch):
    how = ("--shards", 3, "--model", model, "--dtype", "float32")
    run("encode", collection, tmp_path / "whole", *how)
    inner, calls = latent_shards._write_sample, []

    def killed(sample, place, encode):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(sample.key)
        inner(sample, place, encode)

    monkeypatch.setattr(latent_shards, "_write_sample", killed)
    run("encode", collection, tmp_path / "parts", *how, code=130)
    assert not list((tmp_path / "parts").glob("*.tar"))
    monkeypatch.setattr(latent_shards, "_write_sample", inner)
    encoded = []
    one = latent_shards.Sample.opened
    monkeypatch.setattr(latent_shards.Sample, "opened", lambda sample: encoded.append(sample.key) or one(sample))
    run("encode", collection, tmp_path / "parts", *how)
    assert len(encoded) == 3  # what was there was not encoded again
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    run("encode", collection, tmp_path / "parts", *how)
    assert len(encoded) == 3


def test_other_settings_are_refused(collection, model, tmp_path):
    run("encode", collection, tmp_path / "out", "--shards", 3, "--model", model, "--num-frames", 4)
    again = run("encode", collection, tmp_path / "out", "--shards", 3, "--model", model, "--num-frames", 5, code=1)
    assert "num_frames was 4, is 5" in again.stderr
    run("encode", collection, tmp_path / "out", "--shards", 3, "--model", model, "--num-frames", 5, "--overwrite")


def test_shards_of_videos_keep_their_names(collection, model, tmp_path):
    with tarfile.open(tmp_path / "videos-7.tar", "w") as archive:
        for key, name in (("x1", "a.mp4"), ("x2", "deep/d.mp4")):
            archive.add(collection / name, f"{key}.mp4")
            content = f"caption of {key}".encode()
            member = tarfile.TarInfo(f"{key}.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    run("encode", tmp_path / "videos-*.tar", tmp_path / "out", "--shards", 1, "--model", model)
    found = members(tmp_path / "out" / "videos-7.tar")
    assert list(found) == ["x1.json", "x1.safetensors", "x1.txt", "x2.json", "x2.safetensors", "x2.txt"]
    assert found["x2.txt"] == b"caption of x2"


@pytest.mark.parametrize(("storage", "dtype", "most"), [("float16", torch.float16, 2e-3), ("int8", torch.int8, 0.03)])
def test_storage(collection, model, tmp_path, storage, dtype, most):
    how = ("--model", model, "--dtype", "float32")
    run("encode", collection / "a.mp4", tmp_path / "exact.safetensors", *how)
    run("encode", collection / "a.mp4", tmp_path / "small.safetensors", *how, "--storage", storage)
    exact, small = LatentFile(tmp_path / "exact.safetensors"), LatentFile(tmp_path / "small.safetensors")
    assert small.latents[:].dtype == dtype
    difference = small.read(0, 1).float() - exact.read(0, 1)
    assert 0 < difference.abs().max() < most
    run("decode", tmp_path / "small.safetensors", tmp_path / "back.mp4", "--model", model)
    assert "unknown; use float32" in run("encode", collection / "a.mp4", tmp_path / "x", "--storage", "int4", code=1).stderr


def test_integers_are_half_a_step_away_at_most(collection, model, tmp_path):
    path = tmp_path / "x.safetensors"
    run("encode", collection / "deep" / "d.mp4", path, "--model", model, "--dtype", "float32")
    exact = LatentFile(path).read(0, 9)
    to_int8(path)
    step = (exact.amax((0, 2, 3, 4)) - exact.amin((0, 2, 3, 4))) / 255
    error = (LatentFile(path).read(0, 9) - exact).abs().amax((0, 2, 3, 4))
    assert (error <= 0.501 * step).all()


def test_a_plain_webdataset_loop_reads_them(collection, model, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset, of the extra train")
    run("encode", collection, tmp_path / "out", "--shards", 9, "--model", model)
    dataset = webdataset.WebDataset(str(tmp_path / "out" / "latents-00000.tar"), shardshuffle=False)
    samples = list(dataset.decode(webdataset.handle_extension("safetensors", load)).to_tuple("safetensors", "json"))
    assert [sample[1]["frames"] for sample in samples] == [4, 5, 6, 7]
    assert samples[0][0]["latents"].shape == (1, 4, 1, 2, 3)


def test_two_processes_write_what_one_writes(collection, model, tmp_path):
    how = ("--shards", "1", "--model", str(model), "--device", "cpu", "--dtype", "float32")
    run("encode", collection, tmp_path / "one", *how)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["vc_vae_diffusers", "encode", str(collection), str(tmp_path / "two"), *how]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: [folder / "nope.tar"], "nope.tar does not exist"),
        (lambda folder: [folder / "a.mp4", folder / "b.mkv"], "2 files; with --shards pass one folder or list"),
        (lambda folder: [folder / "empty"], "empty"),
    ],
)
def test_wrong_collections_are_said(collection, model, tmp_path, make, said):
    (collection / "empty").mkdir()
    wrong = run("encode", *make(collection), tmp_path / "out", "--shards", 2, "--model", model, code=1)
    assert said in wrong.stderr


def test_two_names_of_one_key_are_refused(collection, model, tmp_path):
    encode(collection / "a.mkv", numbered_frames(4, 16, 24), rate=12)
    wrong = run("encode", collection, tmp_path / "out", "--shards", 2, "--model", model, code=1)
    assert "a.mkv and a.mp4 would have the same key, a" in wrong.stderr


def test_a_file_without_its_tensors_is_refused(collection, model, tmp_path):
    path = tmp_path / "x.safetensors"
    run("encode", collection / "a.mp4", path, "--model", model)
    metadata, tensors = LatentFile(path).metadata, load(path.read_bytes())
    save_file({"latents": tensors["latents"]}, path, metadata=metadata)
    assert "File does not contain tensor times" in run("decode", path, tmp_path / "x.mp4", code=1).stderr


def test_a_header_that_promises_more_than_there_is_takes_no_memory(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("a.safetensors")
        archive.addfile(member)
    whole = (tmp_path / "x.tar").read_bytes()
    member.size = 10**13  # more than any machine has
    (tmp_path / "x.tar").write_bytes(member.tobuf() + whole[512:])
    with pytest.raises(ValueError, match="no readable tar file"), latent_shards.unpacked(tmp_path / "x.tar"):
        pass
    with pytest.raises(DataError, match="ends behind the file"):
        stored_latents._samples(str(tmp_path / "x.tar"), {})
