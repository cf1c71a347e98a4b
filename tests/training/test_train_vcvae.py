"""The VAE trainer, run for real on tiny models: options, exact resume, what is left when something goes wrong."""

import importlib.util
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from vae_runs import BUCKETS, FLOAT, STAGE_1, STAGE_2, log_of, parse, same_state

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.training import any_vae, checkpoints, clip_plan, log, machine
from vc_vae_diffusers.training import trainer as core
from vc_vae_diffusers.training import vcvae as train
from vc_vae_diffusers.training.data import DataError, validation_clip
from vc_vae_diffusers.training.trainer import NonFiniteError
from vc_vae_diffusers.training.validation import psnr

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"


# ---------------------------------------------------------------------------------------------------- configuration


def test_the_yaml_files_hold_every_value_of_table_7():
    one, two = (yaml.safe_load((CONFIGS / f"stage{k}.yaml").read_text()) for k in (1, 2))
    assert (one["steps"], two["steps"]) == (500_000, 50_000)
    assert one["learning_rate"] == two["learning_rate"] == 1e-5
    assert (one["lpips_weight"], two["lpips_weight"]) == (0.1, 0.2)
    assert (one["gan_weight"], two["gan_weight"]) == (0, 0.02)
    assert one["kl_weight"] == two["kl_weight"] == 1e-8
    assert one["ema_decay"] == two["ema_decay"] == 0.999
    required = ["--data", "x", "--output", "y", "--model", "z"]
    mixed = {(s, n, f) for s in (128, 256, 512) for n in (8, 40, 120) for f in (8, 12, 15, 24)}
    for number, shapes in ((1, {(256, 16, 24)}), (2, mixed)):
        config = parse(["--config", str(CONFIGS / f"stage{number}.yaml"), *required])
        buckets = clip_plan.parse_buckets(config.data.buckets)
        assert {(b.height, b.num_frames, b.fps) for b in buckets} == shapes
        assert {b.batch_size for b in buckets} == {8}
        weights = {round(b.weight, 9) for b in buckets}
        assert len(weights) == 1


def test_the_tiny_configurations_hold_their_holdout_back():
    for number in (1, 2):
        config = parse(
            ["--config", str(CONFIGS / f"tiny_stage{number}.yaml"), "--data", "x", "--output", "y", "--model", "z"]
        )
        assert len(config.data.include) >= 40
        assert len(config.data.holdout) >= 5
        assert not set(config.data.include) & set(config.data.holdout)
        assert clip_plan.parse_buckets(config.data.buckets)


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


def test_the_command_line_wins_over_yaml_and_mistakes_are_named(tmp_path):
    (tmp_path / "list.txt").write_text("[a]\nx.mp4\n")
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 3e-4\nsteps: 7\nholdout: ['@list.txt:a']\nmodel_options: {temporal_operator: conv}\n")
    config = parse(["--config", str(path), "--steps", "9", "--data", "d", "--output", "o", "--model", "m"])
    assert (config.optim.learning_rate, config.optim.steps, config.optim.ema_decay) == (3e-4, 9, 0.999)
    assert config.data.holdout == ["x.mp4"]
    assert json.loads(config.model.model_options) == {"temporal_operator": "conv"}
    path.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match=r"c\.yaml: learning_rat is no option; did you mean learning_rate\?"):
        parse(["--config", str(path), "--data", "d", "--output", "o"])
    with pytest.raises(ValueError, match="--output is required"):
        parse(["--data", "d"])
    with pytest.raises(ValueError, match="exactly one of"):
        parse(["--data", "d", "--output", "o", "--model", "a", "--from_image_vae", "b"])
    path.write_text("mixed_precision: no\nmodel: m\n")  # false, to YAML
    assert parse(["--config", str(path), "--data", "d", "--output", "o"]).run.mixed_precision == "no"
    for text, said in (
        ("mixed_precision: fp16", "c.yaml: mixed_precision: 'fp16' must be one of auto, no, bf16"),
        ("lr_scheduler: cosin", "c.yaml: lr_scheduler: 'cosin' must be one of constant,"),
        ("steps: 1.5", "c.yaml: steps: 1.5 must be a whole number"),
        ("steps: many", "c.yaml: steps: 'many' must be a whole number"),
        ("steps:", "c.yaml: steps: None must be a whole number"),
        ("steps: [1]", "c.yaml: steps: [1] must be a whole number"),
        ("adam_beta1: abc", "c.yaml: adam_beta1: 'abc' must be a number"),
        ("flip: maybe", "c.yaml: flip: 'maybe' must be true or false"),
        ("output: [a]", "c.yaml: output: ['a'] must be one value"),
        ("- steps", "c.yaml holds a list; write one option a line"),
        ("steps: [1", "c.yaml is no YAML: while parsing a flow sequence"),
        ("model_options: '{a}'", "--model_options is '{a}', but must be a JSON object"),
        ("buckets: size=32", "--buckets: 'size=32' has missing keys ['batch', 'fps', 'frames']; write each in quotes"),
    ):
        path.write_text(text + "\n")
        with pytest.raises(ValueError, match=re.escape(said)):
            parse(["--config", str(path), "--data", "d", "--output", "o", "--model", "m"])
    for wrong, said in (
        (["--step", "3"], "--step is no option; did you mean --steps?"),
        (["--resume=x"], "argument --resume"),
        (["--steps", "many"], "invalid int value"),
        (["--qqqq", "3"], "--qqqq is no option; --help lists all options"),
        (["--tracker", "wandbb"], "invalid choice: 'wandbb'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            parse(["--data", "d", "--output", "o", "--model", "a", *wrong])


# ----------------------------------------------------------------------------------------------------------- resume


# Trains and kills its own process: after a step, or when a checkpoint is written but not yet in place.
DEADLY = """
import os, signal, sys
from vc_vae_diffusers.training import checkpoints, program, vcvae
where, step = sys.argv[1], int(sys.argv[2])
def deadly(function, due):
    def wrapped(*args):
        result = function(*args)
        if due(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped
if where == "step":
    vcvae.VAETrainer.train_step = deadly(vcvae.VAETrainer.train_step, lambda trainer, _: trainer.step == step)
else:
    checkpoints._flush_tree = deadly(checkpoints._flush_tree, lambda folder: folder.name.endswith(f"{step:08d}"))
program.main("vcvae", sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("stage", "where", "step", "good"),
    [(STAGE_1, "checkpoint", 4, 2), (STAGE_2, "step", 5, 4)],
    ids=["stage1-while-saving", "stage2"],
)
def test_a_killed_run_resumes_to_the_same_weights(arguments, run, whole, tmp_path, stage, where, step, good):
    killed = tmp_path / "killed"
    (tmp_path / "deadly.py").write_text(DEADLY)
    command = [sys.executable, str(tmp_path / "deadly.py"), where, str(step), *arguments(killed, *stage)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert [path.name for path in checkpoints.list_checkpoints(killed / "checkpoints")][-1] == f"step-{good:08d}"
    assert any((killed / "checkpoints").glob(".partial-*")) == (where == "checkpoint")
    run(arguments(killed, *stage))
    assert same_state(whole(stage), killed) == []
    assert log_of(whole(stage)) == log_of(killed)
    assert not any((killed / "checkpoints").glob(".partial-*"))


def test_an_interrupted_run_saves_and_goes_on(arguments, run, whole, tmp_path, monkeypatch):
    step = train.VAETrainer.train_step

    def interrupted(self, batches):
        result = step(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in the background of a shell
    with monkeypatch.context() as patch:
        patch.setattr(train.VAETrainer, "train_step", interrupted)
        assert run(arguments(tmp_path / "stopped", *STAGE_1)) == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path / "stopped" / "checkpoints")]
    assert names == ["step-00000002", "step-00000003"]
    assert not (tmp_path / "stopped" / "vae").exists()
    run(arguments(tmp_path / "stopped", *STAGE_1))
    assert same_state(whole(STAGE_1), tmp_path / "stopped") == []


def test_sigterm_asks_like_sigint_and_a_later_sigint_interrupts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    stop = log.StopSignal()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's echo
        now[0] += 60
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGTERM
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_shards_resume_exactly_too(arguments, run, data, tmp_path, monkeypatch):
    import tarfile

    pytest.importorskip("webdataset")
    for k in range(3):
        with tarfile.open(tmp_path / f"s-{k}.tar", "w") as tar:
            for i in range(4):
                tar.add(data / f"{(k + i) % 5}.mp4", arcname=f"{k}{i}.mp4")
    more = ["--data", str(tmp_path / "s-{0..2}.tar"), "--holdout", "01", "--shuffle_buffer", "3", *STAGE_1]
    run(arguments(tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        patch.setattr(core.StopSignal, "__init__", lambda self: self.__dict__.update(requested=True, _previous={}))
        run(arguments(tmp_path / "stopped", *more))
        run(arguments(tmp_path / "stopped", *more))
    assert (
        json.loads((checkpoints.list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1] / "trainer.json").read_text())[
            "step"
        ]
        == 2
    )
    run(arguments(tmp_path / "stopped", *more))
    assert same_state(tmp_path / "whole", tmp_path / "stopped") == []


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(arguments, run, whole, tmp_path, caplog, monkeypatch):
    save = train.VAETrainer.save

    def save_with_little_room(self, must):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.step > 2:  # files beyond this size fail to be written, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            save(self, must)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(train.VAETrainer, "save", save_with_little_room)
    with caplog.at_level(logging.INFO), pytest.raises(checkpoints.CheckpointError, match="step-00000002"):
        run(arguments(tmp_path / "out", *STAGE_1))
    (good,) = checkpoints.list_checkpoints(tmp_path / "out" / "checkpoints")
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


def test_a_used_folder_is_not_mixed_with_a_new_run(arguments, run, whole):
    before = {path: path.stat().st_mtime_ns for path in whole(STAGE_1).rglob("*")}
    with pytest.raises(ValueError, match=r"--resume false, but .* holds checkpoints of another run, the last step-00000006"):
        run(arguments(whole(STAGE_1), *STAGE_1, "--resume", "false"))
    assert {path: path.stat().st_mtime_ns for path in whole(STAGE_1).rglob("*")} == before


def test_a_checkpoint_of_another_stage_is_refused(arguments, run, whole):
    with pytest.raises(ValueError, match=r"has the states of \['model_scheduler'\], this run needs those of .*'lecam'"):
        run(arguments(whole(STAGE_1), *STAGE_2))


@pytest.mark.parametrize("name", ["keep_checkpoints", "checkpoint_every", "log_every", "steps"])
def test_counts_below_one_are_refused(arguments, tmp_path, name):
    with pytest.raises(ValueError, match=f"--{name} is 0, but must be at least 1"):
        parse(arguments(tmp_path, *STAGE_1, f"--{name}", "0"))


# ------------------------------------------------------------------------------------------------------- what is trained


def test_a_tracker_that_is_missing_is_named(arguments, run, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(ImportError, match=r"tracker='wandb' is not installed: pip install wandb, or choose --tracker none"):
        run(arguments(tmp_path / "out", *STAGE_1, "--tracker", "wandb"))
    assert not (tmp_path / "out").exists()


def test_only_the_named_part_is_trained_and_the_result_is_the_average(arguments, run, trainer, tmp_path):
    built = trainer(arguments(tmp_path / "out", *STAGE_1, "--train", "decoder", "--ema_decay", "0.5"))
    before = {name: p.detach().clone() for name, p in built.model.vae.named_parameters()}
    averaged = {name: p.double() for name, p in before.items()}
    for number, batches in zip(range(3), built.batches(), strict=False):
        built.train_step(batches)
        decay = 0.0 if number == 0 else min(0.5, (1 + number) / (10 + number))
        for name, p in built.model.vae.named_parameters():
            averaged[name] = decay * averaged[name] + (1 - decay) * p.detach().double()
    changed = {name.split(".")[0] for name, p in built.model.vae.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder"}
    names = [name for name, _ in built.model.vae.named_parameters()]
    for name, shadow in zip(names, built.ema.shadow_params, strict=True):
        assert (shadow.double() - averaged[name]).abs().max() < 1e-6
    with checkpoints.ema_weights(built.ema, built.model):
        checkpoints.save_model(built.accelerator, built.model, tmp_path / "vae")
    saved = AutoencoderKLVCVAE.from_pretrained(tmp_path / "vae")
    assert all((p.double() - averaged[name]).abs().max() < 1e-6 for name, p in saved.named_parameters())
    assert any(
        (p - dict(built.model.vae.named_parameters())[name]).abs().max() > 1e-5 for name, p in saved.named_parameters()
    )
    with pytest.raises(ValueError, match="unknown parts"):
        any_vae.select_parts(saved, ["decodr"])


def test_validation_uses_the_average_and_is_logged_with_videos(arguments, run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--tracker", "tensorboard", "--validate_every", "3", "--learning_rate", "1e-2", "--validation_videos", "1"]
    run(arguments(tmp_path / "out", *STAGE_2, *more))
    rows = [row for row in log_of(tmp_path / "out") if "validation_psnr" in row]
    assert [row["step"] for row in rows] == [3, 6]
    vae = AutoencoderKLVCVAE.from_pretrained(tmp_path / "out" / "vae")
    (held_out,) = Path(parse(arguments(tmp_path)).data.data).glob("0.mp4")
    clip = validation_clip(str(held_out), 4, 32)[None]
    with torch.no_grad():
        reconstruction = vae(clip).sample
    assert abs(rows[-1]["validation_psnr"] - psnr(reconstruction, clip).mean().item()) < 1e-4
    assert (tmp_path / "out" / "validation" / "0-step-00000006.mp4").stat().st_size > 0
    events = EventAccumulator(str(tmp_path / "out"), {"images": 0, "scalars": 0})
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("events.out*") if path.parent.name == "vc_vae"}
    events = EventAccumulator(str(folder), {"images": 0, "scalars": 0})
    events.Reload()
    assert {"l1", "kl", "psnr", "grad_norm", "gan", "validation_psnr"} <= set(events.Tags()["scalars"])
    assert events.Images("validation/0")[-1].encoded_image_string[:3] == b"GIF"


def test_validation_that_nothing_can_be_read_for_costs_no_checkpoint(arguments, run, tmp_path, caplog):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x.mp4").write_bytes(b"broken")
    more = ["--validation_data", str(tmp_path / "held"), "--validate_every", "2", "--steps", "4"]
    run(arguments(tmp_path / "out", *STAGE_1, *more))
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path / "out" / "checkpoints")]
    assert names == ["step-00000002", "step-00000004"]
    assert (tmp_path / "out" / "vae" / checkpoints.WEIGHTS_NAME).exists()
    assert not any("validation_psnr" in row for row in log_of(tmp_path / "out"))
    assert "none of the 1 held-out files can be read: there is no validation; training goes on" in caplog.messages


def test_a_step_is_saved_before_it_is_validated(arguments, run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk with the clips is gone")

    monkeypatch.setattr(train.VAETrainer, "validate", fail)
    with pytest.raises(OSError, match="is gone"):
        run(arguments(tmp_path / "out", *STAGE_1, "--validate_every", "2"))
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "out" / "checkpoints")] == ["step-00000002"]


def test_validation_files_of_one_stem_make_two_videos(arguments, run, data, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "held" / folder).mkdir(parents=True)
        (tmp_path / "held" / folder / "x.mp4").write_bytes((data / "0.mp4").read_bytes())
    more = ["--validation_data", str(tmp_path / "held"), "--validation_videos", "2", "--steps", "1"]
    run(arguments(tmp_path / "out", *STAGE_1, *more))
    names = sorted(path.name for path in (tmp_path / "out" / "validation").iterdir())
    assert names == ["a_x_mp4-step-00000001.mp4", "b_x_mp4-step-00000001.mp4"]


@pytest.mark.parametrize(
    ("wanted", "able", "chosen", "words"),
    [
        ("auto", True, "bf16", "mixed_precision: bf16, for cpu has it"),
        ("auto", False, "no", "mixed_precision: no, for cpu lacks bf16"),
        ("bf16", False, "bf16", "thirty times as long"),
        ("bf16", True, "bf16", None),
        ("no", True, "no", None),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, caplog, wanted, able, chosen, words):
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: able)
    with caplog.at_level(logging.INFO, logger="vc_vae_diffusers"):
        assert machine.choose_precision(wanted, torch.device("cpu")) == chosen
    assert len(caplog.messages) == (words is not None)
    assert words is None or words in caplog.messages[0]


def test_channels_last_changes_the_layout_and_no_result(arguments, run, tmp_path):
    options = [*STAGE_1, *FLOAT, "--steps", "2"]
    for name, value in (("last", "true"), ("first", "false")):
        run(arguments(tmp_path / name, *options, "--channels_last", value))
    last, first = ([row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in ("last", "first"))
    assert last == pytest.approx(first, rel=1e-4)
    vae = train.build_vae(parse(arguments(tmp_path / "none", "--channels_last", "true")).model)
    assert not any(kernel.is_contiguous() for kernel in vae.parameters() if kernel.ndim > 3 and min(kernel.shape[1:]) > 1)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_clips(arguments, run, tmp_path):
    with pytest.raises(NonFiniteError, match=r"clips: .*\d\.mp4 from .* no weight was changed"):
        run(arguments(tmp_path / "out", *STAGE_1, "--learning_rate", "1e18", "--checkpoint_every", "1"))
    checkpoint = checkpoints.list_checkpoints(tmp_path / "out" / "checkpoints")[-1]
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


@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_loader_is_measured(arguments, run, tmp_path, capsys, workers):
    run(arguments(tmp_path / "out", *STAGE_1, "--benchmark_loader", "5", "--num_workers", workers))
    printed = capsys.readouterr().out
    plan = clip_plan.ClipPlan(clip_plan.parse_buckets(BUCKETS), seed=0)
    clips = sum(len(plan.requests(step)) for step in range(5))  # more than micro-batches
    assert f"loader: {clips} clips in" in printed
    assert f"with {workers} workers" in printed
    assert float(re.search(r"([\d.]+) CPU seconds a clip", printed)[1]) > 0.001
    assert "unreadable 0" in printed
    assert not (tmp_path / "out" / "checkpoints").exists()
