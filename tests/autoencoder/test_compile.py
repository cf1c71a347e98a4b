"""torch.compile: one graph without breaks, and no recompilation as a stream goes on."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.operators.evaluation import gpu_ops

SMALL = {"block_out_channels": (8, 8), "mid_block_add_attention": True}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small_vae(make_vae, **config) -> AutoencoderKLVCVAE:
    return make_vae(**{**SMALL, "temporal_downsample": (True,), **config})


@torch.no_grad()
@pytest.mark.parametrize(
    ("step", "config"),
    [("encode_chunk", {}), ("decode_chunk", {}), ("encode_chunk", {"temporal_causality": "causal"})],
    ids=["encode", "decode", "encode, causal"],
)
def test_chunk_functions_compile_once_for_the_start_and_once_for_the_rest(make_vae, make_video, step, config):
    vae, counter = small_vae(make_vae, **config), CompileCounterWithBackend("eager")
    if step == "encode_chunk":
        chunks = make_video(10).split(2, dim=2)
    else:
        chunks = torch.randn(1, 4, 5, 8, 12, generator=torch.Generator().manual_seed(0)).split(1, dim=2)
    plain, compiled = getattr(vae, step), torch.compile(getattr(vae, step), fullgraph=True, backend=counter)
    cache = other_cache = None
    graphs = []
    for chunk in chunks:
        expected, cache = plain(chunk, cache)
        actual, other_cache = compiled(chunk, other_cache)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 2]


def test_compiled_decode_trains(make_vae):
    """`vae.decode = torch.compile(vae.decode)` is how pipelines do it; gradients go through the compiled graph."""
    vae, counter = small_vae(make_vae), CompileCounterWithBackend("aot_eager")
    z = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    parameters = list(vae.decoder.parameters())

    def run():
        frames = vae.decode(z, return_dict=False)[0]
        return frames, *torch.autograd.grad(frames.sin().sum(), parameters)

    expected = run()
    vae.decode = torch.compile(vae.decode, backend=counter)
    for actual, value in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-4 * value.abs().max().item())
    assert counter.frame_count == 1


INDUCTOR = """
import torch
from vc_vae_diffusers import AutoencoderKLVCVAE
torch.manual_seed(0)
small = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
vae = AutoencoderKLVCVAE(**small, temporal_downsample=(True,), mid_block_add_attention=False).eval().requires_grad_(False)
for parameter in vae.parameters():
    parameter.add_(torch.randn_like(parameter), alpha=0.02)
compiled, cache, other_cache = torch.compile(vae.decode_chunk, fullgraph=True), None, None
for latents in torch.randn(1, 4, 3, 8, 12).split(1, dim=2):
    expected, cache = vae.decode_chunk(latents, cache)
    actual, other_cache = compiled(latents, other_cache)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
"""


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_stream(tmp_path):
    """The default backend, with generated code; the tests above check graphs only.

    In a process of its own, for inductor does not start where another library has imported the old distutils. What it caches
    for one `ATEN_CPU_CAPABILITY` gives NaN with another.
    """
    own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} if "ATEN_CPU_CAPABILITY" in os.environ else {}
    subprocess.run([sys.executable, "-c", INDUCTOR], check=True, timeout=1200, env={**os.environ, **own})


def test_compile_is_for_chunks_and_refuses_what_records_graphs(make_vae, make_video):
    vae, counter = small_vae(make_vae).requires_grad_(False), CompileCounterWithBackend("eager")
    clip = make_video(9)
    with torch.no_grad():
        expected = vae(clip).sample
        vae.fuse_tdc()
        vae.compile(backend=counter)
        torch.testing.assert_close(vae(clip).sample, expected, rtol=0, atol=1e-5)
        compiled = counter.frame_count
        assert compiled == 4  # encoder and decoder, the start of a clip and the rest
        vae(make_video(13))
        list(vae.encode_stream(make_video(7).split(3, dim=2)))
        assert counter.frame_count == compiled
    with pytest.raises(ValueError, match=r"mode is 'max-autotune', .* pass mode='max-autotune-no-cudagraphs'"):
        vae.compile(mode="max-autotune")


def test_warming_up_leaves_nothing_to_compile_for_a_clip(make_vae, make_video):
    vae, counter = small_vae(make_vae).requires_grad_(False), CompileCounterWithBackend("eager")
    clip, other = make_video(9), CompileCounterWithBackend("eager")
    height, width = clip.shape[-2:]
    vae.compile(backend=counter)
    vae.warm_up(height, width)
    assert counter.frame_count == 4
    with torch.no_grad():
        vae(clip)
    assert counter.frame_count == 4
    vae.compile(backend=other)
    vae.warm_up(height, width, encode=False)
    assert other.frame_count == 2
    for size in ((12, 31), (0, 12), (12, -2)):
        with pytest.raises(ValueError, match=r"height and width are {} and {}: pass positive multiples of 2".format(*size)):
            vae.warm_up(*size)


def test_on_gpus_inductor_does_not_keep_what_norms_make(make_vae, monkeypatch):
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: given.append(options))
    with FakeTensorMode(), torch.device("cuda"):
        vae = AutoencoderKLVCVAE(block_out_channels=(8, 8), temporal_downsample=(True,), norm_num_groups=4)
    vae.compile(dynamic=True)
    assert given == [{"dynamic": True, "options": gpu_ops.INDUCTOR}] * 2
    assert all(hasattr(config, name) for name in gpu_ops.INDUCTOR)
    given.clear()
    vae.compile(mode="max-autotune-no-cudagraphs")
    make_vae().compile()
    assert given == [{"mode": "max-autotune-no-cudagraphs"}] * 2 + [{}] * 2


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=str)
def test_other_sizes_of_frames_compile_once_more_at_most(make_vae, options):
    groups_of_four = {"block_out_channels": (8, 8, 8), "temporal_downsample": (True, True), "mid_block_add_attention": False}
    vae, counter = small_vae(make_vae, **groups_of_four), CompileCounterWithBackend("eager")
    clips = [torch.randn(1, 4, 3, *size, generator=torch.Generator().manual_seed(0)) for size in ((8, 12), (12, 8), (6, 14))]
    expected = [vae.decode(latents).sample for latents in clips]
    vae.requires_grad_(False).compile(backend=counter, fullgraph=True, **options)
    counts = []
    for latents, frames in zip(clips, expected, strict=True):
        torch.testing.assert_close(vae.decode(latents).sample, frames, rtol=0, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] == 2  # the start of a clip and the rest
    assert counts[2] == counts[1] <= 4


@torch.no_grad()
def test_ways_for_gpus_are_plain_sums_to_the_compiler(make_vae, monkeypatch):
    """The compiler fuses sums itself; here it takes those ways on a CPU."""
    vae = small_vae(make_vae).requires_grad_(False)
    latents = torch.randn(1, 4, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    expected, served = vae.decode(latents).sample, []

    def compiled(x: torch.Tensor) -> bool:
        served.append(x.shape)
        return torch.compiler.is_compiling()

    monkeypatch.setattr(gpu_ops, "compiled", compiled)
    monkeypatch.delattr(gpu_ops, "combine")  # would fail
    vae.decoder.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=0, atol=1e-5)
    assert served
