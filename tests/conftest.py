"""What the tests share: small models with nothing left at its initial identity, and moving test video."""

import dataclasses
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from diffusers.utils import logging as verbosity
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.metrics import weights
from vc_vae_diffusers.operators.tdc import TemporalConv3d

# Sums depend on how many threads share them: the processes that tests start have as many as the tests.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A shell that runs the tests in the background has them ignore Ctrl-C, and with them the processes that they start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}


@pytest.fixture(autouse=True)
def log_records() -> Iterator[None]:
    """Let `caplog`, which listens at the root, hear the package as it hears others; what a test sets does not stay."""
    verbosity.enable_propagation()
    level = verbosity.get_verbosity()
    yield
    verbosity.set_verbosity(level)


@pytest.fixture
def make_vae() -> Callable[..., AutoencoderKLVCVAE]:
    """A factory of tiny models: `make_vae(**config)`. All weights are random, also those that start as an identity.

    Slices of differences, zero in a new model, are smaller than the anchor's, as after training: random ones as large
    make every layer amplify what differs between neighbouring frames threefold, rounding errors in static clips included.
    """

    def make(seed: int = 0, **config) -> AutoencoderKLVCVAE:
        torch.manual_seed(seed)
        vae = AutoencoderKLVCVAE(**{**TINY, **config}).eval()
        with torch.no_grad():
            for name, parameter in vae.named_parameters():
                if "temporal_" in name or "norm" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            for layer in vae.modules():
                if isinstance(layer, TemporalConv3d) and vae.config.temporal_operator == "tdc":
                    for k in set(range(len(layer.slices))) - {layer.anchor}:
                        layer.weight[:, :, k].normal_(std=0.17 * layer.weight[:, :, layer.anchor].std().item())
        return vae

    return make


@pytest.fixture
def make_video() -> Callable[..., torch.Tensor]:
    """A factory of clips in [-1, 1] without two equal frames: `make_video(frames, height=16, width=24, batch=1)`."""

    def make(frames: int, height: int = 16, width: int = 24, batch: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        waves = torch.rand(batch, 3, 1, 3, generator=generator) * 3 + 0.5
        grid = torch.stack(
            torch.meshgrid(
                torch.arange(frames) * 0.9, torch.arange(height) * 0.35, torch.arange(width) * 0.35, indexing="ij"
            ),
            dim=-1,
        )
        clean = torch.sin((waves[:, :, :, None, None] * grid).sum(-1))
        noise = torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1
        return (0.7 * clean + 0.3 * noise).clamp(-1, 1)

    return make


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that are still alive, and their peak."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.live = self.peak = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.__name__)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


@pytest.fixture
def live_memory() -> type[LiveMemory]:
    """A context that measures the peak of live tensor memory: `with live_memory(known_tensors) as memory`."""
    return LiveMemory


@pytest.fixture(scope="session")
def lpips_reference(tmp_path_factory):
    """The lpips package's own network with a random AlexNet trunk, a folder with it as ours, its table entry."""
    lpips = pytest.importorskip("lpips")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = {name: value.clone() for name, value in reference.state_dict().items() if name.startswith("net.")}
    folder = tmp_path_factory.mktemp("weights")
    save_file(trunk, folder / "lpips_alex.safetensors")
    table = weights.LPIPS_ALEX
    converted = dataclasses.replace(table.converted, sha256=weights.tensor_digest(trunk))
    return reference, folder, dataclasses.replace(table, converted=converted)


@pytest.fixture
def random_trunk(lpips_reference, monkeypatch):
    """That network and that folder, which our LPIPS takes for the real one."""
    reference, folder, table = lpips_reference
    monkeypatch.setattr(weights, "LPIPS_ALEX", table)
    return reference, folder
