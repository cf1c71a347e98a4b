"""The ablations (examples/ablations): pairs, resuming, the schedule, intervals."""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import video_files

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "ablations"))

import arms
import bootstrap
import clips
import reporting
import run
import schedule
import settings as ablation_settings
import training_runs as runs

SMALL = ablation_settings.load_settings("small")


@pytest.fixture
def tiny(tmp_path: Path) -> runs.Place:
    """A scale of seconds: 12 synthetic videos, 16x16 pixels, models of two levels."""
    data = tmp_path / "clips"
    data.mkdir()
    for index in range(12):
        frames = np.roll(video_files.numbered_frames(40, 48, 64), 3 * index, axis=2)
        video_files.encode(data / f"{index:02d}.mp4", frames, rate=(12, 24, 30)[index % 3])
    lists = tmp_path / "lists.txt"
    lists.write_text("[train]\n" + "".join(f"{i:02d}.mp4\n" for i in range(6)) + "[validation]\n06.mp4\n07.mp4\n")
    made = dataclasses.replace(
        SMALL,
        clips=dataclasses.replace(
            SMALL.clips, train=f"{lists}:train", validation=f"{lists}:validation", size=16, cache_short_side=24,
            window_side=(16, 24), test_frames=8,
        ),
        image=dataclasses.replace(
            SMALL.image, steps=4, weak_steps=2, batch=2,
            network={"block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
        ),
        training=dataclasses.replace(
            SMALL.training, steps=8, sweep_steps=4, frames=4, curve=(0, 2, 4, 8), checkpoint_every=2, gradients_every=2,
            lpips_weight=0.0,
        ),
    )  # fmt: skip
    return runs.Place(data, tmp_path / "out", made, torch.device("cpu"))


@pytest.fixture
def tiny_image_vae(tiny: runs.Place, monkeypatch: pytest.MonkeyPatch) -> runs.Place:
    """With random image VAEs in place: what they can do is not tested."""
    torch.manual_seed(0)
    for which in ("strong", "weak"):
        arms.image_network(tiny.settings).save_pretrained(tiny.image_vae(which, 0))
    options = {"temporal_downsample": (True,)}
    monkeypatch.setitem(runs.ARMS, "tdc", arms.Arm(options=options))
    monkeypatch.setitem(runs.ARMS, "conv", arms.Arm(options=options | {"temporal_operator": "conv"}))
    monkeypatch.setitem(runs.ARMS, "as_tdc", dataclasses.replace(runs.ARMS["conv"], coordinates="tdc"))
    return tiny


def weights(place: runs.Place, task: runs.Task) -> dict[str, torch.Tensor]:
    return torch.load(place.work / task.run / "state.pt", weights_only=True)["model"]


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step(tiny):
    lists = clips.split_clips(tiny.data, tiny.settings.clips)
    frames = clips.open_frames(tiny.data, tiny.work, tiny.settings.clips)

    def batches(seed: int, first: int) -> list[torch.Tensor]:
        data = clips.TrainingClips(frames, lists["train"], tiny.settings.clips, seed, clips.VIDEOS, 5, 2)
        return list(data.batches(first, 6, workers=0))

    whole, resumed, other = batches(0, 0), batches(0, 3), batches(1, 0)
    assert all(batch.shape == (2, 3, 5, 16, 16) and batch.abs().max() <= 1 for batch in whole)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_no_clip_is_trained_and_tested_on(tiny):
    lists = clips.split_clips(tiny.data, tiny.settings.clips)
    assert {name: len(part) for name, part in lists.items()} == {"train": 6, "validation": 2, "test": 4}
    assert not any(set(a) & set(b) for a, b in itertools.combinations(lists.values(), 2))
    both = dataclasses.replace(tiny.settings.clips, validation=tiny.settings.clips.train)
    with pytest.raises(ValueError, match="train and validation"):
        clips.split_clips(tiny.data, both)


def test_windows_keep_their_rate_and_stay_in_the_clip(tiny):
    frames = clips.open_frames(tiny.data, tiny.work, tiny.settings.clips)
    assert str(frames.fps["01.mp4"]) == "24"
    clip = frames.clip("01.mp4")
    for start in (0.0, 0.5, 0.999):
        taken = frames.take("01.mp4", 9, start, 12)  # every second frame of 40: 17 are covered
        first = min(int(start * 24), 23)
        assert torch.equal(taken, clip[:, first : first + 17 : 2])
    assert torch.equal(frames.take("00.mp4", 9, 0.0, 24), frames.clip("00.mp4")[:, :9])  # 12 a second: none is repeated


def test_files_and_cache_hold_the_same_frames(tiny):
    cached = clips.open_frames(tiny.data, tiny.work, dataclasses.replace(tiny.settings.clips, cache_short_side=48))
    read = clips.Files(tiny.data)
    for start in (0.0, 0.4):
        assert torch.equal(cached.take("01.mp4", 5, start, 24), read.take("01.mp4", 5, start, 24))


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_ends_as_an_unbroken_one(tiny_image_vae):
    place = tiny_image_vae
    for arm in ("tdc", "as_tdc"):
        runs.run_arm(place, runs.Task(arm, 0, 1e-3, 2))
        runs.run_arm(place, runs.Task(arm, 0, 1e-3, 4))
        broken = place.result(f"{arm}-s0-r0.001")
        stopped = weights(place, runs.Task(arm, 0, 1e-3, 4))
        whole = dataclasses.replace(place, out=place.out.parent / f"whole-{arm}")
        whole.work.mkdir(parents=True)
        (whole.work / "image-s0").symlink_to(place.work / "image-s0")
        runs.run_arm(whole, runs.Task(arm, 0, 1e-3, 4))
        unbroken = weights(whole, runs.Task(arm, 0, 1e-3, 4))
        assert all(torch.equal(stopped[name], unbroken[name]) for name in unbroken)
        assert broken["curve"] == whole.result(f"{arm}-s0-r0.001")["curve"]
        assert [row["step"] for row in broken["curve"]] == [0, 2, 4]


def test_plain_kernels_in_tdc_coordinates_are_trained_as_tdc_is(tiny_image_vae):
    place = tiny_image_vae
    curves = {}
    for arm in ("tdc", "conv", "as_tdc"):
        runs.run_arm(place, runs.Task(arm, 0, 2e-3, 4))
        curves[arm] = np.array([row["test"] for row in place.result(f"{arm}-s0-r0.002")["curve"]])
    assert np.abs(curves["tdc"][0] - curves["conv"][0]).max() < 1e-3  # one start, in dB
    assert np.abs(curves["tdc"] - curves["as_tdc"]).max() < 2e-3
    assert np.abs(curves["tdc"][-1] - curves["conv"][-1]).max() > 2e-2


def test_image_vae_leaves_a_weaker_and_a_stronger_self(tiny, monkeypatch):
    monkeypatch.setattr(runs.measuring, "_lpips", lambda *args: 0.5)  # its weights are not everywhere
    runs.run_image(tiny, runs.Task("image", 0, 1e-3, 4))
    sources = [tiny.image_vae(which, 0) for which in ("weak", "strong")]
    weak, strong = (arms.build(arms.Arm(options={"temporal_downsample": (True,)}), tiny.settings, s, 0) for s in sources)
    assert not torch.equal(weak.encoder.conv_in.weight, strong.encoder.conv_in.weight)
    results = [tiny.result(f"image_{which}-s0") for which in ("weak", "strong")]
    assert [result["steps"] for result in results] == [2, 4]
    assert len(results[0]["final"]["image_psnr"]) == 4


def test_every_arm_can_be_built_and_reconstructs(tmp_path):
    arms.image_network(SMALL).save_pretrained(tmp_path / "image")
    for name, arm in arms.ARMS.items():
        model = arms.build(arm, SMALL, str(tmp_path / "image") if arm.image_vae else None, seed=0).eval()
        video = torch.rand(1, 3, 8 + int(arm.separate), 32, 32) * 2 - 1
        with torch.no_grad():
            sample, mean, _ = arms.reconstruct(model, video, torch.Generator().manual_seed(0))
        assert sample.shape == video.shape, name
        assert mean.shape[1] == (32 if arm.long else 16), name
        assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6, name


def test_keyframe_start_is_the_image_vae_and_random_temporal_is_not(tmp_path):
    torch.manual_seed(1)
    image = arms.image_network(SMALL).eval()
    image.save_pretrained(tmp_path / "image")
    still = (torch.rand(1, 3, 1, 32, 32) * 2 - 1).expand(-1, -1, 4, -1, -1).contiguous()
    with torch.no_grad():
        wanted = image.decode(image.encode(still[:, :, 0]).latent_dist.mode()).sample
        errors = {}
        for name in ("group_tdc", "causal_conv", "random_temporal"):
            model = arms.build(arms.ARMS[name], SMALL, str(tmp_path / "image"), seed=0).eval()
            errors[name] = (arms.reconstruct(model, still, None)[0][:, :, -1] - wanted).abs().max().item()
    assert errors["group_tdc"] < 1e-4
    assert errors["causal_conv"] < 1e-4
    assert errors["random_temporal"] > 1e-2


def test_peers_are_of_our_size():
    def measure(name: str) -> tuple[float, float]:
        arm = arms.ARMS[name]
        with torch.device("meta"):
            model = arms.build(arm, SMALL, None, seed=0)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return parameters, runs.forward_flops(model, 8 + int(arm.separate), 1, 64)

    parameters, flops = measure("scratch")
    for name in ("wan", "hunyuan", "cogvideox"):
        peer_parameters, peer_flops = measure(name)
        assert abs(peer_parameters / parameters - 1) < 0.1, name
        assert abs(peer_flops / flops - 1) < 0.1, name


# Schedule ------------------------------------------------------------------------------------------------------------


def fake(place: runs.Place, arm: str, seed: int, rate: float, steps: int, score: float, **more) -> None:
    curve = [{"step": place.settings.training.sweep_steps, "validation": [score, score]}]
    run = runs.Task(arm, seed, rate, steps).run
    values = {"arm": arm, "seed": seed, "rate": rate, "steps": steps, "diverged": False, "curve": curve}
    runs.write_json(place.results / f"{run}.json", values | more)


def test_a_sweep_grows_until_the_best_rate_is_inside(tiny):
    low, middle, high = tiny.settings.training.rates
    scores = {low: 20.0, middle: 22.0, high: 23.0}
    tasks, best, _ = schedule.sweep(tiny, "group_tdc")
    assert [task.rate for task in tasks] == [low, middle, high]
    assert best is None
    for rate, score in scores.items():
        fake(tiny, "group_tdc", 0, rate, 4, score)
    tasks, best, known = schedule.sweep(tiny, "group_tdc")
    assert best is None
    assert len(tasks) == 4
    assert len(known) == 3
    fake(tiny, "group_tdc", 0, tasks[-1].rate, 4, float("nan"), diverged=True, curve=[])
    tasks, best, known = schedule.sweep(tiny, "group_tdc")
    assert best == high
    assert known[tasks[-1].rate] == float("-inf")


def test_seeds_come_one_after_the_other_and_what_is_done_is_left(tiny):
    for arm in arms.SUITES["table4"].arms:
        for rate, score in zip(tiny.settings.training.rates, (20, 22, 21), strict=True):
            fake(tiny, arm, 0, rate, 4, score)
    tasks = schedule.plan(tiny, ["table4", "table6"]).tasks
    full = [task for task in tasks if task.steps == 8]
    best = tiny.settings.training.rates[1]
    assert [(t.seed, t.arm) for t in full[:4]] == [(0, arm) for arm in arms.SUITES["table4"].arms]
    assert [t.seed for t in full] == sorted(t.seed for t in full)
    assert {t.rate for t in full} == {best}
    assert not schedule.is_ready(tiny, full[0])
    done, total, seconds = schedule.time_left(tiny, ["table4", "table6"])
    # Fakes wrote no progress: three rates of four arms have come to step 4, and the best of them is not yet done at 8.
    assert done == 8 * 4
    assert seconds is None
    # Three image VAEs of 4 steps; four arms at three seeds of 8 steps, and two more rates each up to 4; `separate` has its
    # sweep of three rates and three runs of 8, the first of them from 4 on.
    assert total == 3 * 4 + 12 * 8 + 8 * 4 + 3 * 4 + 3 * 8 - 4
    assert {task.arm for task in schedule.plan(tiny, ["table4"], ["causal_tdc"]).tasks} == {"image", "causal_tdc"}


def test_another_seed_is_run_at_the_rates_that_were_found(tiny):
    best = tiny.settings.training.rates[1]
    for arm in arms.SUITES["table4"].arms:
        for rate, score in zip(tiny.settings.training.rates, (20, 22, 21), strict=True):
            fake(tiny, arm, 0, rate, 4, score)
    again = dataclasses.replace(tiny, settings=dataclasses.replace(tiny.settings, seeds=(3,)))
    left = [task for task in schedule.plan(again, ["table4"]).tasks if not schedule.is_done(again, task)]
    assert [(task.arm, task.seed) for task in left] == [(arm, 3) for arm in ("image", *arms.SUITES["table4"].arms)]
    assert {task.rate for task in left[1:]} == {best}
    assert reporting.runs_there(again, arms.SUITES["table4"].claims[0]) == (6, 8)  # two sweeps of three, two runs to come


def test_a_suite_from_image_vae_to_report(tiny, monkeypatch):
    monkeypatch.setattr(runs.measuring, "_lpips", lambda *args: 0.5)  # its weights are not everywhere
    monkeypatch.setattr(schedule, "_MOST_RATES", 3)
    options = {"temporal_downsample": (True,)}
    monkeypatch.setitem(arms.ARMS, "tdc", arms.Arm(options=options))
    monkeypatch.setitem(arms.ARMS, "apart", arms.Arm(options=options | {"first_frame": "separate"}, start="weak"))
    claims = (
        arms.difference("psnr", "tdc", "apart", 0.1),
        arms.difference("first", "tdc", "apart", 0.1, "first_psnr"),
        arms.difference("images", "tdc", "image_strong", 0.1, "image_psnr"),
        arms.Claim("repeats", ((1.0, "apart", "image_repeated_psnr"), (-1.0, "apart", "image_psnr")), 0.1),
    )
    monkeypatch.setitem(arms.SUITES, "tiny", arms.Suite("Tiny", ("tdc", "apart"), claims))
    place = dataclasses.replace(tiny, settings=dataclasses.replace(tiny.settings, seeds=(0, 1)))
    claimed = [run.claim(place, ["tiny"], None, set()) for _ in range(2)]  # a second worker gets the next one
    assert [task.run for task, _ in claimed] == ["image-s0", "image-s1"]
    assert run.claim(place, ["tiny"], None, set()) == "wait"
    for _, lock in claimed:
        os.close(lock)
    assert run.work(place, ["tiny"]) == 0
    assert run.claim(place, ["tiny"], None, set()) == "finished"
    done, total, seconds = schedule.time_left(place, ["tiny"])
    assert done == total
    assert seconds == 0
    text = reporting.report(place, ["tiny"])
    assert text.count(" dB (") == 4  # every claim has its interval
    assert "not run yet" not in text
    final = next(iter(reporting.arm_results(place, "apart").values()))["final"]
    assert len(final["clips"]) == len(final["psnr"]) == len(final["image_psnr"]) == 4
    assert all(len(windows) == 2 for windows in final["psnr"])
    assert len(final["psnr_by_frame"]) == 8
    gradients = next(iter(reporting.arm_results(place, "tdc").values()))["gradients"]
    assert [row["step"] for row in gradients] == [0, 2, 4, 6]
    assert gradients[0]["layers"]["encoder.conv_in"]["beside_anchor"] == 0  # the zero start


def test_a_run_that_fails_is_told_and_does_not_stop_the_others(tiny, monkeypatch, capsys):
    done = []

    def run_task(place: runs.Place, task: runs.Task) -> None:
        if task.arm == "image":
            raise RuntimeError("no image VAE today")
        done.append(task)
        fake(place, task.arm, task.seed, task.rate, task.steps, -task.rate, diverged=True, curve=[])

    monkeypatch.setattr(run, "run_task", run_task)
    assert run.work(tiny, ["table2"], ["scratch", "group_tdc"]) == 3  # the image VAEs of three seeds
    assert {task.arm for task in done} == {"scratch"}
    assert "image-s0 failed" in capsys.readouterr().out
    assert "no image VAE today" in (tiny.work / "image-s0" / "error.txt").read_text()


# Intervals -----------------------------------------------------------------------------------------------------------


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for trial in range(150):
        values = (
            0.3 + 0.1 * rng.standard_normal((3, 1)) + 0.5 * rng.standard_normal((1, 40)) + 0.1 * rng.standard_normal((3, 40))
        )
        found = bootstrap.interval(values, draws=600, seed=trial)
        covered.append(found.low <= 0.3 <= found.high)
    assert 0.87 <= np.mean(covered) <= 0.99
    assert found.seeds == 3
    assert found.clips == 40


def test_interval_of_one_seed_is_over_clips_and_of_equal_values_is_a_point():
    values = np.random.default_rng(1).standard_normal((1, 400))
    found = bootstrap.interval(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    point = bootstrap.interval(np.full((3, 5), 0.25))
    assert (point.low, point.mean, point.high, point.sign) == (0.25, 0.25, 0.25, 1)
    with pytest.raises(ValueError, match="finite"):
        bootstrap.interval(np.array([[1.0, np.inf]]))


def test_steps_to_reach():
    steps = np.array([0.0, 100, 200, 400])
    assert bootstrap.steps_to_reach(steps, np.array([10.0, 20, 22, 23]), 21.0) == 150
    assert bootstrap.steps_to_reach(steps, np.array([10.0, 20, 22, 23]), 24.0) == np.inf
    slow = np.repeat(np.array([10.0, 12, 16, 20])[None, :, None], 6, axis=2)
    fast = np.repeat(np.array([10.0, 20, 22, 23])[None, :, None], 6, axis=2)
    assert bootstrap.ratio_of_steps(steps, fast, slow, draws=50) == (0.25, 0.25, 0.25)


def test_report_tells_what_was_found(tiny):
    rates = tiny.settings.training.rates
    for arm, level in {"group_tdc": 30.0, "group_conv": 29.5, "causal_tdc": 29.0, "causal_conv": 29.2}.items():
        for rate in rates:
            fake(tiny, arm, 0, rate, 4, 20 if rate != rates[1] else 22, seconds=1, cpu_seconds=1, device="cpu")
        for seed in tiny.settings.seeds:
            per_clip = [[level + clip, level + clip + 0.1] for clip in range(5)]
            final = {"clips": list("abcde"), "psnr": per_clip, "lpips": [[0.1, 0.1]] * 5}
            curve = [{"step": s, "test": [level + s] * 5, "validation": [22.0]} for s in (0, 4, 8)]
            more = {"final": final, "curve": curve, "parameters": 10, "forward_flops": 1e9, "seconds": 60, "cpu_seconds": 50}
            fake(tiny, arm, seed, rates[1], 8, 22, device="cpu", **more)
    (tiny.out.parent / "page.md").write_text("# Page\n<!-- claims -->\nold\n<!-- /claims -->\nrest\n")
    reporting.publish(tiny, ["table4"], tiny.out.parent / "page")
    published = (tiny.out.parent / "page.md").read_text()
    assert "old" not in published
    assert published.startswith("# Page\n<!-- claims -->\n| claim |")
    assert published.endswith("<!-- /claims -->\nrest\n")
    reporting.publish(tiny, ["table5"], tiny.out.parent / "page")  # the other suite stays in the table
    assert all(f"| {suite}: " in (tiny.out.parent / "page.md").read_text() for suite in ("table4", "table5"))
    again = dataclasses.replace(tiny, out=tiny.out.parent / "page")
    text = reporting.report(again, ["table4"])  # from what was published
    assert text == reporting.report(tiny, ["table4"])
    assert "| table4: TDC improves group causal convolutions | +0.30 dB | +0.50 dB (+0.50 to +0.50) | shows |" in text
    assert "| table4: TDC improves causal convolutions | +0.35 dB | -0.20 dB (-0.20 to -0.20) | the opposite shows |" in text
    assert "running: 10 of 20 runs" in reporting.report(tiny, ["table5"])  # the weaker image VAE's arms have none
    page = (tiny.out / "report" / "table4.md").read_text()
    assert f"**{rates[1]:.3g}: 22.00**" in page
    assert (tiny.out / "report" / "table4.png").stat().st_size > 1000
    assert json.loads((tiny.results / f"group_tdc-s0-r{rates[1]:.3g}.json").read_text())["steps"] == 8


def test_a_claim_of_equality_shows_if_all_of_its_interval_is_near():
    equal = arms.Claim("equal", (), None, within=0.05)
    for low, high, said in ((-0.01, 0.04, "shows"), (0.01, 0.06, "does not show"), (-0.2, -0.1, "the opposite shows")):
        found = bootstrap.Interval((low + high) / 2, low, high, 3, 50, 0.0, 0.0)
        place = SimpleNamespace(settings=SimpleNamespace(seeds=(0, 1, 2)))
        assert reporting.verdict(place, equal, found) == said


def test_every_claim_names_arms_of_its_suite():
    for suite in arms.SUITES.values():
        for claim in suite.claims:
            assert {arm for _, arm, _ in claim.terms} <= {*suite.arms, "image_strong"}
        assert set(suite.arms) <= set(arms.ARMS)


def test_scales_are_read_and_wrong_ones_refused(tmp_path):
    assert ablation_settings.load_settings("paper").training.rates[1] == 1e-5
    again = ablation_settings.load_settings("small", [3, 4])
    assert (again.seeds, again.sweep_seed) == ((3, 4), ablation_settings.load_settings("small").seeds[0])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("seeds: [0]\nclips: {sise: 3}\n")
    with pytest.raises(ValueError, match="sise"):
        ablation_settings.load_settings(str(wrong))
    with pytest.raises(ValueError, match="scale is 'large'"):
        ablation_settings.load_settings("large")
