"""How frames make whole groups: what is repeated, what is kept, what a stream hands on."""

import pytest
import torch

from vc_vae_diffusers.autoencoder.frame_groups import FrameGroups, repeat_frames

SCHEMES = [("in_sequence", "4k"), ("in_sequence", "4k+1"), ("separate", "4k"), ("separate", "4k+1")]


@pytest.mark.parametrize(("first_frame", "convention"), SCHEMES)
@pytest.mark.parametrize("size", [1, 4, 8])
def test_every_length_makes_whole_groups_and_is_kept(first_frame, convention, size):
    groups = FrameGroups(size, first_frame, convention)
    for num_frames in range(1, 3 * size + 2):
        missing = groups.missing(num_frames)
        total = num_frames + missing
        assert 0 <= missing < size
        assert (total - groups.alone) % size == 0
        groups.check_chunk(total, start=True)
        assert groups.total(groups.latent_frames(num_frames)) == total
        skip, keep = groups.kept(total, num_frames)
        assert keep == num_frames
        assert skip == (missing if groups.front_padded else 0)


def test_counts_of_frames_and_latent_frames():
    counts = {scheme: FrameGroups(4, *scheme) for scheme in SCHEMES[:3]}
    in_sequence, plus_one, separate = counts.values()
    for num_frames, expected in ((1, (1, 1, 1)), (4, (1, 1, 2)), (5, (2, 2, 2)), (6, (2, 2, 3)), (17, (5, 5, 5))):
        assert tuple(groups.latent_frames(num_frames) for groups in (in_sequence, plus_one, separate)) == expected
    assert [in_sequence.frames(n) for n in (1, 2, 5)] == [4, 8, 20]
    assert [plus_one.frames(n) for n in (1, 2, 5)] == [1, 5, 17]
    assert [separate.frames(n) for n in (1, 2, 5)] == [1, 5, 17]
    for groups in counts.values():
        assert [groups.latent_frames(groups.frames(n)) for n in range(1, 9)] == list(range(1, 9))


def test_causal_pipelines_expect_one_frame_more_than_whole_groups():
    groups = FrameGroups(4, "in_sequence", "4k+1")
    assert groups.kept(12, None) == (3, 9)
    assert FrameGroups(4, "in_sequence", "4k").kept(12, None) == (0, 12)
    assert not FrameGroups(4, "separate", "4k+1").front_padded


def test_lengths_of_other_clips_are_refused():
    with pytest.raises(ValueError, match=r"num_frames is 13, the latents are of a clip of 1 to 12 frames"):
        FrameGroups(4, "in_sequence", "4k").kept(12, 13)
    with pytest.raises(ValueError, match=r"num_frames is 8, the latents are of a clip of 9 to 12 frames"):
        FrameGroups(4, "in_sequence", "4k+1").kept(12, 8)
    with pytest.raises(ValueError, match=r"frames has 6 frames, a chunk must have a multiple of 4"):
        FrameGroups(4, "in_sequence", "4k").check_chunk(6, start=True)
    with pytest.raises(ValueError, match=r"frames has 4 frames, a chunk must have 1 \+ 4\*n"):
        FrameGroups(4, "separate", "4k").check_chunk(4, start=True)


def test_a_stream_hands_on_complete_groups():
    together = FrameGroups(4, "in_sequence", "4k")
    assert [together.ready(n, start=True, most=2) for n in (0, 3, 4, 7, 8, 20)] == [0, 0, 4, 4, 8, 8]
    separate = FrameGroups(4, "separate", "4k")
    assert [separate.ready(n, start=True, most=2) for n in (0, 1, 9)] == [0, 1, 1]
    assert separate.ready(9, start=False, most=2) == 8


def test_repeated_frames():
    x = torch.arange(3.0).view(1, 1, 3, 1, 1)
    assert repeat_frames(x, 0, front=True) is x
    assert repeat_frames(x, 2, front=True).flatten().tolist() == [0, 0, 0, 1, 2]
    assert repeat_frames(x, 2, front=False).flatten().tolist() == [0, 1, 2, 2, 2]
