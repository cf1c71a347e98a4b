"""What a step of the VAE trainer lowers: its gradients against a step written by hand, over processes and micro-batches."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from vae_runs import FLOAT, STAGE_1, STAGE_2

from vc_vae_diffusers.training import any_vae
from vc_vae_diffusers.training import vcvae as train
from vc_vae_diffusers.training.discriminator import PatchDiscriminator3D, pad_time_explicitly

# Writes the gradients of the first step of each bucket line, at two processes.
GRADIENTS = """
import sys
from accelerate import Accelerator
from safetensors.torch import save_file
from vc_vae_diffusers.training import vcvae
accelerator = Accelerator(cpu=True, mixed_precision="no")
assert accelerator.num_processes == 2
for number, line in enumerate(sys.argv[2].split(";")):
    config = vcvae.Config.parse([*sys.argv[3:], "--buckets", line])
    trainer = vcvae.VAETrainer(config, accelerator, *vcvae.find_data(config.data))
    batches = next(trainer.batches())
    for learner in (trainer.main, trainer.discriminator):
        learner.optimizer.zero_grad = lambda: None
    trainer.train_step(batches)
    parts = {"model": trainer.model, "discriminator": trainer.discriminator.model}
    parts = {name: accelerator.unwrap_model(module) for name, module in parts.items()}
    if accelerator.is_main_process:
        grads = {f"{part}.{n}": p.grad for part, module in parts.items() for n, p in module.named_parameters()}
        save_file(grads, f"{sys.argv[1]}-{number}.safetensors")
accelerator.end_training()
"""

ROUNDING = 1e-3


def gradients_of(trainer: train.VAETrainer, batches: list[dict] | None = None) -> dict[str, torch.Tensor]:
    """What a step, the first by default, leaves in the weights' gradients."""
    learners = {"model": trainer.main} | ({"discriminator": trainer.discriminator} if trainer.gan else {})
    for learner in learners.values():
        learner.optimizer.zero_grad = lambda: None
    trainer.train_step(batches or next(trainer.batches()))
    return {f"{part}.{name}": p.grad for part, learner in learners.items() for name, p in learner.model.named_parameters()}


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


# ------------------------------------------------------------------------------------------ a step written by hand


def by_hand(built: train.VAETrainer, batches: list[dict], gan_weight: float) -> dict[str, torch.Tensor]:
    """Gradients of a step of Stage II in float64, from Sec. 4.1 and Table 7 alone: L1 + KL + GAN, hinge loss, 0.1 LeCam."""
    average_real = average_fake = None
    vae, discriminator = copy.deepcopy(built.model.vae).double(), copy.deepcopy(built.discriminator.model).double()
    weights, critic = dict(vae.named_parameters()), dict(discriminator.named_parameters())
    totals = {f"model.vae.{name}": 0 for name in weights} | {f"discriminator.{name}": 0 for name in critic}
    for batch in batches:
        video = batch["video"].double()
        frames = video.shape[2]
        whole = -(-frames // 4) * 4
        padded = torch.cat([video] + [video[:, :, -1:]] * (whole - frames), dim=2)
        posterior = vae.encode(padded).latent_dist
        mean, logvar = posterior.mean, posterior.logvar
        assert logvar.abs().mean() > 0.02  # or exp(logvar) and exp(logvar / 2) would be one
        noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in batch["noise_seeds"]]
        latents = mean + torch.sqrt(torch.exp(logvar)) * torch.stack(noise).double()
        fake = vae.decode(latents).sample[:, :, :frames]
        kl = (0.5 * (mean**2 + torch.exp(logvar) - 1 - logvar)).mean()
        loss = (fake - video).abs().mean() + kl - gan_weight * discriminator(fake).mean()
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            totals[f"model.vae.{name}"] += gradient / len(batches)
        real, fake = discriminator(video), discriminator(fake.detach())
        hinge = (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2
        means = real.detach().mean(), fake.detach().mean()
        average_real = means[0] if average_real is None else 0.999 * average_real + 0.001 * means[0]
        average_fake = means[1] if average_fake is None else 0.999 * average_fake + 0.001 * means[1]
        beyond = torch.clamp(real - average_fake, min=0), torch.clamp(average_real - fake, min=0)
        lecam = sum(part.square().mean() for part in beyond)
        for name, gradient in zip(critic, torch.autograd.grad(hinge + 0.1 * lecam, list(critic.values())), strict=True):
            totals[f"discriminator.{name}"] += gradient / len(batches)
    return totals


@pytest.mark.parametrize("frames", [8, 6])
def test_a_step_of_stage_two_is_the_one_written_by_hand(arguments, trainer, tmp_path, frames):
    more = ["--gan_weight", "0.5", "--kl_weight", "1", "--lecam_weight", "0.1"]
    more += ["--buckets", f"size=32 frames={frames} fps=24 batch=4 micro=2"]
    built = trainer(arguments(tmp_path, *STAGE_2, *FLOAT, *more))
    with torch.no_grad():  # a discriminator that has an opinion, and a posterior away from the normal one
        for parameter in built.discriminator.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        built.model.vae.encoder.conv_out.bias += 0.3
    batches = next(built.batches())
    assert len(batches) == 2
    expected = by_hand(built, batches, gan_weight=0.5)
    assert_close(expected, gradients_of(built, batches), ROUNDING)


def test_the_optimizers_have_what_the_options_say(arguments, trainer, tmp_path):
    more = ["--discriminator_learning_rate", "3e-3", "--adam_beta1", "0.8", "--adam_beta2", "0.95", "--weight_decay", "0.1"]
    built = trainer(arguments(tmp_path, *STAGE_2, *more))
    for learner, rate in ((built.main, 1e-3), (built.discriminator, 3e-3)):
        (group,) = learner.optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (rate, (0.8, 0.95), 0.1)
        assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in learner.model.parameters())
    assert trainer(arguments(tmp_path, *STAGE_2)).discriminator.optimizer.param_groups[0]["lr"] == 1e-3


def test_lpips_runs_under_autocast(arguments, trainer, tmp_path, monkeypatch):
    """Its trunk costs more than the model: in float32 it would cost twice that."""
    seen = perceptual_network(monkeypatch)
    more = ["--mixed_precision", "bf16", "--lpips_weight", "1", "--buckets", "size=48 frames=4 fps=24 batch=1"]
    built = trainer(arguments(tmp_path, *STAGE_1, *more))
    built.train_step(next(built.batches()))
    assert seen == {torch.bfloat16}


def perceptual_network(monkeypatch) -> set[torch.dtype]:
    """Put random weights into LPIPS, and return the set that collects the dtypes which its convolutions give."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)
    monkeypatch.setattr(train.losses, "load_lpips", lambda net, weights: network)
    seen: set[torch.dtype] = set()
    for module in network.net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    return seen


# ------------------------------------------------------------------------------------- micro-batches and processes


def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(arguments, trainer, tmp_path):
    lines = ["size=32 frames=8 fps=24 batch=8 micro=2", "size=32 frames=1 fps=0 batch=4"]
    argv = arguments(tmp_path / "out", *STAGE_2, *FLOAT, "--lecam_weight", "0")
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "gradients.py"), str(tmp_path / "two"), ";".join(lines), *argv]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, line in enumerate(lines):
        one = gradients_of(trainer([*argv, "--buckets", line.replace(" micro=2", "")]))
        assert_close(one, load_file(tmp_path / f"two-{number}.safetensors"), ROUNDING)


def test_micro_batches_give_the_gradients_of_the_whole_batch(arguments, trainer, tmp_path):
    def gradients(micro: int) -> dict[str, torch.Tensor]:
        argv = arguments(tmp_path, *STAGE_2, *FLOAT, "--lecam_weight", "0")
        return gradients_of(trainer([*argv, "--buckets", f"size=32 frames=8 fps=24 batch=4 micro={micro}"]))

    whole = gradients(4)
    assert_close(whole, gradients(1), ROUNDING)


def test_gradient_checkpointing_changes_no_gradient(arguments, trainer, tmp_path):
    argv = arguments(tmp_path, *STAGE_1, *FLOAT)
    plain = gradients_of(trainer(argv))
    assert_close(plain, gradients_of(trainer([*argv, "--gradient_checkpointing"])), ROUNDING)


def test_gradients_are_clipped_in_fact(arguments, trainer, tmp_path):
    built = trainer(arguments(tmp_path, *STAGE_2, "--gan_start", "0", "--max_grad_norm", "1e-3"))
    seen = {}

    def note(name, module):
        seen[name] = torch.stack([p.grad.norm() for p in module.parameters()]).norm().item()

    built.main.optimizer.zero_grad = lambda: note("model", built.model)
    built.discriminator.optimizer.zero_grad = lambda: note("discriminator", built.discriminator.model)
    terms = built.train_step(next(built.batches()))
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
        pad_time_explicitly(discriminator)
        assert_close(unpadded, gradients(clip, bfloat16=False), 1e-5)
        for name, rounded in gradients(clip, bfloat16=True).items():
            assert (rounded - unpadded[name]).norm() < 0.2 * unpadded[name].norm()


def test_lpips_takes_part_and_may_look_at_a_few_frames(arguments, trainer, tmp_path, monkeypatch):
    perceptual_network(monkeypatch)
    more = ["--lpips_weight", "0.5", "--lpips_frames", "2", "--buckets", "size=48 frames=8 fps=24 batch=2"]
    built = trainer(arguments(tmp_path, *FLOAT, *more))
    batches = next(built.batches())
    reconstruction, mean, logvar = built.model(batches[0]["video"], batches[0]["noise_seeds"])
    terms = [
        built.reconstruction_terms(reconstruction, batches[0]["video"], mean, logvar, seeds)["lpips"].item()
        for seeds in ([1], [1], [2])
    ]
    assert terms[0] == terms[1] != terms[2]
    logged = built.train_step(batches)
    assert abs(logged["loss"] - logged["l1"] - 0.5 * logged["lpips"] - 1e-8 * logged["kl"]) < 1e-6


def test_the_discriminator_starts_late_and_gently(arguments, trainer, tmp_path):
    built = trainer(arguments(tmp_path, *STAGE_2, "--gan_start", "1", "--gan_warmup_steps", "2"))
    before = [p.detach().clone() for p in built.discriminator.model.parameters()]
    weights = []
    original = built.generator_term

    def noted(*args):
        result = original(*args)
        weights.append(result[1])
        return result

    built.generator_term = noted
    for number, batches in zip(range(4), built.batches(), strict=False):
        terms = built.train_step(batches)
        unchanged = all(torch.equal(p, q) for p, q in zip(built.discriminator.model.parameters(), before, strict=True))
        assert unchanged == (number == 0)
        assert ("gan" in terms) == (number > 0)
    assert sorted(set(weights)) == [0.025, 0.05]


def test_the_adaptive_weight_balances_the_last_layer(arguments, trainer, tmp_path):
    built = trainer(arguments(tmp_path, *STAGE_2, *FLOAT, "--adaptive_gan_weight"))
    batch = next(built.batches())[0]
    reconstruction, mean, logvar = built.model(batch["video"], batch["noise_seeds"])
    loss = built.reconstruction_terms(reconstruction, batch["video"], mean, logvar, batch["noise_seeds"])["l1"]
    gan, weight = built.generator_term(reconstruction, loss)
    layer = built.model.vae.decoder.conv_out.weight
    assert any_vae.last_layer(built.model.vae) is layer
    norms = [torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in (loss, weight / 0.05 * gan)]
    assert abs(norms[0] / norms[1] - 1) < 0.05


def test_rows_are_means_over_their_steps_and_begin_anew(arguments, trainer, tmp_path, monkeypatch):
    built = trainer(arguments(tmp_path, *STAGE_1))
    monkeypatch.setattr(built, "extras", lambda batches: {})
    built.pending = {"l1": [1.0, 3.0], "kl": [4.0]}
    row = built.row([], 0.0)
    assert (row["l1"], row["kl"], row["step"]) == (2.0, 4.0, 0)
    assert built.pending == {}


def test_only_pictures_are_repeated_to_clips(arguments, trainer, tmp_path):
    built = trainer(arguments(tmp_path, *STAGE_1))
    picture, pair = torch.rand(2, 3, 1, 8, 8), torch.rand(2, 3, 2, 8, 8)
    repeated = built.as_clip(picture)
    assert repeated.shape[2] > 1
    assert torch.equal(repeated, picture.expand_as(repeated))
    assert built.as_clip(pair) is pair


def test_buckets_that_the_model_cannot_take_are_told_before_the_first_step(arguments, trainer, tmp_path):
    with pytest.raises(ValueError, match=r"--buckets: 36x36x8.* multiple"):
        trainer(arguments(tmp_path, *STAGE_1, "--buckets", "size=36 frames=8 fps=24 batch=4"))
