"""examples/train_latte.py and sample_latte.py on a tiny Latte and synthetic clips: cache, exact resume, EMA, samples."""

import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tiny_models import MEAN, STD, tiny_vae
from typer.testing import CliRunner

from vc_vae_diffusers.cli import evaluate as commands
from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.evaluation import networks
from vc_vae_diffusers.generation.diffusion_losses import learned_range_loss
from vc_vae_diffusers.generation.pipeline_latte import LatteVCVAEUnconditionalPipeline
from vc_vae_diffusers.metrics import fvd as fvd_module
from vc_vae_diffusers.metrics.i3d import I3D
from vc_vae_diffusers.training import latent_cache, program
from vc_vae_diffusers.training import latte as train_latte
from vc_vae_diffusers.training.clip_plan import ClipRequest
from vc_vae_diffusers.training.data import DataError, ReadHealth
from vc_vae_diffusers.training.trainer import NonFiniteError
from vc_vae_diffusers.video import VideoReader, VideoWriter, read_clip

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = '{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}'
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sample_latte = load_example("sample_latte")
cut_clips, plot_tiny_latte = load_example("cut_clips"), load_example("plot_tiny_latte")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny VC-VAE, and four clips of drifting gradients in two folders."""
    folder = tmp_path_factory.mktemp("latte")
    tiny_vae().save_pretrained(folder / "vae")
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 32), torch.linspace(0, 3, 40), indexing="ij")
    for index in range(4):
        path = folder / "clips" / ("sea", "sky")[index % 2] / f"clip{index}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = [torch.stack([torch.sin(rows + columns * index + 0.3 * t + c) for c in range(3)]) for t in range(20)]
        with VideoWriter(path, fps=24, codec="lossless") as writer:
            writer.write(torch.stack(frames, dim=1))
    return folder


def options(folder: Path, output: Path, **changes) -> list[str]:
    values = {"data": folder / "clips", "vae": folder / "vae", "output": output, "size": "S/2", "transformer_config": TINY}
    values |= {"resolution": 32, "num_frames": 8, "fps": 0, "batch_size": 2, "learning_rate": 1e-3, "tracker": "none"}
    values |= {"mixed_precision": "no"}
    values |= {"steps": 6, "checkpoint_every": 2, "log_every": 2, "sample_every": 0, "clip_after": 3, "num_threads": 1}
    values |= {"latent_cache": folder / "cache", "cache_clips": 10, "cache_shard_clips": 4, "cache_dtype": "float32"}
    arguments = [(f"--{name}", str(value)) for name, value in {**values, **changes}.items() if value is not None]
    return [word for pair in arguments for word in pair]


def parse(argv: list[str]) -> train_latte.Config:
    return train_latte.Config.parse(argv)


def trainer(folder: Path, output: Path, **changes):
    config = parse(options(folder, output, **changes))
    return train_latte.LatteTrainer(config, Accelerator(cpu=True))


def train(folder: Path, output: Path, **changes) -> dict[str, torch.Tensor]:
    """Train to the end in this process and return the averaged weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    program.main("latte", options(folder, output, **changes))
    return load_file(output / "pipeline" / "transformer" / WEIGHTS)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# Processes that start where imports are done once: a fork of this one could not run backward passes.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["accelerate", "transformers", "vc_vae_diffusers.generation.pipeline_latte", "vc_vae_diffusers.training.trainer"]
)


def run_main(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    program.main("latte", arguments)


def start(arguments: list[str], **environment: str) -> multiprocessing.Process:
    process = processes.Process(target=run_main, args=(arguments, environment))
    process.start()
    return process


# ------------------------------------------------------------------------------------------------------- the cache


def test_cached_posteriors_are_those_of_the_clips_and_have_exact_statistics(folder, tmp_path):
    run = trainer(folder, tmp_path)
    cache, dataset, vae = run.cache, run.dataset(), tiny_vae()
    assert len(cache) == 10
    assert [path.name for path in sorted((folder / "cache").glob("*.safetensors"))] == [
        f"latents-{shard:05d}.safetensors" for shard in range(3)
    ]
    stored = torch.cat([load_file(path)["posteriors"] for path in sorted((folder / "cache").glob("*.safetensors"))])
    for ordinal in (0, 5, 9):
        item = dataset[ClipRequest(0, 0, ordinal)]
        with torch.no_grad():
            posterior = vae.encode(item["video"][None]).latent_dist
        expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0]
        torch.testing.assert_close(stored[ordinal], expected, rtol=0, atol=1e-5)
        assert cache.clips()[ordinal] == item["clip"]
    mean, logvar = stored.double().transpose(0, 1).chunk(2)
    center = mean.mean(dim=(1, 2, 3, 4))
    variance = mean.var(dim=(1, 2, 3, 4), unbiased=False) + logvar.exp().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(torch.tensor(cache.latents_mean, dtype=torch.float64), center, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.tensor(cache.latents_std, dtype=torch.float64), variance.sqrt(), rtol=0, atol=1e-9)


def test_each_epoch_visits_every_cached_clip_once_in_its_own_order(folder, tmp_path):
    cache = trainer(folder, tmp_path).cache
    epochs = [[cache[ClipRequest(0, 0, 10 * epoch + place)] for place in range(10)] for epoch in range(2)]
    for items in epochs:
        assert sorted(item["clip"] for item in items) == sorted(cache.clips())
    assert [item["clip"] for item in epochs[0]] != [item["clip"] for item in epochs[1]]
    assert len({item["noise_seed"] for items in epochs for item in items}) == 20


def test_a_killed_encoding_goes_on_and_other_settings_are_refused(folder, tmp_path):
    run = trainer(folder, tmp_path, latent_cache=tmp_path / "cache")
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    whole = {path: path.read_bytes() for path in shards}
    shards[1].unlink()
    (tmp_path / "cache" / latent_cache.INDEX_NAME).unlink()
    with pytest.raises(ValueError, match="did not finish"):
        latent_cache.LatentCache(tmp_path / "cache", 0)
    kept = shards[0].stat().st_mtime_ns
    assert trainer(folder, tmp_path, latent_cache=tmp_path / "cache").cache.latents_std == run.cache.latents_std
    assert {path: path.read_bytes() for path in shards} == whole
    assert shards[0].stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"other settings: flip was False, is True.*Name another folder"):
        trainer(folder, tmp_path, latent_cache=tmp_path / "cache", flip=True)
    other = tmp_path / "other_vae"
    changed = tiny_vae()
    with torch.no_grad():
        changed.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    changed.save_pretrained(other)
    with pytest.raises(ValueError, match=r"vae was '[0-9a-f]{16}'"):
        trainer(folder, tmp_path, latent_cache=tmp_path / "cache", vae=other)


def test_a_cache_belongs_to_its_clips_and_weights_wherever_they_lie(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    run = trainer(folder, tmp_path, latent_cache=cache)
    shutil.copytree(folder / "clips", tmp_path / "moved")
    tiny_vae(scaling_factor=0.5).save_pretrained(tmp_path / "vae")  # as after `vcvae stats --write`: the same latents
    monkeypatch.chdir(tmp_path)
    again = trainer(folder, tmp_path, latent_cache=cache, data=tmp_path / "moved", vae="vae")
    assert again.cache.latents_std == run.cache.latents_std
    (tmp_path / "moved" / "sea" / "clip0.mkv").write_bytes((folder / "clips" / "sky" / "clip1.mkv").read_bytes())
    with pytest.raises(ValueError, match=r"other settings: files was '[0-9a-f]{16}'.*Name another folder"):
        trainer(folder, tmp_path, latent_cache=cache, data=tmp_path / "moved")


def test_collections_of_equal_names_and_sizes_differ_by_content(tmp_path):
    digests = []
    for content in (b"one", b"two"):
        (tmp_path / "x.mp4").write_bytes(content)
        digests.append(latent_cache.files_fingerprint([str(tmp_path / "x.mp4")], tmp_path))
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("first_frame", "num_frames", "length"), [("separate", 9, 3), ("separate", 8, 3), ("in_sequence", 6, 2)]
)
def test_every_frame_count_rule_trains(folder, tmp_path, first_frame, num_frames, length):
    tiny_vae(first_frame=first_frame).save_pretrained(tmp_path / "vae")
    changes = {"vae": tmp_path / "vae", "latent_cache": None, "num_frames": num_frames, "batch_size": 1, "steps": 1}
    train(folder, tmp_path / "run", **changes, sample_every=1, samples=1, sampling_steps=1)
    pipeline = LatteVCVAEUnconditionalPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.transformer.config.video_length == length
    assert read_clip(tmp_path / "run" / "samples" / "step-00000001.mp4", num_frames=num_frames).shape[1] == num_frames


def test_unreadable_videos_stop_the_encoding(folder, tmp_path):
    (tmp_path / "clips").mkdir()
    for index in range(3):
        (tmp_path / "clips" / f"broken{index}.mp4").write_bytes(b"not a video")
    with pytest.raises(DataError):
        trainer(folder, tmp_path, data=tmp_path / "clips", latent_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("latents-*"))


def test_folders_of_frames_are_clips_at_24_frames_a_second(folder, tmp_path):
    """SkyTimelapse comes so; fps 8 is then Latte's interval of 3."""
    frames = tmp_path / "sky_train" / "one"
    frames.mkdir(parents=True)
    for index in range(24):
        Image.new("RGB", (32, 32), (10 * index, 0, 0)).save(frames / f"{index:03d}.png")
    (tmp_path / "list.txt").write_text("sky_train/one\n")
    run = trainer(folder, tmp_path, data=tmp_path / "list.txt", latent_cache=None, fps=8)
    video = run.dataset()[ClipRequest(0, 0, 0)]["video"]
    red = ((video[0, :, 0, 0] + 1) * 127.5).round().int().tolist()
    assert [after - before for before, after in itertools.pairwise(red)] == [30] * 7


# --------------------------------------------------------------------------------------------------------- training


def test_a_killed_and_resumed_run_equals_an_unbroken_one(folder, tmp_path):
    whole = train(folder, tmp_path / "whole", classes=True, steps=40, log_every=3, lr_scheduler="cosine")
    process = start(options(folder, tmp_path / "killed", classes=True, steps=40, log_every=3, lr_scheduler="cosine"))
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("step-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "pipeline").exists()
    resumed = train(folder, tmp_path / "killed", classes=True, steps=40, log_every=3, lr_scheduler="cosine")
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    names = ("step", "loss", "mse", "vlb", "grad_norm")
    expected = [[row[name] for name in names] for row in rows(tmp_path / "whole")]
    assert [[row[name] for name in names] for row in rows(tmp_path / "killed")] == expected
    final = sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1]
    assert final.name == "step-00000040"
    for name, value in load_file(final / "ema" / WEIGHTS).items():
        assert torch.equal(value, whole[name]), name


def test_the_loss_falls(folder, tmp_path):
    train(folder, tmp_path, steps=60, log_every=20, checkpoint_every=60, batch_size=8)
    first, *_, last = rows(tmp_path)
    assert last["mse"] < 0.9 * first["mse"]
    assert abs(last["loss"] - last["mse"] - last["vlb"]) < 1e-4


def test_gradients_are_clipped_only_after_the_given_step(folder, tmp_path):
    run = trainer(folder, tmp_path, max_grad_norm=1e-3, clip_after=1)
    norms = []

    def record(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    run.main.optimizer.optimizer.register_step_pre_hook(record)
    steps = run.batches()
    measured = [run.train_step(next(steps))["grad_norm"] for _ in range(2)]
    assert measured[0] == pytest.approx(norms[0], rel=1e-5)
    assert measured[1] > 1e-2
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_warms_up_and_falls_as_configured(folder, tmp_path):
    run = trainer(folder, tmp_path, lr_scheduler="linear", warmup_steps=2, steps=6)
    rates = []
    for batches in run.batches():
        rates.append(run.main.optimizer.param_groups[0]["lr"])
        run.train_step(batches)
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_the_average_follows_the_weights(folder, tmp_path):
    run = trainer(folder, tmp_path, ema_decay=0.15)
    steps = run.batches()
    name, parameter = next((n, p) for n, p in run.model.named_parameters() if n == "final_layer.linear.bias")
    index = [n for n, _ in run.model.named_parameters()].index(name)
    average = parameter.detach().clone()
    for step in range(3):
        run.train_step(next(steps))
        decay = min(0.15, (1 + step) / (10 + step)) if step else 0.0  # diffusers starts from the first weights
        average = decay * average + (1 - decay) * parameter.detach()
        torch.testing.assert_close(run.ema.shadow_params[index], average, rtol=0, atol=1e-7)


def test_accumulation_and_encoding_at_every_step_train_the_same(folder, tmp_path):
    """Micro-batches do not matter, and the latents encoded on the fly are those of the clips."""
    weights, norms = [], []
    for batch, accumulation in ((4, 1), (2, 2)):
        run = trainer(
            folder, tmp_path, batch_size=batch, gradient_accumulation_steps=accumulation, latent_cache=None, clip_after=0
        )
        steps = run.batches()
        for _ in range(2):
            batches = next(steps)
            assert len(batches) == accumulation
            norms.append(run.train_step(batches)["grad_norm"])
        weights.append([parameter.detach().clone() for parameter in run.model.parameters()])
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-4)
    batch = batches[0]
    assert batch["video"].shape == (2, 3, 8, 32, 32)
    with torch.no_grad():
        posterior = tiny_vae().encode(batch["video"]).latent_dist
    torch.testing.assert_close(run.posteriors(batch)[:, :4], posterior.mean, rtol=0, atol=1e-5)


def test_the_loss_is_of_noised_normalised_posterior_samples(folder, tmp_path):
    run = trainer(folder, tmp_path)
    with torch.no_grad():  # the last layer starts at zero, and would show nothing
        run.model.final_layer.linear.weight.normal_(std=0.2)
    (batch,) = next(run.batches())
    actual = run.loss(batch)
    outputs, cleans, noises, times = [], [], [], []
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (MEAN, STD))
    for posterior, seed in zip(batch["posterior"], batch["noise_seeds"], strict=True):
        generator = torch.Generator().manual_seed(seed)
        center, logvar = posterior[:4], posterior[4:]
        latents = center + logvar.exp().sqrt() * torch.randn(4, 2, 4, 4, generator=generator)
        t = torch.randint(1000, (), generator=generator)
        noise = torch.randn(4, 2, 4, 4, generator=generator)
        clean = (latents - mean) / std
        noisy = bar[t].sqrt().float() * clean + (1 - bar[t]).sqrt().float() * noise
        outputs.append(run.model(noisy[None], t).sample)
        cleans, noises, times = [*cleans, clean], [*noises, noise], [*times, t]
    expected = learned_range_loss(
        torch.cat(outputs), torch.stack(cleans), torch.stack(noises), torch.stack(times), run.schedule
    )
    assert expected.vlb > 1e-3
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=1e-4, atol=0)


def test_the_weighting_by_signal_to_noise_reaches_the_loss(folder, tmp_path):
    plain, weighted = (trainer(folder, tmp_path, batch_size=8, min_snr_gamma=gamma) for gamma in (0.0, 1.0))
    (batch,) = next(plain.batches())
    one, other = plain.loss(batch), weighted.loss(batch)
    assert one.mse == other.mse
    timesteps = train_latte.draw(batch["posterior"], batch["noise_seeds"], 1000)[1]
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[timesteps]
    weight = ((1 - bar) / bar).clamp(max=1).float()
    assert weight.min() < 0.9
    with torch.no_grad():  # the untrained model predicts zero noise
        noise = train_latte.draw(batch["posterior"], batch["noise_seeds"], 1000)[2]
    expected = (weight * noise.square().mean(dim=(1, 2, 3, 4))).mean()
    torch.testing.assert_close(other.loss - other.vlb, expected, rtol=1e-4, atol=0)


def test_draws_depend_on_the_seed_of_the_clip_alone():
    posteriors = torch.randn(3, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents, timesteps, noise = train_latte.draw(posteriors, [5, 6, 7], 1000)
    alone = train_latte.draw(posteriors[1:2], [6], 1000)
    for batched, single in zip((latents, timesteps, noise), alone, strict=True):
        assert torch.equal(batched[1:2], single)
    assert len(set(timesteps.tolist())) == 3
    certain = torch.cat([posteriors[:, :4], torch.full_like(posteriors[:, 4:], -30.0)], dim=1)
    torch.testing.assert_close(train_latte.draw(certain, [5, 6, 7], 1000)[0], posteriors[:, :4], rtol=0, atol=1e-5)


def test_classes_are_the_folders_of_the_clips(folder, tmp_path):
    run = trainer(folder, tmp_path, classes=True)
    assert run.classes == ["sea", "sky"]
    assert run.model.config.num_classes == 2
    batch = next(run.batches())[0]
    assert run.labels(batch).tolist() == [int("/sky/" in clip) for clip in batch["clips"]]


def test_a_loss_that_is_not_finite_stops_before_weights_change(folder, tmp_path):
    run = trainer(folder, tmp_path)
    (batch,) = next(run.batches())
    batch["posterior"][1, 0, 0, 0, 0] = float("nan")
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(NonFiniteError, match=r"clip\d.mkv"):
        run.train_step([batch])
    assert all(torch.equal(one, two) for one, two in zip(before, run.model.parameters(), strict=True))


def test_data_statistics_reach_the_saved_pipeline_and_samples_are_logged(folder, tmp_path):
    train(
        folder,
        tmp_path,
        latent_statistics="data",
        steps=2,
        sample_every=1,
        samples=2,
        sampling_steps=2,
        tracker="tensorboard",
    )
    cache = latent_cache.LatentCache(folder / "cache", 0)
    pipeline = LatteVCVAEUnconditionalPipeline.from_pretrained(tmp_path / "pipeline")
    assert list(pipeline.vae.config.latents_mean) == cache.latents_mean
    assert list(pipeline.vae.config.latents_std) == cache.latents_std
    for step in (1, 2):
        clip = read_clip(tmp_path / "samples" / f"step-{step:08d}.mp4", num_frames=8)
        assert clip.shape == (3, 8, 32, 64)
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents.*"))
    assert b"samples" in events
    assert b"\x89PNG" in events


def test_sampling_for_the_log_does_not_disturb_training(folder, tmp_path):
    quiet = train(folder, tmp_path / "quiet", classes=True)
    sampled = train(folder, tmp_path / "sampled", classes=True, sample_every=1, samples=1, sampling_steps=2)
    for name, value in quiet.items():
        assert torch.equal(sampled[name], value), name


def test_two_processes_train_as_one_with_twice_the_batch(folder, tmp_path):
    whole = train(folder, tmp_path / "one", steps=3, batch_size=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = options(folder, tmp_path / "two", steps=3, batch_size=2)
    ranks = [start(arguments, **world, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    two = load_file(tmp_path / "two" / "pipeline" / "transformer" / WEIGHTS)
    for name, value in whole.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- configuration


def test_the_skytimelapse_recipe_is_lattes():
    config = parse(
        ["--config", str(EXAMPLES / "configs" / "latte_skytimelapse.yaml"), "--data", "a", "--vae", "b", "--output", "c"]
    ).flat()
    expected = {"size": "XL/2", "resolution": 256, "num_frames": 16, "fps": 8.0, "flip": False, "steps": 1_000_000}
    expected |= {"batch_size": 5, "learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 0.1, "clip_after": 20_000}
    expected |= {"ema_decay": 0.9999, "lr_scheduler": "constant", "mixed_precision": "no", "sampling_steps": 250}
    assert {name: config[name] for name in expected} == expected
    scheduler = train_latte.latte_scheduler(config["num_train_timesteps"])
    assert (scheduler.betas[0].item(), scheduler.betas[-1].item()) == pytest.approx((1e-4, 0.02))
    assert scheduler.config.variance_type == "learned_range"


def test_options_are_checked(folder, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"sizes": "XL/2"}))
    with pytest.raises(ValueError, match=r"sizes is no option; did you mean size\?"):
        parse(["--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(ValueError, match="--num_threads is -1, but must be a finite number from 0 on"):
        parse(options(folder, tmp_path, num_threads=-1))
    with pytest.raises(ValueError, match="--vae is required"):
        parse(["--data", "a", "--output", "b"])
    with pytest.raises(ValueError, match="give --latent_cache"):
        parse(options(folder, tmp_path, latent_cache=None, latent_statistics="data"))
    for changes, said in (
        ('{"num_layer": 2}', r"num_layer \(did you mean num_layers\?\)"),
        ('{"num_layers": [2]}', "num_layers is"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer(folder, tmp_path / "wrong", transformer_config=changes, latent_cache=None)
    train(folder, tmp_path / "run", steps=2)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "trainer.json").read_text())
    run = trainer(folder, tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match="launch as many"):
        run.restore({**state, "num_processes": 3})
    with pytest.raises(ValueError, match="video_length 2, the data 1"):
        trainer(folder, tmp_path / "more", num_frames=4, latent_cache=None, init_from=tmp_path / "run/pipeline/transformer")


# ---------------------------------------------------------------------------------------------------------- samples


def test_samples_are_files_that_a_later_call_completes(folder, tmp_path):
    train(folder, tmp_path / "run", classes=True, steps=2)
    arguments = ["--model", str(tmp_path / "run" / "pipeline"), "--steps", "2", "--device", "cpu"]
    sample_latte.main([*arguments, "--output", str(tmp_path / "five"), "--num", "5", "--batch_size", "5"])
    paths = sorted((tmp_path / "five").glob("*.mkv"))
    assert [path.name for path in paths] == [f"sample-{index:05d}.mkv" for index in range(5)]
    whole = [read_clip(path, num_frames=8) for path in paths]
    assert whole[0].shape == (3, 8, 32, 32)
    assert (whole[0] - whole[2]).abs().max() > 0.05  # the same class, other noise

    paths[3].unlink()
    kept = paths[0].stat().st_mtime_ns
    sample_latte.main([*arguments, "--output", str(tmp_path / "five"), "--num", "5", "--batch_size", "2"])
    assert paths[0].stat().st_mtime_ns == kept
    again = read_clip(paths[3], num_frames=8)
    assert (again - whole[3]).abs().max() <= 2 / 255 + 1e-6  # rounding to 8 bits apart
    ema = next((tmp_path / "run" / "checkpoints").glob("step-*")) / "ema"
    with pytest.raises(ValueError, match="transformer None, now"):
        sample_latte.main([*arguments, "--output", str(tmp_path / "five"), "--num", "5", "--transformer", str(ema)])
    sample_latte.main([*arguments, "--output", str(tmp_path / "ema"), "--num", "1", "--transformer", str(ema)])
    first = read_clip(tmp_path / "ema" / "sample-00000.mkv", num_frames=8)
    assert (first - whole[0]).abs().max() <= 2 / 255 + 1e-6  # the pipeline holds the average of the last checkpoint
    with pytest.raises(ValueError, match="--num is 0"):
        sample_latte.main([*arguments, "--output", str(tmp_path), "--num", "0"])


def read_all(path: Path, **options) -> torch.Tensor:
    with VideoReader(path, **options) as reader:
        return torch.cat(list(reader), dim=1)


def test_parts_of_videos_are_disjoint_and_random_clips_come_from_them(folder, tmp_path):
    source = str(folder / "clips")
    for name, span in (("train", ["0", "0.6"]), ("heldout", ["0.6", "1"])):
        cut_clips.main(["--data", source, "--span", *span, "--short_side", "16", "--output", str(tmp_path / name)])
    for path in sorted((folder / "clips").rglob("*.mkv")):
        whole = read_all(path, resize=16)
        train, heldout = (read_all(tmp_path / name / path.name) for name in ("train", "heldout"))
        assert (train.shape[1], heldout.shape[1]) == (12, 8)
        assert (torch.cat([train, heldout], dim=1) - whole).abs().max() <= 1 / 255 + 1e-6
    clips = ["--clips", "3", "--resolution", "16", "--num_frames", "4", "--fps", "0"]
    cut_clips.main(["--data", str(tmp_path / "train"), *clips, "--output", str(tmp_path / "real")])
    cut = sorted((tmp_path / "real").iterdir())
    assert [path.name for path in cut] == [f"clip-{index:05d}.mkv" for index in range(3)]
    parts = [read_all(path) for path in sorted((tmp_path / "train").iterdir())]
    for clip in map(read_all, cut):
        assert clip.shape == (3, 4, 16, 16)
        distances = [
            (part[:, start : start + 4, :, left : left + 16] - clip).abs().max()
            for part in parts
            for start in range(9)
            for left in range(5)
        ]
        assert min(distances) == 0
    for wrong in (["--span", "0.6", "0.5"], [], ["--span", "0", "1", "--clips", "2"]):
        with pytest.raises(ValueError, match="--span"):
            cut_clips.main(["--data", source, "--output", str(tmp_path / "no"), *wrong])


def test_from_training_to_fvd_and_figures(folder, tmp_path, monkeypatch):
    """The steps of train_tiny_latte.sh; I3D has random weights, since the real ones may not be here."""
    monkeypatch.setattr(networks, "_weights_used", lambda *_: "random weights")

    def random_i3d(*_):
        torch.manual_seed(0)
        return I3D().eval()

    monkeypatch.setattr(fvd_module, "load_i3d", random_i3d)
    changes = {"num_frames": 12, "latent_cache": tmp_path / "latents", "cache_clips": 4}
    train(folder, tmp_path / "run", steps=4, keep_checkpoints=9, **changes)
    cut = ["--data", str(folder / "clips"), "--resolution", "32", "--num_frames", "12", "--fps", "0", "--clips"]
    cut_clips.main([*cut, "3", "--output", str(tmp_path / "real")])
    cut_clips.main([*cut, "3", "--seed", "1", "--output", str(tmp_path / "training clips")])
    models = ["--model", f"training clips=samples:{tmp_path / 'training clips'}"]
    for step in (2, 4):
        output, weights = tmp_path / "samples" / str(step), tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "ema"
        arguments = ["--model", str(tmp_path / "run" / "pipeline"), "--transformer", str(weights), "--output", str(output)]
        sample_latte.main([*arguments, "--num", "3", "--steps", "2", "--device", "cpu"])
        models += ["--model", f"{step}=samples:{output}"]
    protocol = tmp_path / "protocol.yaml"
    recipe = (EXAMPLES / "configs" / "latte_tiny_fvd.yaml").read_text()
    protocol.write_text(recipe.replace("num_frames: 16", "num_frames: 12").replace("size: 64", "size: 32"))
    app = typer.Typer()
    app.command()(commands.evaluate)
    out = tmp_path / "fvd.json"
    arguments = [
        *models,
        "--data",
        str(tmp_path / "real"),
        "--protocol",
        str(protocol),
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    values = plot_tiny_latte.fvd_of(out)
    assert set(values) == {"training clips", "2", "4"}
    assert values["training clips"] < min(values["2"], values["4"])  # noise is further from gradients than other gradients
    plot_tiny_latte.main(["--run", str(tmp_path), "--output", str(tmp_path / "figures")])
    with Image.open(tmp_path / "figures" / "latte_tiny_samples.png") as sheet:
        assert sheet.size == (2 * 32, 3 * 32 + 8)


def test_reading_health_is_counted_for_the_cache(folder, tmp_path):
    run = trainer(folder, tmp_path, latent_cache=tmp_path / "cache")
    assert isinstance(run.health, ReadHealth)
    assert run.health.read == 10


# --------------------------------------------------------------------------------------------------- stored latents


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory) -> str:
    """The latents of the clips as `vcvae encode --shards` writes them."""
    out = tmp_path_factory.mktemp("stored") / "latents"
    words = ["encode", folder / "clips", out, "--shards", 3, "--model", folder / "vae", "--dtype", "float32"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return str(out / "*.tar")


def test_windows_of_stored_latents_are_the_encoder_s(folder, stored, tmp_path):
    run = trainer(folder, tmp_path, data=stored, latent_cache=None, resolution=16)
    cache = run.cache
    assert (len(cache), cache.latent_shape, cache.left_out) == (4, (4, 2, 2, 2), 0)
    whole = {}
    for path in sorted((folder / "clips").rglob("*.mkv")):
        with VideoReader(path, batch_dim=True) as reader, torch.no_grad():
            latents = run.vae.encode(torch.cat(list(reader), dim=2)).latent_dist.mode()[0]
        whole[path.relative_to(folder / "clips").with_suffix("").as_posix()] = latents
    places = set()
    for ordinal in range(16):
        item = cache[ClipRequest(0, 0, ordinal)]
        key, _, start = item["clip"].rpartition(" from ")
        mean, logvar = item["posterior"].chunk(2)
        assert (logvar == -30).all()
        window = whole[key][:, int(start) : int(start) + 2].unfold(2, 2, 1).unfold(3, 2, 1)  # (C, t, y, x, 2, 2)
        error = (window - mean[:, :, None, None]).abs().amax((0, 1, 4, 5))
        assert error.min() < 1e-5
        places.add((key, start, int(error.argmin())))
    assert len(places) > 8
    assert {cache[ClipRequest(0, 0, k)]["clip"].rpartition(" ")[0] for k in range(4)} == {f"{key} from" for key in whole}
    flat = torch.cat([latents.flatten(1) for latents in whole.values()], dim=1)
    assert torch.tensor(cache.latents_mean) == pytest.approx(flat.mean(1).tolist(), abs=1e-5)
    assert torch.tensor(cache.latents_std) == pytest.approx(flat.std(1, unbiased=False).tolist(), abs=1e-5)


def test_stored_latents_train_by_class_and_with_their_own_statistics(folder, stored, tmp_path):
    changes = {"data": stored, "latent_cache": None, "classes": True, "latent_statistics": "data", "steps": 3}
    train(folder, tmp_path, **changes)
    assert [row["step"] for row in rows(tmp_path)][-1] == 3
    config = json.loads((tmp_path / "pipeline" / "vae" / "config.json").read_text())
    run = trainer(folder, tmp_path / "other", **changes)
    assert config["latents_std"] == pytest.approx(run.cache.latents_std)
    assert run.classes == ["sea", "sky"]


def test_stored_latents_that_do_not_fit_are_refused(folder, stored, tmp_path):
    with pytest.raises(DataError, match=r"no latents of at least \(2, 8, 8\) cells in 2 shards \(largest: \(5, 4, 5\)\)"):
        trainer(folder, tmp_path, data=stored, latent_cache=None, resolution=64)
    tiny_vae(temporal_downsample=(True, True, True)).save_pretrained(tmp_path / "vae")
    with pytest.raises(DataError, match="temporal_compression_ratio 4, the model has 8"):
        trainer(folder, tmp_path, data=stored, latent_cache=None, vae=tmp_path / "vae")
    with pytest.raises(ValueError, match="need no latent_cache"):
        trainer(folder, tmp_path, data=stored)
