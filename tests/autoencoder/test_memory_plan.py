"""Estimates against what a fresh process really takes, and against live tensors counted while the real model runs."""

import json
import multiprocessing
import re
from pathlib import Path

import accelerate
import psutil
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from vc_vae_diffusers.autoencoder import memory_plan
from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.autoencoder.memory_plan import (
    MARGIN,
    MemoryEstimator,
    apply_plan,
    available_memory,
    candidate_tiles,
    parse_memory,
    plan,
    tile_grid,
)
from vc_vae_diffusers.autoencoder.memory_trace import MemoryTrace, ModelWithoutData
from vc_vae_diffusers.hardware import has_bfloat16

TINY = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
# Wide enough for activations to outweigh the libraries of a process.
WIDE = {"block_out_channels": (48, 48, 48, 48), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4}


def model(config: dict, **more) -> AutoencoderKLVCVAE:
    torch.manual_seed(0)
    return AutoencoderKLVCVAE(**config, **more).eval().requires_grad_(False)


def meta_model(config: dict, **more) -> AutoencoderKLVCVAE:
    with torch.device("meta"):
        vae = AutoencoderKLVCVAE(**config, **more).eval().requires_grad_(False)
    return vae


# --------------------------------------------------------------------------------------------- against real processes

# The bundled model's shape, and a wider one.
BUNDLED = {"block_out_channels": (32, 64, 80, 96), "layers_per_block": 1, "norm_num_groups": 16, "latent_channels": 16}
WIDER = {"block_out_channels": (64, 128, 256, 256), "layers_per_block": 2, "norm_num_groups": 32, "latent_channels": 16}

# In half precision where the processor computes in it: emulated, a case takes minutes.
HALF = torch.bfloat16 if has_bfloat16("cpu") else torch.float32
# configuration, operation, frames (None: a stream of 24), size, groups a chunk, tile, dtype
CASES = [
    (WIDE, "encode", 8, (256, 320), 1, None, torch.float32),
    (WIDE, "decode", 16, (192, 192), 4, None, HALF),
    (WIDE, "decode", None, (160, 192), 1, None, torch.float32),
    (WIDE, "decode", 8, (256, 256), 1, (192, 192), torch.float32),
    (BUNDLED, "decode", 8, (256, 256), 2, None, HALF),
    (WIDER, "encode", 8, (128, 128), 1, None, torch.float32),
]


def peak_of_process(case: tuple, connection) -> None:
    """Send the resident bytes before the model and at the peak of one operation."""
    config, operation, frames, size, groups, tile, dtype = case
    torch.set_num_threads(1)
    imported = psutil.Process().memory_info().rss
    vae = model(config).to(dtype)
    vae.fuse_tdc()
    vae.groups_per_chunk = groups
    if tile is not None:
        vae.enable_tiling(*tile)
    channels = config["latent_channels"]
    with torch.no_grad():
        if operation == "encode":
            vae.encode(torch.randn(1, 3, frames, *size, dtype=dtype))
        elif frames is not None:
            vae.decode(torch.randn(1, channels, frames // 4, size[0] // 8, size[1] // 8, dtype=dtype))
        else:
            latents = (torch.randn(1, channels, 1, size[0] // 8, size[1] // 8, dtype=dtype) for _ in range(6))
            for _ in vae.decode_stream(latents):
                pass
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    connection.send((imported, peak))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, [case[0]["block_out_channels"], *case[1:]])))
def test_estimate_is_within_15_percent_of_the_peak_of_a_process(case):
    config, operation, frames, size, groups, tile, dtype = case
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vc_vae_diffusers"])  # the libraries are imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_of_process, args=(case, sender))
    process.start()
    sender.close()
    imported, peak = receiver.recv()
    process.join()

    estimator = MemoryEstimator(meta_model(config), "cpu", dtype, runtime=imported)
    estimate = estimator.estimate(operation, *size, frames, groups_per_chunk=groups, tile=tile)
    assert estimate.total == pytest.approx(peak, rel=0.15)
    # What is estimated is a good part of it, or the libraries alone would pass the test.
    assert peak - imported > 0.25 * peak


# ------------------------------------------------------------------------------------------------ against live tensors


def test_a_trace_counts_tensors_that_are_alive():
    known = torch.ones(100)
    with MemoryTrace([known]) as trace:
        a = known + 1  # 400 bytes
        b = a * 2  # 800
        del a
        c = b[:50]  # a view
        known.add_(1)
        d = torch.cat([b, b])  # 1,200
        del b, c, d
        torch.zeros(25)  # 100
    assert trace.peak() == 1200


def test_small_tensors_count_as_the_heap_that_held_them():
    with MemoryTrace() as trace:
        first = torch.zeros(1000)
        del first
        small = [torch.zeros(100) for _ in range(2)]  # 800 bytes, which the heap keeps
        del small
        second = torch.zeros(900)
        del second
        torch.zeros(10)
    assert trace.peak() == 4000
    assert trace.peak(mapped_bytes=1000) == max(4000, 800 + 3600)  # not 4,800, for the heap was empty at first
    assert trace.peak(mapped_bytes=1000, heap_factor=1.5) == 1200 + 3600


def test_a_trace_is_read_at_other_sizes():
    weight = torch.ones(10)
    with MemoryTrace([weight]) as trace:
        kernel = weight * 2  # 40 bytes, at any size of frames
        frames = torch.ones(100)  # 400
        cache = frames[:25].clone()  # 100, one frame of whatever number
        frames = frames * kernel[0]  # 400 more for a moment
    trace.keep([(cache,), None])
    assert trace.peak() == 40 + 400 + 100 + 400
    assert trace.peak(area=3) == 40 + 3 * 900
    assert trace.peak(area=3, groups=2) == 40 + 3 * (2 * 800 + 100)
    assert trace.peak(area=3, groups=2, goes_on=True) == 40 + 3 * (2 * 800 + 100)  # the cache before is gone by then
    assert trace.peak(groups=0.1, goes_on=True) == 40 + 40 + 2 * 100
    assert (trace.cache(), trace.cache(area=3)) == (100, 300)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("encodes", [True, False], ids=["encode", "decode"])
@pytest.mark.parametrize("config", [{}, {"first_frame": "separate"}, {"temporal_causality": "causal"}], ids=str)
def test_a_trace_is_what_the_model_does(config, encodes, fused):
    vae = model(TINY, **config)
    if fused:
        vae.fuse_tdc()
    without_data = ModelWithoutData(vae, torch.device("cpu"), torch.float32)
    trace = without_data.trace(encodes, 2, 32, 40, 4 if encodes else 1)

    known = [tensor for tensor in memory_plan._weights(vae) if not tensor.is_mkldnn]
    vae.register_to_config(first_frame="in_sequence")
    x = torch.zeros(2, 3, 4, 32, 40) if encodes else torch.zeros(2, 4, 1, 4, 5)
    with torch.no_grad(), MemoryTrace(known) as real:
        _, cache = (vae._encode_frames if encodes else vae._decode_frames)(x)
    real.keep(cache)
    assert trace.peak(mapped_bytes=1000, heap_factor=2.0) == real.peak(mapped_bytes=1000, heap_factor=2.0) > 0
    assert trace.cache() == real.cache() > 0


@pytest.mark.parametrize("encodes", [True, False], ids=["encode", "decode"])
def test_one_trace_tells_the_peak_at_other_sizes(encodes):
    without_data = ModelWithoutData(meta_model(WIDE), torch.device("cpu"), torch.float32)
    trace = without_data.trace(encodes, 1, 256, 384, 4 if encodes else 1)
    for height, width, groups in ((128, 192, 1), (256, 384, 4), (384, 512, 2)):
        exact = without_data.trace(encodes, 1, height, width, groups * (4 if encodes else 1))
        scaled = trace.peak(height * width / (256 * 384), groups)
        assert scaled == pytest.approx(exact.peak(), rel=0.1)


def test_a_model_is_not_changed_by_estimating_it():
    vae = model(TINY)
    vae.enable_tiling(16, 16)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    MemoryEstimator(vae).estimate("decode", 32, 32, 8)
    assert vae.use_tiling
    assert all(type(parameter) is torch.nn.Parameter for parameter in vae.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


# --------------------------------------------------------------------------------------------------- what counts for what


def test_terms_follow_size_length_and_dtype():
    estimator = MemoryEstimator(meta_model(TINY), "cpu")
    decode = estimator.estimate("decode", 64, 64, 32)
    longer = estimator.estimate("decode", 64, 64, 64)
    assert longer.video == 2 * decode.video
    assert (longer.activations, longer.weights, longer.cache) == (decode.activations, decode.weights, 0)
    assert decode.video == 4 * (32 * 3 * 64 * 64 + 8 * 4 * 8 * 8)
    held = estimator.estimate("decode", 64, 64, 32, both=True)
    assert held.video - decode.video == 4 * 32 * 3 * 64 * 64
    batch = estimator.estimate("decode", 64, 64, 32, batch_size=2)
    assert batch.video == 2 * decode.video
    assert batch.activations > 1.9 * decode.activations

    stream, tiled = (estimator.estimate("decode", 64, 64, None, tile=tile) for tile in (None, (32, 32)))
    assert stream.video == 3 * 4 * 4 * 3 * 64 * 64
    assert stream.cache == 0 < tiled.cache
    assert tiled.activations < stream.activations
    assert estimator.estimate("decode", 64, 64, 32, tile=(32, 32)).cache == 0

    half = MemoryEstimator(meta_model(TINY), "cpu", torch.bfloat16).estimate("decode", 64, 64, 32)
    assert half.weights == decode.weights / 2
    assert half.video == decode.video / 2
    assert half.activations < 0.8 * decode.activations


def test_an_image_takes_less_than_a_group():
    estimator = MemoryEstimator(meta_model(TINY), "cpu")
    assert estimator.estimate("encode", 64, 64, 1).activations < estimator.estimate("encode", 64, 64, 2).activations / 2


def test_cuda_is_planned_without_a_cuda_device():
    estimate = MemoryEstimator(meta_model(TINY), "cuda", torch.float16).estimate("decode", 64, 64, 8)
    assert estimate.activations > 0
    if not torch.cuda.is_available():
        assert estimate.runtime == memory_plan.CUDA_CONTEXT_BYTES
        with pytest.raises(ValueError, match="pass memory"):
            plan(meta_model(TINY), 64, 64, 8, device="cuda")


def test_fused_kernels_are_weights_of_the_device_at_hand():
    vae = model(TINY)
    plain = MemoryEstimator(vae).weights
    vae.fuse_tdc()
    fused = MemoryEstimator(vae).weights
    assert fused > 1.5 * plain
    assert MemoryEstimator(meta_model(TINY), "cpu").weights == fused


# -------------------------------------------------------------------------------------------------------------- plans


@pytest.fixture
def empty_process(monkeypatch) -> None:
    """What the process holds besides varies; plans are compared to estimates to the byte here."""
    monkeypatch.setattr(memory_plan, "_runtime_bytes", lambda vae, device: 10**9)


class Peaks:
    """Peaks of settings for 256x320, and the budget that just holds one."""

    def __init__(self, num_frames: int | None = 16):
        self.estimator = MemoryEstimator(meta_model(TINY), "cpu")
        self.num_frames = num_frames

    def peak(self, groups: int = 1, tile: tuple[int, int] | None = None) -> int:
        options = {"groups_per_chunk": groups, "tile": tile, "both": True}
        return max(
            self.estimator.estimate(operation, 256, 320, self.num_frames, **options).total
            for operation in ("encode", "decode")
        )

    def budget(self, groups: int = 1, tile: tuple[int, int] | None = None) -> int:
        return int(self.peak(groups, tile) / (1 - MARGIN)) + 2


def planned(budget: int, **options) -> memory_plan.MemoryPlan:
    chosen = plan(meta_model(TINY), 256, 320, memory=budget, device="cpu", **options)
    assert chosen.fits
    assert chosen.peak == max(estimate.total for estimate in chosen.estimates) <= budget * (1 - MARGIN)
    return chosen


def test_plan_prefers_long_chunks_then_whole_frames_then_tiles(empty_process):
    peaks = Peaks(16)  # four groups, and no caches when they are one chunk
    assert peaks.peak(1) < peaks.peak(2) < peaks.peak(4)
    for groups in (2, 4):
        chosen = planned(peaks.budget(groups), num_frames=16)
        assert (chosen.groups_per_chunk, chosen.tile, chosen.tiles) == (groups, None, 1)
    chosen = planned(peaks.budget(1) - 4, num_frames=16)
    assert chosen.groups_per_chunk == 1
    assert chosen.tiles > 1


def test_one_chunk_without_caches_may_take_less_than_two(empty_process):
    estimator = MemoryEstimator(meta_model(TINY), "cpu")
    stream = estimator.estimate("encode", 256, 320, None).activations
    assert estimator.estimate("encode", 256, 320, 4).activations < stream


def test_plan_takes_the_tiles_with_the_least_work_that_fit(empty_process):
    peaks = Peaks()
    tiles = candidate_tiles(256, 320, 8)
    for wanted in tiles[len(tiles) // 2 :: 2]:
        fits = [peaks.peak(1, tile) <= peaks.peak(1, wanted) for tile in tiles]
        assert planned(peaks.budget(1, wanted), num_frames=16).tile == tiles[fits.index(True)]


def test_plan_of_a_stream_has_no_end(empty_process):
    chosen = planned(100 * 10**9)
    assert chosen.streamed
    assert chosen.groups_per_chunk == memory_plan.MAX_GROUPS
    only = planned(100 * 10**9, operations=["encode"], max_groups=1)
    assert [estimate.operation for estimate in only.estimates] == ["encode"]


def test_nothing_fits(empty_process):
    vae = meta_model(TINY)
    with pytest.raises(ValueError, match=r"memory is 0\.10 GB, too little for 256x320.*pass more memory, a smaller size"):
        plan(vae, 256, 320, 8, "100MB", device="cpu")
    # Whatever was given too little, the answer is the same, and true.
    answers = set()
    for memory in ("100MB", "500MB", "1GB"):
        with pytest.raises(ValueError, match="the smallest setting") as refused:
            plan(vae, 256, 320, None, memory, device="cpu")
        answers.add(re.search(r"setting takes (\d+\.\d+) GB", str(refused.value))[1])
    (answer,) = answers
    assert plan(vae, 256, 320, None, f"{answer}GB", device="cpu").fits
    with pytest.raises(ValueError, match="the smallest setting"):
        plan(vae, 256, 320, None, f"{float(answer) - 0.03}GB", device="cpu")
    with pytest.raises(ValueError, match="stream it"):
        plan(vae, 256, 320, 4000, "2GB", device="cpu")


def test_candidate_tiles_cut_frames_evenly():
    tiles = candidate_tiles(720, 1280, 8)
    assert (720, 1280) not in tiles
    assert tiles[0] == (720, 736)
    for tile in tiles:
        grid = tile_grid(tile, 8)
        assert tile[0] >= 128
        assert tile[1] >= 128
        count = len(list(grid.tiles(90, 160, 1)))
        for smaller in ((tile[0] - 8, tile[1]), (tile[0], tile[1] - 8)):  # one cell less needs one tile more
            assert len(list(tile_grid(smaller, 8).tiles(90, 160, 1))) > count
    assert candidate_tiles(64, 64, 8) == []
    work = [len(list(tile_grid(tile, 8).tiles(90, 160, 1))) * tile[0] * tile[1] for tile in tiles]
    assert work == sorted(work)


@torch.no_grad()
def test_enable_auto_memory_sets_the_model_up(empty_process):
    vae = model(TINY)
    vae.fuse_tdc()
    chosen = vae.enable_auto_memory(256, 320, 8, Peaks(8).budget(1) - 4)
    assert vae.use_tiling
    assert chosen.tiles == len(list(vae.tile_grid.tiles(32, 40, 1))) > 1
    assert (vae.tile_grid.height * 8, vae.tile_grid.width * 8) == chosen.tile
    chosen = vae.enable_auto_memory(256, 320, 8)  # what this machine has is plenty
    assert (chosen.tile, chosen.groups_per_chunk) == (None, 2)
    assert not vae.use_tiling
    assert vae.groups_per_chunk == 2


@torch.no_grad()
def test_apply_plan_changes_no_result():
    # In float64, for an untrained network makes much of rounding.
    vae = model(TINY).double()
    latents = torch.randn(1, 4, 5, 4, 4, dtype=torch.float64)
    expected = vae.decode(latents).sample
    apply_plan(vae, plan(vae, 32, 32, 20, "100GB"))
    assert vae.groups_per_chunk == 5
    assert (vae.decode(latents).sample - expected).abs().max() < 1e-5


def test_plan_is_plain_for_json():
    chosen = json.loads(json.dumps(plan(meta_model(TINY), 64, 64, 8, "100GB", device="cpu").to_dict()))
    assert chosen["peak"] == max(estimate["total"] for estimate in chosen["estimates"])
    assert chosen["groups_per_chunk"] == 2


# ---------------------------------------------------------------------------------------------------------- amounts


def test_amounts_of_memory():
    amounts = [parse_memory(text) for text in ("8GB", "8 gib", "1.5MB", "100B", "2TiB", "3 kb")]
    assert amounts == [8 * 10**9, 8 * 2**30, 1_500_000, 100, 2 * 2**40, 3000]
    for text in ("eight", "8GX", "-1GB", "", "GB", "8"):
        with pytest.raises(ValueError, match="memory is"):
            parse_memory(text)


def test_available_memory_is_between_what_is_held_and_what_there_is():
    resident = psutil.Process().memory_info().rss
    assert resident < available_memory("cpu") < psutil.virtual_memory().total + resident


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "both"}, "operation is 'both'"),
        ({"height": 60}, "height is 60, not a positive multiple of the spatial compression 8: pass 64"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"groups_per_chunk": 0}, "groups_per_chunk is 0"),
        ({"tile": (60, 64)}, "tile_sample_min_height is 60"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    estimator = MemoryEstimator(meta_model(TINY), "cpu")
    with pytest.raises(ValueError, match=message):
        estimator.estimate(**{"operation": "decode", "height": 64, "width": 64, "num_frames": 8, **arguments})


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="planned for 'cpu' and 'cuda'"):
        MemoryEstimator(meta_model(TINY), "mps")
    with pytest.raises(ValueError, match="meta device: pass device"):
        plan(meta_model(TINY), 64, 64, 8, "8GB")


# ---------------------------------------------------------------------------------------------------------- wrappers


def group_offloaded(vae: AutoencoderKLVCVAE, folder: Path) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(
        vae, onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(folder)
    )


WRAPPERS = {
    "group offload": group_offloaded,
    "sequential offload": lambda vae, folder: accelerate.cpu_offload(vae, execution_device=torch.device("cpu")),
    "layerwise casting": lambda vae, folder: vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
}


@torch.no_grad()
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_planned(wrapper, tmp_path, empty_process):
    vae = model(TINY)
    plain = MemoryEstimator(vae).estimate("decode", 64, 64, 8)
    WRAPPERS[wrapper](vae, tmp_path)
    chosen = vae.enable_auto_memory(64, 64, 8, "100GB")
    assert (vae.groups_per_chunk, vae.use_tiling) == (2, False)
    estimate = MemoryEstimator(vae).estimate("decode", 64, 64, 8)
    assert estimate.activations == plain.activations
    if wrapper == "layerwise casting":
        assert plain.weights / 4 <= estimate.weights < plain.weights / 2  # norms stay in float32
    else:
        assert estimate.weights == plain.weights
    assert chosen.fits
    assert vae.decode(torch.randn(1, 4, 2, 8, 8)).sample.isfinite().all()


def test_sliced_clips_take_the_activations_of_one():
    vae = model(TINY)
    one = MemoryEstimator(vae).estimate("decode", 64, 64, 8)
    vae.enable_slicing()
    sliced = MemoryEstimator(vae).estimate("decode", 64, 64, 8, batch_size=4)
    assert sliced.activations == one.activations
    assert sliced.video == 4 * one.video + 4 * 8 * 3 * 64 * 64  # one clip more, before it is put beside the others
    stream = MemoryEstimator(vae).estimate("decode", 64, 64, None, batch_size=4)
    assert stream.cache > 6 * MemoryEstimator(vae)._trace("decode", 1, 64, 64, 4).cache()
