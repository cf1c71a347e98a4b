"""One video on two gloo processes against one process, and segments against streams that are restarted by hand."""

import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.distributed import (
    RemoteError,
    Segment,
    decode_own_segments,
    decode_range,
    decode_segments,
    distribute_tiles,
    encode_segments,
    frames_of_segments,
    split_segments,
)

CONFIGS = {
    "4k": {},
    "4k+1": {"frame_convention": "4k+1"},
    "separate": {"first_frame": "separate"},
}
FRAMES, HEIGHT, WIDTH = 13, 32, 40


def tiny_vae(convention: str) -> AutoencoderKLVCVAE:
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    vae = AutoencoderKLVCVAE(**small, **CONFIGS[convention]).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "temporal_" in name:  # which start as an identity
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        elif parameter.ndim == 5:  # whose slices of differences start at zero
            parameter.add_(torch.randn_like(parameter), alpha=0.2 * parameter.std().item())
    return vae


def clip(frames: int = FRAMES) -> torch.Tensor:
    return torch.rand(1, 3, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def tiled_results(vae: AutoencoderKLVCVAE, video: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that tiling can go through."""
    posterior = vae.encode(video).latent_dist
    latents = posterior.mode()
    frames = video.shape[2]
    stream = [part.parameters for part in vae.encode_stream(video.split(3, dim=2), num_frames=frames)]
    decoded_stream = list(vae.decode_stream(latents.split(1, dim=2), num_frames=frames))
    return {
        "moments": posterior.parameters,
        "frames": vae.decode(latents, num_frames=frames).sample,
        "streamed moments": torch.cat(stream, dim=2),
        "streamed frames": torch.cat(decoded_stream, dim=2),
    }


def segment_results(vae: AutoencoderKLVCVAE, video: torch.Tensor) -> dict[str, torch.Tensor]:
    posterior = encode_segments(vae, video, gop_size=1)
    frames = decode_segments(vae, posterior.mode(), gop_size=1, num_frames=video.shape[2])
    return {"segment moments": posterior.parameters, "segment frames": frames}


def all_results(convention: str) -> dict[str, torch.Tensor]:
    vae, video = tiny_vae(convention), clip()
    vae.enable_tiling(24, 24, 16, 16)
    with distribute_tiles(vae):
        results = tiled_results(vae, video)
    vae.disable_tiling()
    return results | segment_results(vae, video)


def failures(rank: int) -> dict[str, str]:
    """What every process is told when the second one fails, or is called with something else."""
    vae, seen = tiny_vae("4k"), {}
    latents = torch.zeros(1, 4, 4, 2, 2)
    if rank == 1:
        vae.decoder.register_forward_pre_hook(_fail)
    try:
        decode_segments(vae, latents, gop_size=2)
    except (RemoteError, OSError) as error:
        seen["failure"] = f"{type(error).__name__}: {error}"
    vae.enable_tiling(16, 16)
    try:
        with distribute_tiles(vae), torch.no_grad():
            vae.decode(torch.zeros(1, 4, 1, 2, 3))
    except (RemoteError, OSError) as error:
        seen["tile failure"] = f"{type(error).__name__}: {error}"
    try:
        encode_segments(vae, clip(8 + 4 * rank), gop_size=1)
    except ValueError as error:
        seen["difference"] = str(error)
    return seen


def _fail(*_: object) -> None:
    raise OSError("the disk is gone")


def run_process(rank: int, processes: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    state = PartialState(cpu=True)
    assert state.num_processes == processes
    results = {convention: all_results(convention) for convention in CONFIGS}
    vae = tiny_vae("4k")
    shares = decode_own_segments(vae, vae.encode(clip()).latent_dist.mode(), gop_size=1, num_frames=FRAMES)
    results["own"] = {str(segment.frames.start): frames for segment, frames in shares}
    results["bfloat16"] = segment_results(tiny_vae("4k").to(torch.bfloat16), clip().to(torch.bfloat16))
    results["failures"] = failures(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    state.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """The results of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_process, (2, port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("convention", CONFIGS)
def test_two_processes_give_what_one_gives(two_processes, convention):
    vae, video = tiny_vae(convention), clip()
    vae.enable_tiling(24, 24, 16, 16)
    assert len(list(vae.tile_grid.tiles(HEIGHT // 8, WIDTH // 8, 1))) == 4
    alone = tiled_results(vae, video)
    vae.disable_tiling()
    alone |= segment_results(vae, video)
    for results in two_processes:
        assert set(results[convention]) == set(alone)
        for name, tensor in results[convention].items():
            assert torch.equal(tensor, alone[name]), name


def test_low_precision_travels(two_processes):
    alone = segment_results(tiny_vae("4k").to(torch.bfloat16), clip().to(torch.bfloat16))
    assert alone["segment frames"].dtype == torch.bfloat16
    for results in two_processes:
        assert all(torch.equal(results["bfloat16"][name], tensor) for name, tensor in alone.items())


def test_each_process_decodes_its_own_segments(two_processes):
    vae = tiny_vae("4k")
    latents = vae.encode(clip()).latent_dist.mode()
    whole = decode_segments(vae, latents, gop_size=1, num_frames=FRAMES)
    first, second = (results["own"] for results in two_processes)
    assert set(first) == {"0", "8"}
    assert set(second) == {"4", "12"}
    for start, frames in (first | second).items():
        assert torch.equal(frames, whole[:, :, int(start) : int(start) + frames.shape[2]])


def test_failure_of_one_process_ends_all(two_processes):
    first, second = (results["failures"] for results in two_processes)
    assert second["failure"] == second["tile failure"] == "OSError: the disk is gone"
    assert first["failure"] == "RemoteError: process 1 failed, its work is missing: OSError: the disk is gone"
    assert first["tile failure"] == first["failure"]
    for seen in (first, second):
        assert "pass the same on all" in seen["difference"]


@pytest.mark.parametrize("convention", CONFIGS)
def test_tiles_shared_with_nobody_change_nothing(convention):
    vae, video = tiny_vae(convention), clip()
    vae.enable_tiling(24, 24, 16, 16)
    plain = tiled_results(vae, video)
    with distribute_tiles(vae):
        shared = tiled_results(vae, video)
    assert all(torch.equal(plain[name], shared[name]) for name in plain)
    assert "_tiled" not in vars(vae)


def test_tiles_need_tiling_and_no_gradients():
    vae = tiny_vae("4k")
    with pytest.raises(ValueError, match="enable_tiling"), distribute_tiles(vae):
        pass
    vae.enable_tiling(32, 32)
    with pytest.raises(ValueError, match=r"torch\.no_grad"), distribute_tiles(vae):
        vae.encode(clip())


def restarted_encoder(vae: AutoencoderKLVCVAE, video: torch.Tensor, convention: str, gop_size: int) -> torch.Tensor:
    """Moments by the chunk interface: frames repeated by hand to whole groups, `cache=None` for every segment."""
    frames = video.shape[2]
    missing = -frames
    if convention == "separate":
        parts = list(video.split(1 + 4 * (gop_size - 1), dim=2))
        missing = 1 - parts[-1].shape[2]
        parts[-1] = torch.cat([parts[-1], parts[-1][:, :, -1:].expand(-1, -1, missing % 4, -1, -1)], dim=2)
    elif convention == "4k":
        parts = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing % 4, -1, -1)], dim=2).split(4 * gop_size, dim=2)
    else:
        parts = torch.cat([video[:, :, :1].expand(-1, -1, missing % 4, -1, -1), video], dim=2).split(4 * gop_size, dim=2)
    return torch.cat([vae.encode_chunk(part, None)[0] for part in parts], dim=2)


def restarted_decoder(vae: AutoencoderKLVCVAE, latents: torch.Tensor, frames: int, gop_size: int) -> torch.Tensor:
    """Frames of whole groups, started anew for every segment, cut by hand."""
    plain = tiny_vae("separate" if vae.config.first_frame == "separate" else "4k")  # which keep all frames of a group
    whole = torch.cat([plain.decode_chunk(part, None)[0] for part in latents.split(gop_size, dim=2)], dim=2)
    return whole[:, :, -frames:] if vae.config.frame_convention == "4k+1" else whole[:, :, :frames]


@torch.no_grad()
@pytest.mark.parametrize(("frames", "gop_size"), [(8, 1), (9, 1), (9, 2), (10, 2), (12, 2), (9, 3)])
@pytest.mark.parametrize("convention", CONFIGS)
def test_segments_are_streams_started_anew(convention, frames, gop_size):
    vae, video = tiny_vae(convention), clip(frames)
    posterior = encode_segments(vae, video, gop_size)
    moments = restarted_encoder(vae, video, convention, gop_size)
    assert posterior.parameters.shape == moments.shape
    assert (posterior.parameters - moments).abs().max() < 1e-5
    decoded = decode_segments(vae, posterior.mode(), gop_size, num_frames=frames)
    assert decoded.shape == video.shape
    assert (decoded - restarted_decoder(vae, posterior.mode(), frames, gop_size)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("convention", CONFIGS)
def test_one_segment_is_the_clip(convention):
    vae, video = tiny_vae(convention), clip()
    latents = vae.encode(video).latent_dist
    segmented = encode_segments(vae, video, gop_size=100)
    assert torch.equal(segmented.parameters, latents.parameters)
    assert torch.equal(
        decode_segments(vae, latents.mode(), 100, num_frames=FRAMES), vae.decode(latents.mode(), num_frames=FRAMES).sample
    )
    # A restart makes a difference, without which these tests would say nothing.
    both = slice(0, 4)  # latent frames of the same frames, but for "separate", where restarts shift them
    restarts = encode_segments(vae, video, gop_size=2).parameters[:, :, both]
    assert (restarts - latents.parameters[:, :, both]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("convention", CONFIGS)
def test_random_access_decodes_only_what_is_asked_for(convention, monkeypatch):
    vae, video = tiny_vae(convention), clip(22)
    latents = encode_segments(vae, video, gop_size=2).mode()
    whole = decode_segments(vae, latents, gop_size=2, num_frames=22)
    decoded: list[int] = []
    original = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **options: decoded.append(z.shape[2]) or original(z, **options))
    for start, stop in ((0, 1), (7, 9), (8, 16), (21, 22), (3, 22)):
        assert torch.equal(decode_range(vae, latents, start, stop, 2, num_frames=22), whole[:, :, start:stop])
    assert len(decoded) < 5 * len(split_segments(vae, 22, 2))
    decoded.clear()
    segment = split_segments(vae, 22, 2)[1]
    decode_range(vae, latents, segment.frames.start, segment.frames.stop, 2, num_frames=22)
    assert decoded == [2]


def test_where_segments_lie():
    def segments(convention: str, frames: int, gop_size: int) -> list[tuple[int, int, int, int]]:
        parts = split_segments(tiny_vae(convention), frames, gop_size)
        return [(p.frames.start, p.frames.stop, p.latents.start, p.latents.stop) for p in parts]

    assert segments("4k", 17, 2) == [(0, 8, 0, 2), (8, 16, 2, 4), (16, 17, 4, 5)]
    assert segments("4k+1", 17, 2) == [(0, 5, 0, 2), (5, 13, 2, 4), (13, 17, 4, 5)]
    assert segments("separate", 17, 2) == [(0, 5, 0, 2), (5, 10, 2, 4), (10, 15, 4, 6), (15, 17, 6, 8)]
    assert segments("separate", 3, 1) == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]
    assert split_segments(tiny_vae("4k"), 1, 3) == [Segment(slice(0, 1), slice(0, 1))]


@pytest.mark.parametrize(("convention", "frames"), [("4k", 20), ("4k+1", 17), ("separate", 10 + 5 + 1)])
def test_frames_without_num_frames(convention, frames):
    vae = tiny_vae(convention)
    latents = torch.randn(1, 4, 5 if convention != "separate" else 7, 2, 2)
    assert frames_of_segments(vae, latents.shape[2], 2) == frames
    assert decode_segments(vae, latents, gop_size=2).shape[2] == frames


def test_wrong_arguments_are_refused():
    vae = tiny_vae("4k")
    latents = torch.zeros(1, 4, 3, 2, 2)
    with pytest.raises(ValueError, match="gop_size is 0"):
        encode_segments(vae, clip(), 0)
    with pytest.raises(ValueError, match="gop_size and the num_frames that they were encoded with"):
        decode_segments(vae, latents, gop_size=2, num_frames=8)
    with pytest.raises(ValueError, match="the clip has 12 frames"):
        decode_range(vae, latents, 4, 13, gop_size=2)
    with pytest.raises(ValueError, match="the clip has 12 frames"):
        decode_range(vae, latents, 4, 4, gop_size=2)
