"""Published folders: what loads them with trust_remote_code and no prior import, what their card says, what is uploaded."""

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from huggingface_hub import ModelCard
from PIL import Image
from tiny_models import seeded, tiny_latte, tiny_vae

from vc_vae_diffusers.autoencoder.autoencoder_kl_vcvae import AutoencoderKLVCVAE
from vc_vae_diffusers.generation.latte_transformer import LatteAdaLNTransformer3DModel
from vc_vae_diffusers.generation.pipeline_latte import LatteVCVAEPipeline, LatteVCVAEUnconditionalPipeline
from vc_vae_diffusers.publishing import hub, picture
from vc_vae_diffusers.publishing.auto import MODELS, AutoVCVAEModel
from vc_vae_diffusers.publishing.hub import (
    CardContent,
    MeasuredMetric,
    add_remote_code,
    push_to_hub,
    save_for_hub,
    write_model_card,
)

CONTENT = CardContent(
    name="Tiny VC-VAE",
    summary="A test model.",
    licence="apache-2.0",
    training_data="None: random weights.",
    training="Not trained.",
    limitations="Draws noise.",
    metrics=[MeasuredMetric("PSNR", 12.5, "UCF-101", "`vcvae evaluate --protocol ucf101`", "2026-01-02", "dB")],
    base_model="black-forest-labs/FLUX.1-schnell",
    datasets=["user/clips"],
    tags=["test"],
)


def latte_pipeline() -> LatteVCVAEUnconditionalPipeline:
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    pipeline = LatteVCVAEUnconditionalPipeline(tiny_vae(), tiny_latte(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wan_pipeline() -> WanPipeline:
    torch.manual_seed(3)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    transformer = WanTransformer3DModel(**sizes, freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32)
    return WanPipeline(None, None, tiny_vae(), FlowMatchEulerDiscreteScheduler(), transformer)


def run_python(code: str, folder, **values) -> subprocess.CompletedProcess:
    """Run code in a process of its own, which has imported nothing, with the given values as JSON in `values`."""
    preamble = f"import json, sys\nvalues = json.loads({json.dumps(json.dumps(values))})\n"
    environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(folder / "hf"), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", preamble + code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


LOADS = """
import torch
from diffusers import AutoModel, DiffusionPipeline, WanPipeline
assert "vc_vae_diffusers" not in sys.modules

def refused(load, *words):
    try:
        load()
    except (ValueError, RuntimeError) as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("loaded without trust_remote_code")

refused(lambda: AutoModel.from_pretrained(values["vae"]), "trust_remote_code=True")
refused(lambda: DiffusionPipeline.from_pretrained(values["latte"]), "trust_remote_code=True")
refused(lambda: WanPipeline.from_pretrained(values["wan"], tokenizer=None, text_encoder=None), "trust_remote_code=True")
assert "vc_vae_diffusers" not in sys.modules

trusted = {"trust_remote_code": True}
vae = AutoModel.from_pretrained(values["vae"], **trusted)
latents = torch.arange(128.0).reshape(1, 4, 2, 4, 4) / 128
with torch.no_grad():
    results = {"decoded": vae.decode(latents).sample}
pipeline = DiffusionPipeline.from_pretrained(values["latte"], **trusted)
results["sampled"] = pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").frames
wan = WanPipeline.from_pretrained(values["wan"], tokenizer=None, text_encoder=None, **trusted)
assert type(AutoModel.from_pretrained(values["wan"] + "/vae", **trusted)) is type(wan.vae)
parts = [AutoModel.from_pretrained(values["latte"], subfolder=part, **trusted) for part in ("vae", "transformer")]
foreign = AutoModel.from_pretrained(values["wan"], subfolder="transformer")
names = [type(part).__name__ for part in (vae, pipeline, wan, wan.vae, *parts, foreign)]
namespace = {}
exec(values["usage"], namespace)
results["usage"] = namespace["frames"]
torch.save(results, values["results"])
print(json.dumps(names))
"""


def test_published_folders_load_without_a_prior_import(tmp_path):
    vae, latte, wan = tiny_vae(), latte_pipeline(), wan_pipeline()
    save_for_hub(vae, tmp_path / "vae", CONTENT)
    latte.save_pretrained(tmp_path / "latte", remote_code=True)
    save_for_hub(wan, tmp_path / "wan", CONTENT)
    paths = {name: str(tmp_path / name) for name in ("vae", "latte", "wan", "results")}
    usage = (tmp_path / "vae" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    process = run_python(LOADS, tmp_path, usage=usage, **paths)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == [
        "AutoencoderKLVCVAE",
        "LatteVCVAEUnconditionalPipeline",
        "WanPipeline",
        "AutoencoderKLVCVAE",
        "AutoencoderKLVCVAE",
        "LatteAdaLNTransformer3DModel",
        "WanTransformer3DModel",
    ]
    results = torch.load(tmp_path / "results", weights_only=True)
    assert results["usage"].shape == (1, 3, 9, 64, 64)  # what the card's own code makes
    with torch.no_grad():
        decoded = vae.decode(torch.arange(128.0).reshape(1, 4, 2, 4, 4) / 128).sample
    torch.testing.assert_close(results["decoded"], decoded, rtol=0, atol=1e-5)
    sampled = latte(num_inference_steps=2, generator=seeded(), output_type="pt").frames
    torch.testing.assert_close(results["sampled"], sampled, rtol=0, atol=1e-5)


WITHOUT_PACKAGE = """
import importlib.util, pathlib
sys.path[:] = [place for place in sys.path if not (pathlib.Path(place) / "vc_vae_diffusers").is_dir()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
assert importlib.util.find_spec("vc_vae_diffusers") is None
import torch
from diffusers import AutoModel
vae = AutoModel.from_pretrained(values["vae"], trust_remote_code=True)
place = sys.modules["vc_vae_diffusers"].__file__
assert place.startswith(values["modules"]), place
with torch.no_grad():
    torch.save(vae.decode(torch.arange(128.0).reshape(1, 4, 2, 4, 4) / 128).sample, values["results"])
"""


def test_published_folders_load_where_the_package_is_not_installed(tmp_path):
    vae = tiny_vae()
    save_for_hub(vae, tmp_path / "vae", CONTENT)
    paths = {name: str(tmp_path / name) for name in ("vae", "modules", "results")}
    process = run_python(WITHOUT_PACKAGE, tmp_path, **paths)
    assert process.returncode == 0, process.stderr
    assert "pip install" not in process.stderr  # diffusers' advice about packages that are missing
    with torch.no_grad():
        decoded = vae.decode(torch.arange(128.0).reshape(1, 4, 2, 4, 4) / 128).sample
    torch.testing.assert_close(torch.load(tmp_path / "results", weights_only=True), decoded, rtol=0, atol=1e-5)


def test_the_card_shows_a_reconstruction(tmp_path):
    save_for_hub(tiny_vae(), tmp_path, CONTENT)
    card = ModelCard.load(tmp_path / "README.md")
    assert Image.open(tmp_path / "reconstruction.png").size == (4 * 320, 2 * 192)
    assert card.data.widget[0]["output"]["url"] == "reconstruction.png"
    assert "![Frames and their reconstruction](reconstruction.png)" in card.text
    assert "dB PSNR over 8 frames" in card.text


def test_without_stubs_an_import_is_enough(tmp_path):
    wan_pipeline().save_pretrained(tmp_path / "wan")
    latte_pipeline().save_pretrained(tmp_path / "latte")
    code = """
import vc_vae_diffusers
from diffusers import WanPipeline
from vc_vae_diffusers.generation.pipeline_latte import LatteVCVAEUnconditionalPipeline
wan = WanPipeline.from_pretrained(values["wan"], tokenizer=None, text_encoder=None)
latte = LatteVCVAEUnconditionalPipeline.from_pretrained(values["latte"])
assert type(vc_vae_diffusers.AutoencoderKLVCVAE.from_pretrained(values["wan"], subfolder="vae")) is type(wan.vae)
print(type(wan.vae).__name__, type(latte.transformer).__name__)
"""
    process = run_python(code, tmp_path, wan=str(tmp_path / "wan"), latte=str(tmp_path / "latte"))
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["AutoencoderKLVCVAE", "LatteAdaLNTransformer3DModel"]


def test_saving_passes_arguments_on_and_refuses_to_publish_what_nobody_can_load(tmp_path):
    latte_pipeline().save_pretrained(tmp_path / "shards", True, "fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "transformer").glob("*.fp16-*-of-*.safetensors"))) > 1
    with pytest.raises(ValueError, match=r"push_to_hub is True.*publishing\.hub\.push_to_hub"):
        latte_pipeline().save_pretrained(tmp_path / "no", push_to_hub=True)
    assert not (tmp_path / "no").exists()


def test_names_in_stubs_are_those_of_the_classes():
    assert tuple(MODELS) == hub.MODEL_NAMES
    assert (LatteVCVAEPipeline.__name__, LatteVCVAEUnconditionalPipeline.__name__) == hub.PIPELINE_NAMES


def test_stubs_are_written_once_and_ours_load_them_in_silence(tmp_path, caplog):
    latte_pipeline().save_pretrained(tmp_path, remote_code=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    add_remote_code(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with caplog.at_level("WARNING", logger="diffusers"):
        LatteAdaLNTransformer3DModel.from_pretrained(tmp_path / "transformer")
        loaded = LatteVCVAEUnconditionalPipeline.from_pretrained(tmp_path, vae=tiny_vae(), trust_remote_code=True)
    assert "auto_map" not in caplog.text
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in (tmp_path / "again" / "model_index.json").read_text()
    assert "auto_map" not in (tmp_path / "again" / "transformer" / "config.json").read_text()


def test_shards_and_variants_live_in_one_folder(tmp_path):
    model = tiny_vae()
    save_for_hub(model, tmp_path, CONTENT, max_shard_size="20KB")
    save_for_hub(tiny_vae().to(torch.float16), tmp_path, CONTENT, variant="fp16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.fp16-*-of-*.safetensors"))) > 1
    assert len(list(tmp_path.glob("*model-*-of-*.safetensors"))) > 1
    loaded = AutoVCVAEModel.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.decoder.conv_out.weight, model.decoder.conv_out.weight)
    half = AutoencoderKLVCVAE.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(half.decoder.conv_out.weight, model.decoder.conv_out.weight.half())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert hub.weights_summary(tmp_path) == (parameters, "F16, F32")


def test_the_card_is_filled(tmp_path):
    save_for_hub(tiny_vae(), tmp_path, CONTENT, where="user/tiny")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.base_model) == ("apache-2.0", "diffusers", CONTENT.base_model)
    assert data.tags == ["video", "vc-vae", "test"]
    assert data.datasets == ["user/clips"]
    (result,) = data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_name) == ("PSNR", 12.5, "UCF-101")
    text = card.text
    for expected in (
        'from_pretrained("user/tiny", trust_remote_code=True)',
        "| PSNR | 12.5 dB | UCF-101 | `vcvae evaluate --protocol ucf101` | 2026-01-02 |",
        "temporal_compression_ratio 4",
        "None: random weights.",
        "Not trained.",
        "Draws noise.",
    ):
        assert expected in text, expected
    parameters = sum(parameter.numel() for parameter in tiny_vae().parameters())
    assert f"| `AutoencoderKLVCVAE` | {parameters:,} | F32 |" in text
    assert "More Information Needed" not in text


def test_the_card_of_a_pipeline_lists_its_models_and_admits_what_was_not_measured(tmp_path):
    latte_pipeline().save_pretrained(tmp_path, remote_code=True)
    unmeasured = CardContent("Latte", "Sky.", "other", "Sky clips.", "By examples/train_latte.py.", "Small.")
    text = write_model_card(tmp_path, unmeasured).read_text()
    assert "Nothing was measured on these weights." in text
    assert "| `LatteAdaLNTransformer3DModel` |" in text
    assert "| `AutoencoderKLVCVAE` |" in text
    assert f'DiffusionPipeline.from_pretrained("{tmp_path}", trust_remote_code=True)' in text
    assert "those of `LatteVCVAEUnconditionalPipeline`" in text


def test_half_filled_cards_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="limitations of a model card is empty"):
        CardContent("A", "B", "mit", "C", "D", " ")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    wan_pipeline().transformer.save_pretrained(tmp_path / "wan")
    for folder in ("scheduler", "wan"):
        with pytest.raises(ValueError, match="holds no model of vc_vae_diffusers"):
            add_remote_code(tmp_path / folder)
    with pytest.raises(ValueError, match="WanTransformer3DModel"):
        AutoVCVAEModel.from_pretrained(str(tmp_path), subfolder="wan")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as an upload uses; files arrive in `Hub.files`."""

    files: dict[str, bytes] = {}  # noqa: RUF012 (filled by the test's requests)
    created: list[dict] = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/user/tiny"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/user/tiny/commit/0", "commitOid": "0" * 40})

    def do_GET(self):
        self.answer({"id": "user/tiny", "sha": "0" * 40, "siblings": []})

    def answer(self, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_push_uploads_weights_stubs_and_our_card(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        url = push_to_hub(latte_pipeline(), "user/tiny", CONTENT, private=True, token="hf_test", endpoint=endpoint)
    finally:
        server.shutdown()
        server.server_close()
    assert url.endswith("/user/tiny/commit/0")
    assert (Hub.created[0]["name"], Hub.created[0]["visibility"]) == ("tiny", "private")
    assert {"README.md", "model_index.json", "pipeline_latte_vcvae.py", "vae/vc_vae_diffusers.py"} <= set(Hub.files)
    weights = {path for path in Hub.files if path.endswith(".safetensors")}
    assert {path.split("/")[0] for path in weights} == {"vae", "transformer"}
    card = Hub.files["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("user/tiny", trust_remote_code=True)' in card
    assert "| PSNR | 12.5 dB |" in card
    # What arrived loads again.
    for path, content in Hub.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    loaded = LatteVCVAEUnconditionalPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded.transformer.blocks[0].mlp.fc1.weight, tiny_latte().blocks[0].mlp.fc1.weight)


def test_a_card_is_drawn_in_float32_where_bfloat16_is_emulated(monkeypatch, tmp_path):
    dtypes = []
    vae = tiny_vae().to(torch.bfloat16)
    vae.decoder.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(picture, "has_bfloat16", lambda device, able=able: able)
        picture.draw_reconstruction(vae, tmp_path)
        assert set(dtypes) == {dtype}
        dtypes.clear()
    assert vae.dtype == torch.bfloat16
