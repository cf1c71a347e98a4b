"""The ComfyUI nodes: their contract, what they do on the bundled model, and the example workflows."""

import inspect
import json
import math
import sys

import pytest
import torch
from comfyui_host import PACK, Host, InterruptProcessingException

from vc_vae_diffusers import AutoencoderKLVCVAE, bundled_model_path

WHOLE = {"tile_size": 0, "overlap": 64, "groups_per_chunk": 1}
# Of ComfyUI 0.33: inputs that the examples connect or set, and what comes out.
STOCK = {
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    **{
        f"VAE{verb}Tiled": (
            {
                source: kind,
                "vae": "VAE",
                **dict.fromkeys(("tile_size", "overlap", "temporal_size", "temporal_overlap"), "INT"),
            },
            (result,),
        )
        for verb, source, kind, result in (("Encode", "pixels", "IMAGE", "LATENT"), ("Decode", "samples", "LATENT", "IMAGE"))
    },
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, ()),
}


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = Host(tmp_path)
    for name in [name for name in sys.modules if name.startswith("vcvae_pack")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in host.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return host


@pytest.fixture
def pack(host):
    return host.load_pack()


@pytest.fixture
def vae(pack):
    return pack.nodes.VCVAELoader().load(pack.model_folders.BUNDLED, "auto", "as saved")[0]


@pytest.fixture
def make_images(make_video):
    """A factory of image batches (T, H, W, 3) in [0, 1]."""
    return lambda *size, **options: ((make_video(*size, **options)[0] + 1) / 2).movedim(0, -1).contiguous()


def inputs_of(node) -> dict[str, tuple]:
    types = node.INPUT_TYPES()
    return {**types["required"], **types.get("optional", {})}


def check_widget(value, spec) -> None:
    """A value is one that the widget of this specification can have."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list):
        assert value in kind
    elif kind == "STRING":
        assert isinstance(value, str)
    else:
        assert type(value) is {"INT": int, "FLOAT": float}[kind]
        assert options["min"] <= value <= options["max"]


# Contract


def test_inputs_are_the_arguments_and_outputs_have_names(pack):
    assert set(pack.titles) == set(pack.nodes_by_name)
    for name, node in pack.nodes_by_name.items():
        arguments = dict(inspect.signature(getattr(node, node.FUNCTION)).parameters)
        assert list(arguments)[1:] == list(inputs_of(node)), name
        for argument in node.INPUT_TYPES().get("optional", {}):
            assert arguments[argument].default is not inspect.Parameter.empty, (name, argument)
        assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES), name
        assert isinstance(node.RETURN_TYPES, tuple), name
        assert node.CATEGORY == "VC-VAE"
        assert node.DESCRIPTION
        assert node.RETURN_TYPES or node.OUTPUT_NODE, name
        for spec in inputs_of(node).values():
            if len(spec) > 1 and "default" in spec[1]:
                check_widget(spec[1]["default"], spec)


@pytest.mark.parametrize("path", sorted(PACK.glob("api_workflows/*.json")), ids=lambda path: path.stem)
def test_workflows_fit_the_nodes(pack, host, path):
    (host.root / "input" / "clip.mp4").touch()
    workflow = json.loads(path.read_text())
    results = {}
    for number, node in workflow.items():
        ours = pack.nodes_by_name.get(node["class_type"])
        results[number] = ours.RETURN_TYPES if ours else STOCK[node["class_type"]][1]
    for node in workflow.values():
        ours = pack.nodes_by_name.get(node["class_type"])
        specs = inputs_of(ours) if ours else {name: (kind,) for name, kind in STOCK[node["class_type"]][0].items()}
        required = ours.INPUT_TYPES()["required"] if ours else specs
        assert set(required) <= set(node["inputs"]) <= set(specs)
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                assert results[value[0]][value[1]] == specs[name][0], (node["class_type"], name)
            elif ours:
                check_widget(value, specs[name])


def test_ui_workflow_is_the_api_workflow(pack, host):
    """The links and widgets of the file for the browser are those of the file for the HTTP API."""
    (host.root / "input" / "clip.mp4").touch()
    api = json.loads((PACK / "api_workflows" / "reconstruct.json").read_text())
    page = json.loads((PACK / "example_workflows" / "reconstruct.json").read_text())
    links = {link[0]: link for link in page["links"]}
    converted = {}
    for node in page["nodes"]:
        given, widgets = {}, iter(node["widgets_values"])
        for socket in node["inputs"]:
            value = next(widgets) if "widget" in socket else None
            link = links.get(socket["link"])
            given[socket["name"]] = [str(link[1]), link[2]] if link else value
            if socket["name"] == "seed":
                assert next(widgets) == "fixed"
        assert list(widgets) == (["image"] if "video" in given else [])  # the upload button
        converted[str(node["id"])] = {"class_type": node["type"], "inputs": given}
    assert converted == api
    for link in links.values():
        source, target = (next(n for n in page["nodes"] if n["id"] == link[k]) for k in (1, 3))
        assert link[0] in source["outputs"][link[2]]["links"]
        assert target["inputs"][link[4]]["link"] == link[0]
        assert source["outputs"][link[2]]["type"] == target["inputs"][link[4]]["type"] == link[5]


# Loading


def test_folders_with_a_vcvae_are_listed_and_others_are_not(pack, host, make_vae):
    make_vae().save_pretrained(host.root / "models" / "vcvae" / "mine")
    make_vae().save_pretrained(host.root / "models" / "diffusers" / "pipeline" / "vae")
    for name, text in (("damaged", "{"), ("foreign", '{"_class_name": "AutoencoderKL"}'), ("list", "[]")):
        (host.root / "models" / "vcvae" / name).mkdir()
        (host.root / "models" / "vcvae" / name / "config.json").write_text(text)
    assert set(pack.model_folders.model_folders()) == {pack.model_folders.BUNDLED, "mine", "pipeline/vae"}
    (loaded,) = pack.nodes.VCVAELoader().load("pipeline/vae", "bfloat16", "4k+1")
    assert (loaded.vae_dtype, loaded.model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert loaded.upscale_ratio[0](3) == 9
    with pytest.raises(ValueError, match=r"model is 'gone'.*models/vcvae"):
        pack.nodes.VCVAELoader().load("gone", "auto", "as saved")


def test_the_hub_loader_takes_ids_alone(pack, host):
    for name in ("nonsense", "a/b/c", str(host.root / "models")):
        with pytest.raises(ValueError, match="a hub id is owner/name"):
            pack.nodes.VCVAEHubLoader().load(name, "auto", "as saved")


# Nodes


@pytest.mark.parametrize("frames", [1, 4, 9])
def test_round_trips_keep_length_and_size_and_equal_the_model(pack, vae, make_images, frames):
    images = make_images(frames, 37, 50)
    (latents,) = pack.nodes.VCVAEEncode().encode(images, vae, **WHOLE)
    (decoded,) = pack.nodes.VCVAEDecode().decode(latents, vae, **WHOLE)
    model = AutoencoderKLVCVAE.from_pretrained(bundled_model_path())
    video = torch.nn.functional.pad(images.movedim(-1, 0)[None] * 2 - 1, (0, 6, 0, 3, 0, 0), mode="replicate")
    with torch.no_grad():
        z = model.encode(video).latent_dist.mode()
        expected = model.decode(z, num_frames=frames).sample
    torch.testing.assert_close(latents["samples"], z, rtol=0, atol=1e-4)
    assert decoded.shape == images.shape
    expected = ((expected[0, :, :, :37, :50] + 1) / 2).clamp(0, 1).movedim(0, -1)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)


def test_chunks_change_nothing_and_progress_reaches_the_end(pack, host, vae, make_images):
    images = make_images(13, 16, 24)
    (latents,) = pack.nodes.VCVAEEncode().encode(images, vae, **WHOLE)
    assert host.progress == [(4, 13), (8, 13), (12, 13), (13, 13)]
    (again,) = pack.nodes.VCVAEEncode().encode(images, vae, **{**WHOLE, "groups_per_chunk": 3})
    torch.testing.assert_close(again["samples"], latents["samples"], rtol=0, atol=1e-4)
    host.progress.clear()
    one, three = (
        pack.nodes.VCVAEDecode().decode(latents, vae, **{**WHOLE, "groups_per_chunk": groups}, num_frames=11)[0]
        for groups in (1, 3)
    )
    assert host.progress == [(4, 11), (8, 11), (11, 11), (11, 11)]
    assert one.shape[0] == 11
    torch.testing.assert_close(one, three, rtol=0, atol=1e-4)


def test_samples_follow_the_seed(pack, vae, make_images):
    images = make_images(4)
    first, same, other, mode = (
        pack.nodes.VCVAEEncode().encode(images, vae, **WHOLE, posterior=posterior, seed=seed)[0]["samples"]
        for posterior, seed in (("sample", 1), ("sample", 1), ("sample", 2), ("mode", 1))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, mode)


def test_resized_latents_are_a_clip_of_their_own(pack, vae, make_images):
    (latents,) = pack.nodes.VCVAEEncode().encode(make_images(3, 15, 23), vae, **WHOLE)
    changed = {**latents, "samples": latents["samples"].repeat(1, 1, 2, 1, 1)}
    assert pack.nodes.VCVAEDecode().decode(latents, vae, **WHOLE)[0].shape == (3, 15, 23, 3)
    assert pack.nodes.VCVAEDecode().decode(changed, vae, **WHOLE)[0].shape == (8, 16, 24, 3)


def test_reconstruction_is_shown_and_measured(pack, vae, make_images):
    images = make_images(5, 24, 40)
    alpha = torch.cat([images, torch.zeros(5, 24, 40, 1)], dim=-1)
    shown = pack.nodes.VCVAEReconstruct().reconstruct(alpha, vae, **WHOLE, difference_gain=2.0)
    decoded, panels, decibels, similar, text = shown["result"]
    assert panels.shape == (5, 24, 120, 3)
    assert torch.equal(panels[:, :, :40], images)
    assert torch.equal(panels[:, :, 40:80], decoded)
    torch.testing.assert_close(panels[:, :, 80:], (0.5 + 2 * (decoded - images)).clamp(0, 1))
    mse = (decoded - images).double().square().mean(dim=(1, 2, 3))
    assert decibels == pytest.approx((-10 * mse.log10()).mean().item(), abs=1e-3)
    assert 0 < similar < 1
    assert f"{decibels:.2f} dB" in text
    assert shown["ui"]["text"] == (text,)
    small = pack.nodes.VCVAEReconstruct().reconstruct(images[:, :8, :8], vae, **WHOLE, difference_gain=0.0)
    assert small["result"][1].shape == (5, 8, 16, 3)
    assert math.isnan(small["result"][3])


def test_videos_are_written_and_read(pack, host, make_images):
    images = (make_images(18, 21, 33) * 255).round() / 255
    writer, reader = pack.nodes.VCVAEWriteVideo(), pack.nodes.VCVAEReadVideo()
    shown = [writer.write(images, 24000 / 1001, "clips/a", "mkv", "lossless", 16)["ui"]["images"][0] for _ in range(2)]
    assert [image["filename"] for image in shown] == ["a_00001_.mkv", "a_00002_.mkv"]
    (host.root / "output" / "clips" / "a_00001_.mkv").rename(host.root / "input" / "b.mkv")
    assert reader.INPUT_TYPES()["required"]["video"][0] == ["b.mkv"]
    back, fps, count = reader.read("b.mkv", 0, 0, 0)
    assert count == 18
    assert fps == pytest.approx(24000 / 1001)
    torch.testing.assert_close(back, images, rtol=0, atol=1e-6)
    part, _, count = reader.read("b.mkv", 2, 3, 0)
    assert count == 3
    torch.testing.assert_close(part, images[2:5], rtol=0, atol=1e-6)
    assert reader.read("b.mkv", 0, 1, 42)[0].shape == (1, 42, 66, 3)
    before = reader.IS_CHANGED("b.mkv", start_frame=0)
    writer.write(images, 24.0, "c", "mkv", "lossless", 16)
    (host.root / "output" / "c_00001_.mkv").replace(host.root / "input" / "b.mkv")
    assert reader.IS_CHANGED("b.mkv", start_frame=0) != before
    assert reader.VALIDATE_INPUTS("b.mkv") is True
    assert "no video 'gone.mp4'" in reader.VALIDATE_INPUTS("gone.mp4")


# What stock nodes call


def test_stock_nodes_crop_from_the_middle_and_get_all_frames(vae, make_images):
    images = make_images(6, 21, 30)
    latents = vae.encode(images)
    assert latents.shape == (1, 16, 2, 2, 3)
    torch.testing.assert_close(latents, vae.encode(images[:, 2:18, 3:27]), rtol=0, atol=0)
    assert vae.decode(latents).shape == (1, 8, 16, 24, 3)
    batch = vae.decode(latents.repeat(2, 1, 1, 1, 1))
    torch.testing.assert_close(batch[1:], vae.decode(latents), rtol=0, atol=1e-4)
    assert (vae.spacial_compression_decode(), vae.temporal_compression_decode()) == (8, 4)
    assert (vae.downscale_ratio[0](6), vae.upscale_ratio[0](2)) == (2, 8)


def test_stock_tiles_are_cut_and_blend(vae, make_images):
    images = make_images(8, 64, 96)
    whole, tiled = vae.encode(images), vae.encode_tiled(images, tile_x=64, tile_y=64, overlap=32, tile_t=8, overlap_t=4)
    assert not torch.equal(whole, tiled)
    assert (whole - tiled).abs().mean() < 0.1 * whole.std()
    frames, joined = vae.decode(whole), vae.decode_tiled(whole, tile_x=8, tile_y=8, overlap=4, tile_t=2, overlap_t=1)
    assert not torch.equal(frames, joined)
    assert (frames - joined).abs().mean() < 0.02
    # Time is cut exactly, whatever the overlap.
    again = vae.decode_tiled(whole, tile_x=8, tile_y=8, overlap=4, tile_t=1, overlap_t=1)
    torch.testing.assert_close(joined, again, rtol=0, atol=1e-4)


def test_an_interrupt_stops_between_groups_and_leaves_the_model_as_it_was(host, vae, make_images):
    images = make_images(16)
    expected = vae.encode(images)
    host.progress.clear()
    host.interrupt_at = 8
    with pytest.raises(InterruptProcessingException):
        vae.encode(images)
    assert host.progress[-1] == (8, 16)
    host.interrupt_at = None
    assert not vae.model.encoder._forward_pre_hooks
    assert not vae.model.use_tiling
    assert torch.equal(vae.encode(images), expected)


def test_out_of_memory_goes_on_in_tiles(host, pack, vae, make_images, monkeypatch, caplog):
    monkeypatch.setattr(pack.video_vae, "TILE_AFTER_OOM", 32)
    images, sizes = make_images(4, 48, 48), []

    def limited(network, arguments):
        sizes.append(tuple(arguments[0].shape[-2:]))
        if max(sizes[-1]) > 32:
            raise torch.OutOfMemoryError("no room")

    hook = vae.model.encoder.register_forward_pre_hook(limited)
    latents = vae.encode(images)
    assert latents.shape == (1, 16, 1, 6, 6)
    assert sizes == [(48, 48)] + [(32, 32)] * 4
    assert "going on in tiles of 32 pixels" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):  # tiles that were asked for are not replaced by others
        vae.encode_tiled(images, tile_x=40, tile_y=40, overlap=8)
    hook.remove()


def test_memory_is_asked_for_by_size_and_not_by_length(host, vae):
    short, long = (vae.memory_used_decode((1, 16, frames, 32, 32), torch.float32) for frames in (2, 200))
    assert short == long > vae.size
    assert vae.memory_used_decode((1, 16, 2, 64, 64), torch.float32) > 2 * short
    vae.decode(torch.zeros(1, 16, 3, 2, 2))
    assert host.reserved[-1] == vae.memory_used_decode((1, 16, 3, 2, 2), torch.float32)
    vae.decode_tiled(torch.zeros(1, 16, 1, 32, 32), tile_x=8, tile_y=8, overlap=2)
    assert host.reserved[-1] < short


def test_wrong_inputs_are_refused_with_a_remedy(pack, vae):
    with pytest.raises(ValueError, match=r"pixels is of shape \(1, 8, 8, 1\).*pass frames"):
        vae.encode(torch.zeros(1, 8, 8, 1))
    with pytest.raises(ValueError, match=r"samples is of shape \(1, 4, 8, 8\).*5 dimensions"):
        vae.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="connect Load VC-VAE"):
        pack.nodes.VCVAEDecode().decode({"samples": torch.zeros(1, 16, 1, 2, 2)}, object(), **WHOLE)
