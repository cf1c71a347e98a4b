"""The training example, run for real on tiny models: exact resume, gradients over processes, any video VAE."""

import importlib.util
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLLTXVideo, AutoencoderKLWan
from safetensors.torch import load_file
from tiny_models import tiny_vae
from video_files import encode, numbered_frames

from vc_vae_diffusers import training
from vc_vae_diffusers.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.data import DataError
from vc_vae_diffusers.discriminator import PatchDiscriminator3D

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_vcvae.py"
CONFIGS = ROOT / "examples" / "configs"

STAGE_1 = ["--lpips_weight", "0"]
STAGE_2 = ["--lpips_weight", "0", "--gan_weight", "0.05", "--discriminator_channels", "8", "--discriminator_layers", "2"]
STAGE_2 += ["--lecam_weight", "0.01", "--gan_start", "1", "--gan_warmup_steps", "3"]
BUCKETS = ["size=32 frames=8 fps=24 batch=4 micro=2", "size=24 frames=3 fps=8 batch=4", "size=32 frames=1 fps=0 batch=2"]


@pytest.fixture(scope="module")
def train():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("train_vcvae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_vcvae"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five short videos, moving each in its own way."""
    folder = tmp_path_factory.mktemp("data")
    frames = numbered_frames(30)
    for k in range(5):
        encode(folder / f"{k}.mp4", np.roll(frames, 11 * k, axis=2)[:, :, :: 1 if k % 2 else -1], rate=24)
    return folder


@pytest.fixture(scope="module")
def arguments(data, tmp_path_factory) -> Callable[..., list[str]]:
    """`arguments(output, *more)`: a command line that trains a tiny VC-VAE for six steps."""
    start = tmp_path_factory.mktemp("start")
    tiny_vae().save_pretrained(start)

    def make(output: Path, *more: str) -> list[str]:
        common = ["--data", str(data), "--holdout", "0.mp4", "--output", str(output), "--steps", "6"]
        common += ["--model", str(start), "--validation_size", "32", "--validation_frames", "4", "--cpu"]
        common += ["--learning_rate", "1e-3", "--checkpoint_every", "2", "--log_every", "1", "--tracker", "none"]
        return [*common, "--validation_videos", "0", "--num_threads", "1", "--buckets", *BUCKETS, *more]

    return make


@pytest.fixture(scope="module")
def whole(train, arguments, tmp_path_factory) -> Callable[[list[str]], Path]:
    """`whole(stage)`: the folder of an unbroken run of that stage, trained once."""
    folders: dict[tuple[str, ...], Path] = {}

    def get(stage: list[str]) -> Path:
        if tuple(stage) not in folders:
            folders[tuple(stage)] = tmp_path_factory.mktemp("whole")
            AcceleratorState._reset_state(reset_partial_state=True)
            train.main(arguments(folders[tuple(stage)], *stage))
            AcceleratorState._reset_state(reset_partial_state=True)
        return folders[tuple(stage)]

    return get


@pytest.fixture
def run(train):
    """`run(argv)` trains in this process."""

    def call(argv: list[str]) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main(argv)

    yield call
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trainer(train):
    """`trainer(argv)` builds what `run` would train with."""

    def make(argv: list[str]):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = train.parse_config(argv)
        torch.manual_seed(config.run.seed)
        accelerator = train.Accelerator(cpu=True, mixed_precision=config.run.mixed_precision)
        return train.Trainer(config, accelerator), train.find_data(config.data)[0]

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def log_of(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same_state(first: Path, second: Path) -> list[str]:
    """Names of the files of two runs' last checkpoints and results that differ."""
    a, b = (training.list_checkpoints(output / "checkpoints")[-1] for output in (first, second))
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    assert len([name for name in names if name.suffix == ".safetensors"]) >= 2
    unequal = [str(name) for name in names if name.suffix == ".safetensors" and not _equal(a / name, b / name)]
    for name in names:
        if name.name.startswith("optimizer"):
            one, two = (torch.load(folder / name, weights_only=True)["state"] for folder in (a, b))
            pairs = [(one[key][part], two[key][part]) for key in one for part in one[key]]
            unequal += [] if pairs and all(torch.equal(x, y) for x, y in pairs) else [str(name)]
    weights = training.WEIGHTS_NAME
    return unequal + ([] if _equal(first / "vae" / weights, second / "vae" / weights) else ["vae"])


def _equal(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------------------------------------------- configuration


def test_the_yaml_files_hold_every_value_of_table_7(train):
    one, two = (yaml.safe_load((CONFIGS / f"stage{k}.yaml").read_text()) for k in (1, 2))
    assert (one["steps"], two["steps"]) == (500_000, 50_000)
    assert one["learning_rate"] == two["learning_rate"] == 1e-5
    assert (one["lpips_weight"], two["lpips_weight"]) == (0.1, 0.2)
    assert (one["gan_weight"], two["gan_weight"]) == (0, 0.02)
    assert one["kl_weight"] == two["kl_weight"] == 1e-8
    assert one["ema_decay"] == two["ema_decay"] == 0.999
    required = ["--data", "x", "--output", "y"]
    mixed = {(s, n, f) for s in (128, 256, 512) for n in (8, 40, 120) for f in (8, 12, 15, 24)}
    for number, shapes in ((1, {(256, 16, 24)}), (2, mixed)):
        config = train.parse_config(["--config", str(CONFIGS / f"stage{number}.yaml"), *required])
        buckets = train.vdata.parse_buckets(config.data.buckets)
        assert {(b.height, b.num_frames, b.fps) for b in buckets} == shapes
        assert {b.batch_size for b in buckets} == {8}
        weights = {round(b.weight, 9) for b in buckets}
        assert len(weights) == 1


def test_the_tiny_configurations_hold_their_holdout_back(train):
    for number in (1, 2):
        config = train.parse_config(["--config", str(CONFIGS / f"tiny_stage{number}.yaml"), "--data", "x", "--output", "y"])
        assert len(config.data.include) >= 40
        assert len(config.data.holdout) >= 5
        assert not set(config.data.include) & set(config.data.holdout)
        assert train.vdata.parse_buckets(config.data.buckets)


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("cpu2", "MULTI_GPU", 2), ("ddp", "MULTI_GPU", 8), ("fsdp", "FSDP", 8), ("deepspeed", "DEEPSPEED", 8)],
)
def test_accelerate_reads_the_launch_configurations(name, kind, processes):
    config = load_config_from_file(str(CONFIGS / f"accelerate_{name}.yaml"))  # raises for keys that it does not know
    assert (config.distributed_type.value, config.num_processes, config.use_cpu) == (kind, processes, name == "cpu2")
    assert (config.fsdp_config == {}) == (name != "fsdp")
    assert (config.deepspeed_config == {}) == (name != "deepspeed")
    if name == "deepspeed":
        stage = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert stage["zero_optimization"] == {"stage": 2}
        assert stage["gradient_clipping"] == 1.0  # DeepSpeed's own, as max_grad_norm


def test_the_command_line_wins_over_yaml_and_mistakes_are_named(train, tmp_path):
    (tmp_path / "list.txt").write_text("[a]\nx.mp4\n")
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 3e-4\nsteps: 7\nholdout: ['@list.txt:a']\nmodel_options: {temporal_operator: conv}\n")
    config = train.parse_config(["--config", str(path), "--steps", "9", "--data", "d", "--output", "o"])
    assert (config.optim.learning_rate, config.optim.steps, config.optim.ema_decay) == (3e-4, 9, 0.999)
    assert config.data.holdout == ["x.mp4"]
    assert json.loads(config.model.model_options) == {"temporal_operator": "conv"}
    path.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match=r"unknown options \['learning_rat'\]"):
        train.parse_config(["--config", str(path), "--data", "d", "--output", "o"])
    with pytest.raises(ValueError, match="--output is required"):
        train.parse_config(["--data", "d"])
    with pytest.raises(ValueError, match="exactly one of"):
        train.build_vae(train.ModelConfig(model="a", from_image_vae="b"))


# ----------------------------------------------------------------------------------------------------------- resume


# Runs the example and kills its own process: after a step, or when a checkpoint is written but not yet in place.
DEADLY = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("train_vcvae", sys.argv[1])
train = sys.modules["train_vcvae"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
where, step = sys.argv[2], int(sys.argv[3])
def deadly(function, due):
    def wrapped(*args):
        result = function(*args)
        if due(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped
if where == "step":
    train.Trainer.train_step = deadly(train.Trainer.train_step, lambda trainer, _: trainer.step == step)
else:
    flush = train.training._flush_tree
    train.training._flush_tree = deadly(flush, lambda folder: folder.name.endswith(f"{step:08d}"))
train.main(sys.argv[4:])
"""


@pytest.mark.parametrize(
    ("stage", "where", "step", "good"),
    [(STAGE_1, "checkpoint", 4, 2), (STAGE_2, "step", 5, 4)],
    ids=["stage1-while-saving", "stage2"],
)
def test_a_killed_run_resumes_to_the_same_weights(arguments, run, whole, tmp_path, stage, where, step, good):
    killed = tmp_path / "killed"
    (tmp_path / "deadly.py").write_text(DEADLY)
    command = [sys.executable, str(tmp_path / "deadly.py"), str(SCRIPT), where, str(step), *arguments(killed, *stage)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert [path.name for path in training.list_checkpoints(killed / "checkpoints")][-1] == f"step-{good:08d}"
    assert any((killed / "checkpoints").glob(".partial-*")) == (where == "checkpoint")
    run(arguments(killed, *stage))
    assert same_state(whole(stage), killed) == []
    assert log_of(whole(stage)) == log_of(killed)
    assert not any((killed / "checkpoints").glob(".partial-*"))


def test_an_interrupted_run_saves_and_goes_on(arguments, run, whole, train, tmp_path, monkeypatch):
    step = train.Trainer.train_step

    def interrupted(self, batches):
        result = step(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in the background of a shell
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", interrupted)
        run(arguments(tmp_path / "stopped", *STAGE_1))
    assert signal.getsignal(signal.SIGINT) is before
    names = [path.name for path in training.list_checkpoints(tmp_path / "stopped" / "checkpoints")]
    assert names == ["step-00000002", "step-00000003"]
    assert not (tmp_path / "stopped" / "vae").exists()
    run(arguments(tmp_path / "stopped", *STAGE_1))
    assert same_state(whole(STAGE_1), tmp_path / "stopped") == []


def test_sigterm_asks_like_sigint_and_a_later_sigint_interrupts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    stop = training.StopSignal()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's echo
        now[0] += 60
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_shards_resume_exactly_too(arguments, run, train, data, tmp_path, monkeypatch):
    import tarfile

    pytest.importorskip("webdataset")
    for k in range(3):
        with tarfile.open(tmp_path / f"s-{k}.tar", "w") as tar:
            for i in range(4):
                tar.add(data / f"{(k + i) % 5}.mp4", arcname=f"{k}{i}.mp4")
    more = ["--data", str(tmp_path / "s-{0..2}.tar"), "--holdout", "01", "--shuffle_buffer", "3", *STAGE_1]
    run(arguments(tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        patch.setattr(train.training.StopSignal, "__init__", lambda self: self.__dict__.update(requested=True, _previous={}))
        run(arguments(tmp_path / "stopped", *more))
        run(arguments(tmp_path / "stopped", *more))
    assert (
        json.loads((training.list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1] / "trainer.json").read_text())[
            "step"
        ]
        == 2
    )
    run(arguments(tmp_path / "stopped", *more))
    assert same_state(tmp_path / "whole", tmp_path / "stopped") == []


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(
    arguments, run, whole, train, tmp_path, caplog, monkeypatch
):
    save = train.Trainer.save

    def save_with_little_room(self, folder, must):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.step > 2:  # files beyond this size fail to be written, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            save(self, folder, must)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(train.Trainer, "save", save_with_little_room)
    with caplog.at_level(logging.INFO), pytest.raises(training.CheckpointError, match="step-00000002"):
        run(arguments(tmp_path / "out", *STAGE_1))
    (good,) = training.list_checkpoints(tmp_path / "out" / "checkpoints")
    assert good.name == "step-00000002"
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-00000002"]
    (continued,) = [message for message in caplog.messages if "training goes on" in message]
    assert "step-00000004" in continued
    assert "MiB were free" in continued
    AutoencoderKLVCVAE.from_pretrained(good / "ema")
    monkeypatch.undo()
    run(arguments(tmp_path / "out", *STAGE_1))
    assert same_state(whole(STAGE_1), tmp_path / "out") == []


def test_the_last_checkpoints_are_kept_and_changed_options_are_named(arguments, run, tmp_path, caplog):
    run(arguments(tmp_path / "out", *STAGE_1, "--keep_checkpoints", "1", "--steps", "4"))
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000004"]
    with caplog.at_level(logging.WARNING):
        run(arguments(tmp_path / "out", *STAGE_1, "--keep_checkpoints", "2", "--steps", "6"))
    assert "option steps was 4, is 6 now" in caplog.messages
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == 2


# -------------------------------------------------------------------------------------------------------- gradients


# Writes the gradients of the first step of each bucket line, at two processes.
GRADIENTS = """
import importlib.util, sys
from safetensors.torch import save_file
spec = importlib.util.spec_from_file_location("train_vcvae", sys.argv[1])
train = sys.modules["train_vcvae"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
accelerator = train.Accelerator(cpu=True, mixed_precision="no")
assert accelerator.num_processes == 2
for number, line in enumerate(sys.argv[3].split(";")):
    config = train.parse_config([*sys.argv[4:], "--buckets", line])
    trainer = train.Trainer(config, accelerator)
    batches = next(train.steps_of(trainer.loader(train.find_data(config.data)[0]), 2))
    trainer.optimizer.zero_grad = trainer.disc_optimizer.zero_grad = lambda: None
    trainer.train_step(batches)
    parts = {"model": trainer.model, "discriminator": trainer.discriminator}
    parts = {name: accelerator.unwrap_model(module) for name, module in parts.items()}
    if accelerator.is_main_process:
        grads = {f"{part}.{n}": p.grad for part, module in parts.items() for n, p in module.named_parameters()}
        save_file(grads, f"{sys.argv[2]}-{number}.safetensors")
accelerator.end_training()
"""

ROUNDING = 3e-4
FLOAT = ["--mixed_precision", "no", "--max_grad_norm", "1e9", "--gan_start", "0", "--gan_warmup_steps", "0"]


def gradients_of(trainer, sources, train) -> dict[str, torch.Tensor]:
    batches = next(train.steps_of(trainer.loader(sources), 1))
    trainer.optimizer.zero_grad = lambda: None
    parts = {"model": trainer.model}
    if trainer.gan:
        trainer.disc_optimizer.zero_grad = lambda: None
        parts["discriminator"] = trainer.discriminator
    trainer.train_step(batches)
    return {f"{part}.{name}": p.grad for part, module in parts.items() for name, p in module.named_parameters()}


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> None:
    """Largest difference of any element against the largest element of its part (model, discriminator).

    L1's gradient is a sign: where a reconstruction crosses its target by rounding, a pixel's share jumps.
    """
    assert first.keys() == second.keys()
    for part in {name.split(".")[0] for name in first}:
        names = [name for name in first if name.startswith(part)]
        largest = max(first[name].abs().max() for name in names)
        assert largest > 0
        assert max((first[name] - second[name]).abs().max() for name in names) < tolerance * largest


def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(arguments, trainer, train, tmp_path):
    lines = ["size=32 frames=8 fps=24 batch=8 micro=2", "size=32 frames=1 fps=0 batch=4"]
    argv = arguments(tmp_path / "out", *STAGE_2, *FLOAT, "--lecam_weight", "0")
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "gradients.py"), str(SCRIPT), str(tmp_path / "two"), ";".join(lines), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, line in enumerate(lines):
        one = gradients_of(*trainer([*argv, "--buckets", line.replace(" micro=2", "")]), train)
        assert_close(one, load_file(tmp_path / f"two-{number}.safetensors"), ROUNDING)


def test_micro_batches_give_the_gradients_of_the_whole_batch(arguments, trainer, train, tmp_path):
    def gradients(micro: int) -> dict[str, torch.Tensor]:
        argv = arguments(tmp_path, *STAGE_2, *FLOAT, "--lecam_weight", "0")
        return gradients_of(*trainer([*argv, "--buckets", f"size=32 frames=8 fps=24 batch=4 micro={micro}"]), train)

    whole = gradients(4)
    assert_close(whole, gradients(1), ROUNDING)


def test_gradient_checkpointing_changes_no_gradient(arguments, trainer, train, tmp_path):
    argv = arguments(tmp_path, *STAGE_1, *FLOAT)
    plain = gradients_of(*trainer(argv), train)
    assert_close(plain, gradients_of(*trainer([*argv, "--gradient_checkpointing"]), train), ROUNDING)


def test_gradients_are_clipped_in_fact(arguments, trainer, train, tmp_path):
    built, sources = trainer(arguments(tmp_path, *STAGE_2, "--gan_start", "0", "--max_grad_norm", "1e-3"))
    seen = {}

    def note(name, module):
        seen[name] = torch.stack([p.grad.norm() for p in module.parameters()]).norm().item()

    built.optimizer.zero_grad = lambda: note("model", built.model)
    built.disc_optimizer.zero_grad = lambda: note("discriminator", built.discriminator)
    terms = built.train_step(next(train.steps_of(built.loader(sources), 1)))
    assert terms["grad_norm"] > 1e-2
    assert terms["discriminator_grad_norm"] > 1e-2
    assert 0.9e-3 < seen["model"] < 1.0001e-3
    assert 0.9e-3 < seen["discriminator"] < 1.0001e-3


def test_bfloat16_gradients_of_the_discriminator_are_right_at_every_length():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator3D(base_channels=8, num_layers=2)

    def gradients(clip: torch.Tensor, bfloat16: bool) -> dict[str, torch.Tensor]:
        discriminator.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = discriminator(clip)
        logits.float().square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in discriminator.named_parameters()}

    for frames in (1, 2, 3, 4, 5, 8):
        clip = torch.randn(2, 3, frames, 32, 32)
        unpadded = gradients(clip, bfloat16=False)
        training.pad_time_explicitly(discriminator)
        assert_close(unpadded, gradients(clip, bfloat16=False), 1e-5)
        for name, rounded in gradients(clip, bfloat16=True).items():
            assert (rounded - unpadded[name]).norm() < 0.2 * unpadded[name].norm()


# ------------------------------------------------------------------------------------------------------- what is trained


def test_a_tracker_that_is_missing_is_named(arguments, run, train, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(ImportError, match=r"tracker='wandb' is not installed: pip install wandb, or choose --tracker none"):
        run(arguments(tmp_path / "out", *STAGE_1, "--tracker", "wandb"))
    assert not (tmp_path / "out").exists()


def test_only_the_named_part_is_trained_and_the_result_is_the_average(arguments, run, trainer, train, tmp_path):
    built, sources = trainer(arguments(tmp_path / "out", *STAGE_1, "--train", "decoder", "--ema_decay", "0.5"))
    before = {name: p.detach().clone() for name, p in built.model.vae.named_parameters()}
    averaged = {name: p.double() for name, p in before.items()}
    for number, batches in zip(range(3), train.steps_of(built.loader(sources), 1), strict=False):
        built.train_step(batches)
        decay = 0.0 if number == 0 else min(0.5, (1 + number) / (10 + number))
        for name, p in built.model.vae.named_parameters():
            averaged[name] = decay * averaged[name] + (1 - decay) * p.detach().double()
    changed = {name.split(".")[0] for name, p in built.model.vae.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder"}
    names = [name for name, _ in built.model.vae.named_parameters()]
    for name, shadow in zip(names, built.ema.shadow_params, strict=True):
        assert (shadow.double() - averaged[name]).abs().max() < 1e-6
    with training.ema_weights(built.ema, built.model):
        training.save_vae(built.accelerator, built.model, tmp_path / "vae")
    saved = AutoencoderKLVCVAE.from_pretrained(tmp_path / "vae")
    assert all((p.double() - averaged[name]).abs().max() < 1e-6 for name, p in saved.named_parameters())
    assert any(
        (p - dict(built.model.vae.named_parameters())[name]).abs().max() > 1e-5 for name, p in saved.named_parameters()
    )
    with pytest.raises(ValueError, match="unknown parts"):
        training.select_parts(saved, ["decodr"])


def test_validation_uses_the_average_and_is_logged_with_videos(arguments, run, train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--tracker", "tensorboard", "--validate_every", "3", "--learning_rate", "1e-2", "--validation_videos", "1"]
    run(arguments(tmp_path / "out", *STAGE_2, *more))
    rows = [row for row in log_of(tmp_path / "out") if "validation_psnr" in row]
    assert [row["step"] for row in rows] == [3, 6]
    vae = AutoencoderKLVCVAE.from_pretrained(tmp_path / "out" / "vae")
    (held_out,) = Path(train.parse_config(arguments(tmp_path)).data.data).glob("0.mp4")
    clip = train.vdata.validation_clip(str(held_out), 4, 32)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reconstruction = vae(clip).sample
    assert abs(rows[-1]["validation_psnr"] - train.psnr(reconstruction, clip).mean().item()) < 1e-4
    assert (tmp_path / "out" / "validation" / "0-step-00000006.mp4").stat().st_size > 0
    events = EventAccumulator(str(tmp_path / "out"), {"images": 0, "scalars": 0})
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("events.out*") if path.parent.name == "vc_vae"}
    events = EventAccumulator(str(folder), {"images": 0, "scalars": 0})
    events.Reload()
    assert {"l1", "kl", "psnr", "grad_norm", "gan", "validation_psnr"} <= set(events.Tags()["scalars"])
    assert events.Images("validation/0")[-1].encoded_image_string[:3] == b"GIF"


def test_lpips_takes_part_and_may_look_at_a_few_frames(arguments, trainer, train, tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)
    monkeypatch.setattr(train.losses, "load_lpips", lambda net, weights: network)
    more = ["--lpips_weight", "0.5", "--lpips_frames", "2", "--buckets", "size=48 frames=8 fps=24 batch=2"]
    built, sources = trainer(arguments(tmp_path, *FLOAT, *more))
    batches = next(train.steps_of(built.loader(sources), 1))
    reconstruction, mean, logvar = built.model(batches[0]["video"], batches[0]["noise_seeds"])
    terms = [
        built.reconstruction_terms(reconstruction, batches[0]["video"], mean, logvar, seeds)["lpips"].item()
        for seeds in ([1], [1], [2])
    ]
    assert terms[0] == terms[1] != terms[2]
    logged = built.train_step(batches)
    assert abs(logged["loss"] - logged["l1"] - 0.5 * logged["lpips"] - 1e-8 * logged["kl"]) < 1e-6


def test_the_discriminator_starts_late_and_gently(arguments, trainer, train, tmp_path):
    built, sources = trainer(arguments(tmp_path, *STAGE_2, "--gan_start", "1", "--gan_warmup_steps", "2"))
    before = [p.detach().clone() for p in built.discriminator.parameters()]
    weights = []
    original = built.generator_term

    def noted(*args):
        result = original(*args)
        weights.append(result[1])
        return result

    built.generator_term = noted
    for number, batches in zip(range(4), train.steps_of(built.loader(sources), 1), strict=False):
        terms = built.train_step(batches)
        unchanged = all(torch.equal(p, q) for p, q in zip(built.discriminator.parameters(), before, strict=True))
        assert unchanged == (number == 0)
        assert ("gan" in terms) == (number > 0)
    assert sorted(set(weights)) == [0.025, 0.05]


def test_the_adaptive_weight_balances_the_last_layer(arguments, trainer, train, tmp_path):
    built, sources = trainer(arguments(tmp_path, *STAGE_2, *FLOAT, "--adaptive_gan_weight"))
    batch = next(train.steps_of(built.loader(sources), 1))[0]
    reconstruction, mean, logvar = built.model(batch["video"], batch["noise_seeds"])
    loss = built.reconstruction_terms(reconstruction, batch["video"], mean, logvar, batch["noise_seeds"])["l1"]
    gan, weight = built.generator_term(reconstruction, loss)
    layer = built.model.vae.decoder.conv_out.weight
    assert training.last_layer(built.model.vae) is layer
    norms = [torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in (loss, weight / 0.05 * gan)]
    assert abs(norms[0] / norms[1] - 1) < 0.05


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_clips(arguments, run, tmp_path):
    with pytest.raises(training.NonFiniteError, match=r"clips: .*\d\.mp4 from .* no weight was changed"):
        run(arguments(tmp_path / "out", *STAGE_1, "--learning_rate", "1e18", "--checkpoint_every", "1"))
    checkpoint = training.list_checkpoints(tmp_path / "out" / "checkpoints")[-1]
    assert checkpoint.name != "step-00000006"
    step = json.loads((checkpoint / "trainer.json").read_text())["step"]
    assert log_of(tmp_path / "out")[-1]["step"] == step


def test_a_run_on_mostly_broken_files_stops(arguments, run, data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.mp4").write_bytes((data / "0.mp4").read_bytes())
    (folder / "1.mp4").write_bytes((data / "1.mp4").read_bytes())
    for k in range(2, 9):
        (folder / f"{k}.mp4").write_bytes(b"broken")
    with pytest.raises(DataError, match="reads failed"):
        run(arguments(tmp_path / "out", *STAGE_1, "--data", str(folder), "--steps", "100"))


# ------------------------------------------------------------------------------------------------------- any video VAE


def wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def hunyuan() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def cogvideox() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip


def ltx() -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def waves(tmp_path_factory) -> Path:
    """Two videos of five small frames, smooth moving colours: few steps learn something about them."""
    folder = tmp_path_factory.mktemp("waves")
    y, x = np.mgrid[0:32, 0:32]
    for k in range(2):
        time = np.arange(5)[:, None, None]
        colours = [127 + 100 * np.sin(0.05 * x + 0.04 * y * (c - 1) + 0.2 * time + k + 2 * c) for c in range(3)]
        encode(folder / f"{k}.mp4", np.stack(colours, axis=-1).astype(np.uint8), rate=24)
    return folder


@pytest.mark.parametrize("make", [wan, hunyuan])
def test_a_short_fine_tune_lowers_the_loss_of_another_vae(arguments, run, train, waves, tmp_path, make):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "vae")
    more = ["--data", str(waves), "--steps", "30", "--learning_rate", "3e-3", "--ema_decay", "0.5", "--flip", "false"]
    more += ["--buckets", "size=32 frames=5 fps=24 batch=2", "--checkpoint_every", "30", "--mixed_precision", "no"]
    run(arguments(tmp_path / "out", *STAGE_1, *more, "--model", str(tmp_path / "vae")))
    losses = [row["l1"] for row in log_of(tmp_path / "out") if "l1" in row]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    clip = train.vdata.validation_clip(str(waves / "1.mp4"), 5, 32)[None]
    decibels = []
    for folder in (tmp_path / "vae", tmp_path / "out" / "vae"):
        vae = type(make()).from_pretrained(folder)
        with torch.no_grad():
            decibels.append(train.psnr(training.TrainableVAE(vae, [5])(clip, None)[0], clip).mean().item())
    assert decibels[1] > decibels[0] + 4
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "vae", tmp_path / "out" / "vae")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("make", "lengths"),
    [
        (wan, {1: 1, 8: 9, 9: 9, 16: 17}),
        (hunyuan, {1: 1, 8: 9, 18: 21}),
        (cogvideox, {1: 1, 8: 8, 9: 9, 16: 16}),
        (ltx, {1: 1, 8: 9, 16: 17}),
    ],
)
def test_lengths_fit_every_vae_and_frames_stay_in_place(make, lengths):
    torch.manual_seed(0)
    vae = make().eval()
    wrapped = training.TrainableVAE(vae, list(lengths))
    assert {frames: wrapped.padded_frames[frames] for frames in lengths} == lengths
    # An image comes repeated over such a clip, whether a bucket holds clips of that length or not.
    assert all(wrapped.padded_frames[padded] == padded for padded in lengths.values())
    for frames, padded in lengths.items():
        clip = torch.rand(2, 3, frames, 64, 64) * 2 - 1
        with torch.no_grad():
            reconstruction, mean, logvar = wrapped(clip, None)
            whole = vae.decode(vae.encode(training.pad_frames(clip, padded)).latent_dist.mode()).sample
            noisy = wrapped(clip, [3, 4])[0]
            swapped = wrapped(clip.flip(0), [4, 3])[0]
        assert reconstruction.shape == clip.shape
        assert torch.equal(reconstruction, whole[:, :, :frames])
        assert mean.shape == logvar.shape
        assert mean.dtype == torch.float32
        assert (noisy - swapped.flip(0)).abs().max() < 1e-4
        assert not torch.equal(noisy, reconstruction)


@pytest.mark.parametrize("config", [{}, {"frame_convention": "4k+1"}, {"first_frame": "separate"}])
def test_every_scheme_of_vc_vae_returns_the_frames_in_place(make_vae, make_video, config):
    vae = make_vae(**config)
    wrapped = training.TrainableVAE(vae, [1, 6, 8, 9])
    for frames in (6, 8, 9):
        clip = make_video(frames, height=16, width=16)
        with torch.no_grad():
            reconstruction = wrapped(clip, None)[0]
            padded = training.pad_frames(clip, wrapped.padded_frames[frames])
            assert (reconstruction - vae(padded).sample[:, :, :frames]).abs().max() < 1e-5


def test_sizes_that_do_not_fit_are_named():
    wrapped = training.TrainableVAE(wan().eval(), [1])
    with pytest.raises(ValueError, match="its spatial compression divides"):
        wrapped(torch.zeros(1, 3, 1, 60, 60), None)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_loader_is_measured(arguments, run, train, tmp_path, capsys, workers):
    run(arguments(tmp_path / "out", *STAGE_1, "--benchmark_loader", "5", "--num_workers", workers))
    printed = capsys.readouterr().out
    plan = train.vdata.ClipPlan(train.vdata.parse_buckets(BUCKETS), seed=0)
    clips = sum(len(plan.requests(step)) for step in range(5))  # more than micro-batches
    assert f"loader: {clips} clips in" in printed
    assert f"with {workers} workers" in printed
    assert float(re.search(r"([\d.]+) CPU seconds a clip", printed)[1]) > 0.001
    assert "unreadable 0" in printed
    assert not (tmp_path / "out" / "checkpoints").exists()
