"""What would go wrong on a GPU, found without one: `FakeTensorMode` knows CUDA tensors, but for their values."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE

TINY = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
# What reads a value, or a size that depends on values, makes the program wait for the GPU.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique", "masked_select"}


class NoWaiting(TorchDispatchMode):
    """Fails at what makes the program wait for the GPU, and at copies between it and the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert not (name in WAITING and any(x.device.type != "cpu" for x in given)), f"{func} waits for the GPU"
        result = func(*args, **(kwargs or {}))
        tensors = given + [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        copied = name in ("_to_copy", "copy_", "cat") and len({x.device.type for x in tensors}) > 1
        assert not copied, f"{func} copies between host and GPU"
        return result


def test_the_mode_sees_what_waits():
    with FakeTensorMode(), NoWaiting():
        x = torch.zeros(2, device="cuda")
        (x + 1).sum()
        for wrong in (
            lambda: x.new_tensor([1.0, 2.0]),
            lambda: x.cpu(),
            lambda: x.copy_(torch.zeros(2)),
            lambda: x[0].item(),
        ):
            with pytest.raises(AssertionError, match="GPU"):
                wrong()


@pytest.fixture
def gpu():
    """Everything is made on a GPU that need not be there."""
    with FakeTensorMode(), torch.device("cuda"):
        yield


def model(fused: bool = True, **config) -> AutoencoderKLVCVAE:
    vae = AutoencoderKLVCVAE(**{**TINY, **config}).eval().requires_grad_(False)
    if fused:
        vae.fuse_tdc()
    return vae


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temporal_causality": "causal"},
        {"temporal_padding": "zeros", "temporal_downsample": (True, True, True)},
        {"first_frame": "separate"},
        {"frame_convention": "4k+1"},
    ],
    ids=str,
)
def test_encoding_and_decoding_do_not_wait(gpu, config, fused):
    vae = model(fused, **config)
    clip = torch.empty(1, 3, 9, 32, 32)
    with torch.no_grad(), NoWaiting():
        latents = vae.encode(clip).latent_dist.mode()
        assert vae.decode(latents, num_frames=9).sample.shape == clip.shape
        assert vae.decode(latents[:, :, :1]).sample.shape[2] >= 1
        vae.encode(clip[:, :, :1])
        list(vae.decode_stream(latents.split(1, dim=2)))
        vae.groups_per_chunk = 2
        vae.decode(latents)


class Travels(TorchDispatchMode):
    """Counts the tensors that come to the GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device.type == "cuda" and any(x.device.type == "cpu" for x in given):
            self.count += 1
        return result


@torch.no_grad()
def test_weights_of_tiles_come_to_the_gpu_once_a_tile():
    with FakeTensorMode():
        with torch.device("cuda"):
            vae, latents = model(), torch.empty(1, 4, 5, 4, 8)
        vae.enable_tiling(16, 16)
        tiles = vae.tile_grid.count(4, 8)
        with Travels() as travels:
            vae.decode(latents)
    assert travels.count == tiles > 4


def gradients_of_fake_cuda_tensors() -> bool:
    """Whether PyTorch computes them here: a build for CUDA that finds no GPU does not, a build for CPUs does."""
    with FakeTensorMode():
        weight = torch.empty(1, device="cuda", requires_grad=True)
        try:
            weight.sum().backward()
        except RuntimeError as error:
            if "hasPrimaryContext" not in str(error):
                raise
            return False
    return True


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_training_step_does_not_wait(device):
    """Tensors without data stand for the GPU's where CUDA ones have no gradients."""
    if device == "cuda" and not gradients_of_fake_cuda_tensors():
        pytest.skip("this PyTorch is built for CUDA and finds no GPU: it computes no gradients of fake CUDA tensors")
    with torch.device(device), FakeTensorMode() if device == "cuda" else nullcontext():
        train_without_waiting()


def train_without_waiting():
    vae = AutoencoderKLVCVAE(**TINY).train()
    optimizer = torch.optim.SGD(vae.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    clip = torch.empty(1, 3, 8, 32, 32)

    def step():
        posterior = vae.encode(clip).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        ((reconstruction - clip).abs().mean() + 1e-8 * posterior.kl().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state
    with NoWaiting():
        step()
        vae.enable_gradient_checkpointing()
        step()


class Layouts(TorchDispatchMode):
    """Notes the convolutions and norms of frames whose channels are not last, and copies that change a layout."""

    def __init__(self):
        super().__init__()
        self.wrong: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}
        if name in ("convolution", "native_group_norm") and args[0].ndim in layout:
            if not args[0].is_contiguous(memory_format=layout[args[0].ndim]):
                self.wrong.append(f"{name} of {tuple(args[0].shape)}, strides {args[0].stride()}")
            if name == "convolution":  # what cuDNN gives, which PyTorch does not know without it
                result = result.contiguous(memory_format=layout[result.ndim])
        return result


@pytest.fixture
def made_in_bfloat16():
    """Fake CUDA tensors cannot be cast in place by a PyTorch built for CUDA that finds no GPU."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_frames_keep_their_channels_last(gpu, made_in_bfloat16):
    pytest.importorskip("triton")
    vae = model()
    with torch.no_grad(), Layouts() as layouts:
        latents = vae.encode(torch.empty(1, 3, 8, 32, 32, dtype=torch.bfloat16)).latent_dist.mode()
        vae.decode(latents)
    assert layouts.wrong == []
