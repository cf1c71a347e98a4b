"""Chunks and streams give what whole clips give, with explicit state and flat memory."""

import copy
import weakref
from itertools import combinations

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.operators.tdc import TemporalConv3d

CONFIGS = [
    {"temporal_causality": "group"},
    {"temporal_causality": "group", "temporal_operator": "conv", "temporal_padding": "zeros"},
    {"temporal_causality": "group", "first_frame": "separate"},
    {"temporal_causality": "group", "frame_convention": "4k+1"},
    {"temporal_causality": "causal"},
    {"temporal_causality": "causal", "first_frame": "separate"},
]
configurations = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: " ".join(str(v) for v in c.values()))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest expected value, 1e-10 in float64."""
    assert actual.shape == expected.shape
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
    scale = expected.abs().max().item()
    assert scale > 1e-3, "a comparison of zeros proves nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def splits(parts: int) -> list[list[int]]:
    """Every way to write `parts` as a sum of positive numbers."""
    cuts = [c for n in range(parts) for c in combinations(range(1, parts), n)]
    return [[b - a for a, b in zip((0, *c), (*c, parts), strict=True)] for c in cuts]


def in_chunks(step, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    outputs, cache = [], None
    for chunk in x.split(sizes, dim=2):
        y, cache = step(chunk, cache)
        outputs.append(y)
    return torch.cat(outputs, dim=2)


def joined(posteriors) -> torch.Tensor:
    return torch.cat([p.parameters for p in posteriors], dim=2)


# Chunks -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@configurations
def test_encode_chunk_for_every_split(make_vae, make_video, config):
    vae = make_vae(**config)
    alone = 1 if "first_frame" in config else 0
    frames = 10 if "frame_convention" in config else 12 + alone
    video = make_video(frames, batch=2)
    expected = vae.encode(video).latent_dist.parameters
    for sizes in splits(3):
        chunks = [4 * size for size in sizes]
        chunks[0] += frames - 12  # what comes before, or is missing at the start of, whole groups
        close(in_chunks(vae.encode_chunk, video, chunks), expected)


@torch.no_grad()
@configurations
def test_decode_chunk_for_every_split(make_vae, config):
    vae = make_vae(**config)
    z = torch.randn(2, 4, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(z).sample
    for sizes in splits(3):
        close(in_chunks(vae.decode_chunk, z, sizes), expected)


@configurations
def test_one_chunk_with_gradients_equals_chunks_without(make_vae, make_video, config):
    """With gradients a clip is one chunk: the equality is then one of different shapes, not of one path with itself."""
    vae = make_vae(**config).double()
    video, sizes = make_video(13).double(), []
    vae.encoder.register_forward_pre_hook(lambda layer, args: sizes.append(args[0].shape[2]))
    whole = vae(video).sample
    with torch.no_grad():
        chunked = vae(video).sample
    assert max(sizes) >= 12
    assert len([s for s in sizes if s <= 4]) >= 4
    close(chunked, whole.detach())


@torch.no_grad()
@configurations
@pytest.mark.parametrize("groups", [2, 3])
def test_groups_per_chunk_changes_no_result(make_vae, make_video, config, groups):
    vae, video, sizes = make_vae(**config), make_video(19), []
    expected = vae(video).sample
    vae.decoder.register_forward_pre_hook(lambda layer, args: sizes.append(args[0].shape[2]))
    vae.groups_per_chunk = groups
    close(vae(video).sample, expected)
    assert max(sizes) == groups
    z = vae.encode(video).latent_dist.parameters
    close(joined(vae.encode_stream(video.split(5, dim=2), num_frames=19)), z)


@torch.no_grad()
def test_a_chunk_that_is_not_whole_groups_is_refused(make_vae, make_video):
    vae, separate = make_vae(), make_vae(first_frame="separate")
    for model, frames, rule in ((vae, 6, "a multiple of 4"), (vae, 1, "a multiple of 4"), (separate, 4, r"1 \+ 4\*n")):
        with pytest.raises(ValueError, match=rf"frames has {frames} frames, a chunk must have {rule}: use encode_stream"):
            model.encode_chunk(make_video(frames))
    _, cache = separate.encode_chunk(make_video(5))
    with pytest.raises(ValueError, match="frames has 5 frames, a chunk must have a multiple of 4"):
        separate.encode_chunk(make_video(5), cache)
    with pytest.raises(ValueError, match="latents has no frames"):
        vae.decode_chunk(torch.zeros(1, 4, 0, 2, 2))
    with pytest.raises(ValueError, match="latents has shape"):
        vae.decode_chunk(torch.zeros(1, 3, 1, 2, 2))


# State ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@configurations
def test_interleaved_streams_do_not_disturb_each_other(make_vae, make_video, config):
    vae, alone = make_vae(**config), 1 if "first_frame" in config else 0
    videos = [make_video(12 + alone, seed=seed) for seed in (1, 2)]
    z = [vae.encode(v).latent_dist.parameters for v in videos]
    frames = [vae.decode(m[:, :4]).sample for m in z]
    caches, decoder_caches, moments, outputs = [None, None], [None, None], [[], []], [[], []]
    for start in range(3):
        for i in (0, 1):
            first, last = 4 * start + (alone if start else 0), 4 * start + 4 + alone
            m, caches[i] = vae.encode_chunk(videos[i][:, :, first:last], caches[i])
            y, decoder_caches[i] = vae.decode_chunk(m[:, :4], decoder_caches[i])
            moments[i].append(m)
            outputs[i].append(y)
    for i in (0, 1):
        close(torch.cat(moments[i], dim=2), z[i])
        close(torch.cat(outputs[i], dim=2), frames[i])
    streams = [vae.encode_stream(v.split(3, dim=2), num_frames=12 + alone) for v in videos]
    parts = [[next(streams[i]) for i in (0, 1)] for _ in range(z[0].shape[2])]
    for i in (0, 1):
        close(joined(p[i] for p in parts), z[i])


@torch.no_grad()
@configurations
def test_caches_are_not_changed_and_can_branch(make_vae, make_video, config):
    vae, video = make_vae(**config), make_video(9 if "first_frame" in config else 8)
    z = torch.randn(1, 4, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    for step, start, nexts in (
        (vae.encode_chunk, video, [make_video(4, seed=5), make_video(8, seed=6)]),
        (vae.decode_chunk, z, [z[:, :, :1], -z]),
    ):
        _, cache = step(start)
        before = tree_map(torch.clone, cache)
        first = step(nexts[0], cache)[0]
        step(nexts[1], cache)
        again = step(nexts[0], cache)[0]
        for tensor, kept in zip(tree_leaves(cache), tree_leaves(before), strict=True):
            assert torch.equal(tensor, kept)
        assert torch.equal(first, again)


@torch.no_grad()
@configurations
def test_a_cache_survives_what_happens_to_the_input(make_vae, make_video, config):
    """A caller may refill its frame buffer: caches are copies."""
    vae, alone = make_vae(**config), 1 if "first_frame" in config else 0
    video = make_video(8 + alone)
    expected = vae.encode(video).latent_dist.parameters
    buffer = video[:, :, : 4 + alone].clone()
    first, cache = vae.encode_chunk(buffer)
    buffer.fill_(torch.nan)
    second, _ = vae.encode_chunk(video[:, :, 4 + alone :], cache)
    close(torch.cat([first, second], dim=2), expected)


@torch.no_grad()
def test_nothing_is_written_to_a_module(make_vae, make_video):
    vae = make_vae()

    def attributes():
        plain = {name: {k: id(v) for k, v in vars(m).items() if not k.startswith("_")} for name, m in vae.named_modules()}
        buffers = {name: {k: id(v) for k, v in m._buffers.items()} for name, m in vae.named_modules()}
        return plain, buffers, {name: p._version for name, p in vae.named_parameters()}

    before = attributes()
    vae(make_video(9))
    list(vae.decode_stream(p.mode() for p in vae.encode_stream([make_video(9)])))
    vae.enable_tiling(16, 16, 8, 8)
    vae.disable_tiling()
    tiles = {"use_tiling", *(f"tile_sample_{what}_{axis}" for what in ("min", "stride") for axis in ("height", "width"))}
    after = attributes()
    assert {k: v for k, v in after[0][""].items() if k not in tiles} == {
        k: v for k, v in before[0][""].items() if k not in tiles
    }
    assert {k: v for k, v in after[0].items() if k} == {k: v for k, v in before[0].items() if k}
    assert after[1:] == before[1:]


# Streams ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@configurations
@pytest.mark.parametrize("sizes", [[13], [1] * 13, [3, 5, 4, 1], [4, 0, 8, 0, 1]], ids=str)
def test_streams_of_any_chunking(make_vae, make_video, config, sizes):
    vae, video = make_vae(**config), make_video(sum(sizes))
    z = vae.encode(video).latent_dist.parameters
    stream = vae.encode_stream(iter(video.split(sizes, dim=2)), num_frames=13)
    close(joined(stream), z)
    latents = z[:, :4]
    expected = vae.decode(latents, num_frames=13).sample
    for cut in ([latents.shape[2]], [2, 0, latents.shape[2] - 2]):
        close(torch.cat(list(vae.decode_stream(iter(latents.split(cut, dim=2)), num_frames=13)), dim=2), expected)
    everything = torch.cat(list(vae.decode_stream([latents])), dim=2)
    close(everything, vae.decode(latents).sample)


@torch.no_grad()
@configurations
def test_streams_of_any_length(make_vae, make_video, config):
    vae = make_vae(**config)
    for frames in range(1, 7):
        video = make_video(frames)
        z = vae.encode(video).latent_dist.parameters
        close(joined(vae.encode_stream(video.split(2, dim=2), num_frames=frames)), z)
        pieces = list(vae.decode_stream([z[:, :4]], num_frames=frames))
        assert all(piece.shape[2] > 0 for piece in pieces)
        close(torch.cat(pieces, dim=2), vae.decode(z[:, :4], num_frames=frames).sample)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "ready_after"),
    [
        ({}, [4, 8, 11]),
        ({"first_frame": "separate"}, [1, 5, 9, 11]),
        ({"frame_convention": "4k+1"}, [3, 7, 11]),
    ],
    ids=str,
)
def test_streams_yield_as_soon_as_a_group_is_complete(make_vae, make_video, config, ready_after):
    vae, video, given, yielded = make_vae(**config), make_video(11), [], []

    def one_by_one():
        for t in range(11):
            given.append(t)
            yield video[:, :, t : t + 1]

    for _ in vae.encode_stream(one_by_one(), num_frames=11):
        yielded.append(len(given))
    assert yielded == ready_after

    z, taken, frames = vae.encode(video).latent_dist.mode(), [], []

    def latents():
        for t in range(z.shape[2]):
            taken.append(t)
            yield z[:, :, t : t + 1]

    for _ in vae.decode_stream(latents(), num_frames=11):
        frames.append(len(taken))
    assert frames == list(range(1, z.shape[2] + 1))


@torch.no_grad()
def test_a_4k_plus_1_stream_of_unknown_length(make_vae, make_video):
    vae, video = make_vae(frame_convention="4k+1"), make_video(9)
    close(joined(vae.encode_stream(video.split(2, dim=2))), vae.encode(video).latent_dist.parameters)
    with pytest.raises(ValueError, match=r"the stream had 10 frames, not 1 \+ 4\*k.*pass num_frames"):
        list(vae.encode_stream([make_video(10)]))


@torch.no_grad()
def test_stream_errors_name_argument_value_and_remedy(make_vae, make_video):
    vae, plus_one = make_vae(), make_vae(frame_convention="4k+1")
    z = torch.randn(1, 4, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    for stream, message in (
        (vae.encode_stream([]), "frames is an empty stream: pass at least one frame"),
        (vae.encode_stream([torch.zeros(1, 3, 0, 16, 16)]), "frames is an empty stream"),
        (vae.encode_stream([torch.zeros(3, 4, 16, 16)]), r"frames has shape \(3, 4, 16, 16\)"),
        (vae.encode_stream([torch.zeros(1, 3, 1, 12, 16)]), "frames has height 12.*pad to 16"),
        (vae.encode_stream([make_video(5)], num_frames=6), "num_frames is 6, the stream had 5 frames: pass the true number"),
        (plus_one.encode_stream([make_video(5)], num_frames=6), "num_frames is 6, the stream had 5 frames"),
        (vae.decode_stream([]), "latents is an empty stream: pass at least one latent frame"),
        (vae.decode_stream([z[0]]), r"latents has shape \(4, 2, 2, 3\)"),
        (vae.decode_stream([z], num_frames=0), "num_frames is 0, it must be at least 1"),
        (vae.decode_stream([z], num_frames=-1), "num_frames is -1, it must be at least 1"),
        (vae.decode_stream([z], num_frames=9), "num_frames is 9, the stream of latents held 8 frames: pass at most that"),
        (plus_one.decode_stream([z], num_frames=3), "num_frames is 3, the stream holds latents of a longer clip.*4k"),
    ):
        with pytest.raises(ValueError, match=message):
            list(stream)


@torch.no_grad()
def test_a_cropped_stream_stops_decoding(make_vae):
    vae, z, calls = make_vae(), torch.randn(1, 4, 6, 2, 3, generator=torch.Generator().manual_seed(0)), []
    vae.decoder.register_forward_pre_hook(lambda layer, args: calls.append(1))
    frames = torch.cat(list(vae.decode_stream([z], num_frames=6)), dim=2)
    assert len(calls) == 2
    close(frames, vae.decode(z, num_frames=6).sample)


# Memory -----------------------------------------------------------------------------------------------------------------


def peak_beside(live_memory, vae: AutoencoderKLVCVAE, known: torch.Tensor, function) -> int:
    """The peak of live bytes that a function makes, without its result and what was there before."""
    with live_memory([known, *vae.parameters()]) as memory:
        result = function(known)
    assert memory.peak > 0
    return memory.peak - result.untyped_storage().nbytes()


@torch.no_grad()
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("config", [{}, {"frame_convention": "4k+1"}, {"temporal_causality": "causal"}], ids=str)
def test_memory_of_whole_clips_does_not_grow_with_their_length(make_vae, make_video, live_memory, config, tiled):
    vae = make_vae(**config)
    if tiled:
        vae.enable_tiling(16, 16, 8, 8)
    peaks = {"encode": [], "decode": []}
    for frames in (14, 30):  # never whole groups: frames must be repeated
        video = make_video(frames, height=24, width=24)
        peaks["encode"].append(peak_beside(live_memory, vae, video, vae._encode))
        z = torch.randn(1, 4, -(-frames // 4), 3, 3, generator=torch.Generator().manual_seed(0))
        peaks["decode"].append(peak_beside(live_memory, vae, z, vae._decode))
    for short, long in peaks.values():
        assert long <= 1.02 * short


@torch.no_grad()
def test_memory_of_streams_does_not_grow_with_their_length(make_vae, make_video, live_memory):
    vae, chunk = make_vae(), make_video(6)
    peaks = []
    for count in (3, 12):
        with live_memory([chunk, *vae.parameters()]) as memory:
            latents = (p.mode() for p in vae.encode_stream(chunk.clone() for _ in range(count)))
            for frames in vae.decode_stream(latents):
                assert frames.isfinite().all()
        peaks.append(memory.peak)
    assert peaks[1] <= 1.02 * peaks[0]


@torch.no_grad()
def test_a_long_chunk_is_copied_once(make_vae, make_video, live_memory):
    """What remains of a chunk must not be copied again for every group in it."""
    vae, video = make_vae(), make_video(40)
    copied = []

    class Counting(live_memory):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.clone.default and args[0].shape[1] == 3:
                copied.append(args[0].shape[2])
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Counting():
        list(vae.encode_stream([video]))
    assert 0 < sum(copied) <= 40 + 10  # the layout of each frame and the cached frame of each group, nothing quadratic


@torch.no_grad()
@pytest.mark.parametrize("size", [4, 6])
def test_streams_let_go_of_frames(make_vae, make_video, size):
    """Neither chunks nor views of them are kept once their groups are encoded."""
    vae, made, gone = make_vae(), [], []

    def frames():
        for i in range(5):
            chunk = make_video(size, seed=i)
            made.append(i)
            weakref.finalize(chunk.untyped_storage(), gone.append, i)
            yield chunk

    stream = vae.encode_stream(frames())
    for _ in stream:
        assert len(made) - len(gone) <= 1
    assert len(made) == 5


@torch.no_grad()
@configurations
@pytest.mark.parametrize("run", ["encode", "decode", "encode_stream", "decode_stream"])
def test_a_state_is_forgotten_once_the_next_one_is_made(make_vae, make_video, monkeypatch, config, run):
    """Only who holds a cache himself, and hands it to `encode_chunk` or `decode_chunk`, has two."""
    vae, alive, counts = make_vae(**config), [], []
    kind = type(vae.decoder.neighbours_in)
    state = kind.state

    def counted(self, x, past):
        made = state(self, x, past)
        alive.append(None)
        weakref.finalize(made.untyped_storage(), alive.pop)
        counts.append(len(alive))
        return made

    monkeypatch.setattr(kind, "state", counted)
    x = make_video(17) if "encode" in run else torch.randn(1, 4, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    if "stream" in run:
        list(getattr(vae, run)(x.split(2, dim=2), num_frames=x.shape[2] if "encode" in run else None))
    else:
        getattr(vae, run)(x)
    network = vae.encoder if "encode" in run else vae.decoder
    layers = sum(isinstance(layer, TemporalConv3d) and layer.temporal_stride == 1 for layer in network.modules())
    assert len(counts) > 3 * layers
    assert max(counts) == layers + 1


@torch.no_grad()
def test_a_model_can_be_copied_between_chunks(make_vae, make_video):
    vae, video = make_vae(), make_video(8)
    expected = vae.encode(video).latent_dist.parameters
    first, cache = vae.encode_chunk(video[:, :, :4])
    second, _ = copy.deepcopy(vae).encode_chunk(video[:, :, 4:], copy.deepcopy(cache))
    close(torch.cat([first, second], dim=2), expected)
