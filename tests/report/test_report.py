"""Tables, figures and the page: right numbers in the right cells, and a page that a browser shows."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from vc_vae_diffusers.cli import report as command
from vc_vae_diffusers.evaluation.journal import file_name
from vc_vae_diffusers.evaluation.protocols import load_protocol
from vc_vae_diffusers.evaluation.results import new_result, write_result
from vc_vae_diffusers.report import figures
from vc_vae_diffusers.report.figures import Clips, Crop
from vc_vae_diffusers.report.paper import TABLES
from vc_vae_diffusers.report.tables import Column, Row, Table, make_table, tables_of
from vc_vae_diffusers.report.writer import write_report
from vc_vae_diffusers.video import write_image

pytest.importorskip("matplotlib")


def _entry(label: str, psnr: float, **more) -> dict:
    frames = [psnr + offset for offset in (-2.0, 0.5, 0.5, 1.0)]
    return {
        "label": label,
        "source": f"models/{label}",
        "packages": {"torch": "2"},
        "metric_backends": {"psnr": "per frame"},
        "compression": [4, 8, 8],
        "latent_channels": 16,
        "measured": 3,
        "skipped": [],
        "warnings": [],
        "metrics": {
            "psnr": {"value": psnr, "std": 1.0, "frames": 12, "identical_frames": 0},
            "ssim": {"value": psnr / 40, "std": 0.1, "frames": 12, "identical_frames": 0},
            "lpips_vgg": {"value": 1 / psnr, "std": 0.1, "frames": 12, "identical_frames": 0},
            "fvd": {"value": 400 - psnr, "clips": 3, "reference_clips": 3},
            "fvd_batch_mean@2": {"value": 200 - psnr, "clips": 3, "reference_clips": 3},
        },
        "curves": {"psnr": frames, "ssim": [value / 40 for value in frames], "lpips_vgg": [1 / v for v in frames]},
        "first_frame": {},
        "timing": {"frames": 12, "encode_ms_per_frame": 1.5, "decode_ms_per_frame": 2.5},
        "videos": [{"sample": "a.mp4", "first_frame_index": 1, "per_frame": {"psnr": frames}}],
        **more,
    }


def _result(protocol: str = "ucf101", entries: list[dict] | None = None, **overrides) -> dict:
    result = new_result(
        load_protocol(protocol, overrides).to_dict(),
        {"root": "data", "source": "a list", "count": 3, "sha256": "0" * 64, "names": ["a.mp4", "b.mp4", "c.mp4"]},
    )
    result["models"] = entries if entries is not None else [_entry("ours", 36.0), _entry("other_1", 35.0)]
    return result


# The paper ---------------------------------------------------------------------------------------------------------------


def test_reported_numbers_are_the_papers():
    """Against cells copied from the paper's text, and against its own statements."""
    assert len(TABLES) == 11

    def values(key: str, label: str, number: int = 0) -> dict:
        return [row.values for row in TABLES[key].rows if row.label == label][number]

    ours = values("table1/webvid", "VC-VAE")
    assert (ours["psnr"], ours["ssim"], ours["lpips (net not stated)"], ours["fvd (kind not stated)"]) == (
        36.04,
        0.9459,
        0.03315,
        36.80,
    )
    assert values("table1/ucf101", "VC-VAE", 1)["psnr"] == 38.85
    assert values("table1/ucf101", "Hunyuan")["fvd (kind not stated)"] == 37.07
    for key in ("table3/256", "table3/480"):  # the mean is that of the bins, to the digits printed
        for row in TABLES[key].rows:
            for name, slack in (("t_acc[parseq]", 0.011), ("t_ned[parseq]", 0.011), ("f_sim[glintr100]", 0.0101)):
                parts = [row.values[f"{name}/{part}"] for part in ("small", "medium", "large")]
                assert row.values[f"{name}/value"] == pytest.approx(sum(parts) / 3, abs=slack), (key, row.label, name)
    gain = values("table6", "In-sequence")["psnr"] - values("table6", "Separate")["psnr"]
    assert gain == pytest.approx(1.19)
    assert values("table8", "GCConv with TDC")["psnr"] - values("table8", "GCConv without TDC")["psnr"] == pytest.approx(0.9)
    assert values("table9/512", "Wanx2.1*")["psnr"] == 35.96


# Tables ------------------------------------------------------------------------------------------------------------------


def test_measured_and_reported_rows_stay_apart():
    table = make_table("T", [_entry("ours", 36.0), _entry("other", 35.0)], TABLES["table1/ucf101"])
    keys = [column.key for column in table.columns]
    kinds = ["lpips_vgg", "lpips (net not stated)", "fvd", "fvd_batch_mean@2", "fvd (kind not stated)"]
    assert keys == ["psnr", "ssim", *kinds]
    assert [row.reported for row in table.rows] == [False] * 2 + [True] * 8
    text = table.to_markdown()
    (ours,) = (line for line in text.splitlines() if line.startswith("| ours "))
    assert "| 4x8x8 | 16 | **36.00** | **0.9000** |" in ours
    (theirs,) = (line for line in text.splitlines() if line.startswith("| Hunyuan † "))
    assert "38.80" in theirs
    assert "**" not in theirs  # the best is among what was measured
    assert "† as the paper reports it; not measured here." in text
    measured = dict(zip(keys, table.rows[0].values, strict=False))
    assert "lpips (net not stated)" not in measured.values()


def test_the_best_is_by_direction_and_as_printed():
    columns = [Column("up", "up", "higher", 2), Column("down", "down", "lower", 1), Column("plain", "plain", None, 0)]
    rows = [
        Row("a", {"up": 1.004, "down": 5.0, "plain": 3}),
        Row("b", {"up": 1.001, "down": 7.0, "plain": 4}),
        Row("c", {"up": float("nan"), "down": float("inf")}),
        Row("d", {"up": 9.0, "down": 0.1}, reported=True),
        Row("original", {"up": float("inf"), "down": 0.0}, reference=True),
    ]
    lines = Table("T", columns, rows).to_markdown().splitlines()
    assert "| a | **1.00** | **5.0** | 3 |" in lines
    assert "| b | **1.00** | 7.0 | 4 |" in lines
    assert "| c | — | inf | — |" in lines
    assert "| d † | 9.00 | 0.1 | — |" in lines
    assert "| original | inf | 0.0 | — |" in lines


def test_every_form_escapes_names():
    label = 'a_b*|<i>&"%'
    table = Table(
        "50% & <more>", [Column("x", "x", "higher", 1)], [Row(label, {"x": 1.0}), Row("b", {"x": 2.0}, reported=True)]
    )
    assert '| a\\_b\\*\\|\\<i>&"% | 1.0 |' in table.to_markdown()
    latex = table.to_latex()
    assert r"a\_b*|<i>\&" in latex
    assert r"\caption{50\% \& <more>}" in latex
    assert r"b$^\dagger$ & 2.0 \\" in latex
    assert latex.count(r"\begin") == latex.count(r"\end") == 2
    assert "<i>" not in table.to_html()
    assert "&lt;i&gt;" in table.to_html()
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert rows[0] == {"model": label, "kind": "measured", "compression": "", "channels": "", "x": "1.0"}
    assert rows[1]["kind"] == "reported"


def test_tokbench_bins_are_columns():
    metric = {"value": 60.0, "small": 20.0, "medium": 70.0, "large": 90.0, "counts": [1, 2, 3]}
    entry = _entry("ours", 30.0, metrics={"t_acc[rapidocr]": metric, "f_sim[dlib]": {**metric, "value": 0.9}})
    table = make_table("T", [entry], TABLES["table3/256"])
    labels = [column.label for column in table.columns]
    assert labels[:4] == [f"T-ACC {part} [rapidocr]" for part in ("small", "medium", "large", "mean")]
    assert "T-ACC mean [parseq]" in labels  # reported ones never share a column with a stand-in
    assert table.rows[0].values["t_acc[rapidocr]/value"] == 60.0
    assert "t_acc[parseq]/value" not in table.rows[0].values


def test_which_tables_a_result_gets():
    (table,) = tables_of(_result(), "r")
    assert table.title == "r, beside the paper's Table 1, UCF-101"
    (changed,) = tables_of(_result(num_frames=8), "r")
    assert any("changed from the preset" in note for note in changed.notes)
    (plain,) = tables_of(_result("folder"), "r")
    assert not any(row.reported for row in plain.rows)
    (asked,) = tables_of(_result("folder"), "r", ["table1/webvid"])
    assert any("no comparison" in note for note in asked.notes)
    with pytest.raises(ValueError, match="table7"):
        tables_of(_result(), "r", ["table7"])
    first = _entry("ours", 30.0, first_frame={"psnr": 28.0})
    tables = tables_of(_result("first-frame", [first]), "r")
    assert tables[0].rows[0].values == {"psnr": 28.0}
    assert tables[0].rows[1].label == "Separate"
    assert tables[1].rows[0].values["psnr"] == 30.0
    uneven = _result(entries=[_entry("a", 30.0), _entry("b", 31.0, measured=2)])
    assert any("same samples: a 3, b 2" in note for note in tables_of(uneven, "r")[0].notes)


# Figures -----------------------------------------------------------------------------------------------------------------


def _clips() -> Clips:
    generator = np.random.default_rng(0)
    source = generator.integers(60, 190, (5, 48, 64, 3), dtype=np.uint8)
    good, bad = source.copy(), source.copy()
    good[..., 0] += 6
    bad[:, 20:32, 40:52] += 60
    return Clips("clip", source, {"good": good, "bad": bad})


def test_the_crop_is_where_models_differ():
    crop = figures.choose_crop(_clips(), side=12)
    assert crop == Crop(40, 20, 12)
    alone = _clips()
    del alone.models["good"]
    assert figures.choose_crop(alone, side=12) == Crop(40, 20, 12)
    with pytest.raises(ValueError, match="inside"):
        Crop(60, 0, 12).of(alone.source)


def test_error_maps_show_the_error_on_one_scale():
    clips = _clips()
    errors = figures.error_of(clips.models["bad"], clips.source)
    assert errors[0, 25, 45] == pytest.approx(60 / 255)
    assert errors[0, 0, 0] == 0
    assert figures.error_of(clips.models["good"], clips.source)[0, 0, 0] == pytest.approx(2 / 255)
    image = np.asarray(figures.draw_errors(clips, [0, 4]))
    height = round(48 * figures.CELL / 64)
    good, bad = (image[22 + row * (height + figures.GAP) :][:height, figures.LABEL :][:, : figures.CELL] for row in (0, 1))
    assert good.max() < 40  # less than a percent of the range: nearly black
    assert bad[26 * 3, 46 * 3].min() > 180  # 60 / 255 is nearly full scale: yellow to white
    assert bad[5, 5].max() == 0
    assert list(map(tuple, figures._heat(np.array([0.0, 1 / 3, 2 / 3, 1.0])))) == [
        (0, 0, 0),
        (255, 0, 0),
        (255, 255, 0),
        (255, 255, 255),
    ]


def test_strips_hold_the_frames_they_name():
    clips = _clips()
    frames = figures.pick_frames(5, 3)
    assert frames == [0, 2, 4]
    assert figures.pick_frames(2) == [0, 1]
    assert figures.pick_frames(1) == [0]
    crop = Crop(40, 20, 12)
    image = np.asarray(figures.draw_crops(clips, crop, frames))
    side = figures.CELL
    assert image.shape[1] == figures.LABEL + 3 * (side + figures.GAP)
    for row, clip in enumerate([clips.source, clips.models["good"], clips.models["bad"]]):
        for column, frame in enumerate(frames):
            cell = image[22 + row * (side + figures.GAP) :, figures.LABEL + column * (side + figures.GAP) :][:side, :side]
            assert np.array_equal(cell[8::16, 8::16], crop.of(clip[frame]))
    outlined = np.asarray(figures.draw_frames(clips, crop, frames))
    assert (outlined == figures.ACCENT).all(axis=-1).any()


def test_frames_are_enlarged_by_whole_pixels():
    """128 pixels do not become 192: every second one would be twice as wide."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), dtype=np.uint8)
    clips = figures.Clips("n", frames, {"m": frames})
    image = np.asarray(figures.draw_frames(clips, Crop(100, 100, 8), [0]))
    cell = image[22:, figures.LABEL :][:256, :256]
    assert np.array_equal(cell[:192, :192], frames[0, :96, :96].repeat(2, axis=0).repeat(2, axis=1))


def test_curves_are_drawn():
    entries = [_entry("ours", 36.0), _entry("other", 30.0)]
    image = np.asarray(figures.draw_curves(entries, ["psnr", "ssim"]))
    assert image.shape[1] > 1000
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    only = np.asarray(figures.draw_curves(entries[:1], ["psnr", "ssim"]))
    assert (image != only).any()


# The page ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def result_file(tmp_path) -> Path:
    """A result with saved frames of one sample and a second sample that could not be used."""
    path = tmp_path / "ucf.json"
    result = _result(entries=[_entry("ours", 36.0), _entry("org/other*", 35.0, warnings=["FVD over 3 clips is biased"])])
    result["frames"] = {"folder": "ucf_frames", "samples": ["a/<x>.mp4", "gone.mp4"]}
    clips = _clips()
    folder = tmp_path / "ucf_frames" / file_name("a/<x>.mp4")
    for name, frames in (("source", clips.source), ("ours", clips.models["good"]), ("org/other*", clips.models["bad"])):
        (folder / file_name(name)).mkdir(parents=True)
        for index, frame in enumerate(frames):
            picture = torch.from_numpy(frame).permute(2, 0, 1)
            write_image(folder / file_name(name) / f"{index:03d}.png", picture)
    write_result(path, result)
    return path


class _Checker(HTMLParser):
    VOID = frozenset(("meta", "img", "br", "link", "input"))

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images = 0

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.images += tag == "img"
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained(result_file, tmp_path):
    out = tmp_path / "report"
    page = write_report([result_file], out, command="vcvae report x").read_text()
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.images == 4  # curves, frames, crops, errors
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in checker.links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    for text in ("Table 1, UCF-101", "org/other*", "38.97", "vcvae report x", "FVD over 3 clips is biased", "&lt;x&gt;"):
        assert text in page
    assert "<x>" not in page
    names = sorted(path.name for path in out.iterdir())
    stem = f"ucf_{file_name('a/<x>.mp4')}"
    pictures = ["ucf_curves.png", *(f"{stem}_{kind}.png" for kind in ("crops", "errors", "frames"))]
    assert names == sorted(["index.html", "ucf_table.csv", "ucf_table.md", "ucf_table.tex", *pictures])
    assert "38.97" in (out / "ucf_table.md").read_text()


def test_notes_and_warnings_are_said_once(tmp_path):
    few, own = "FVD over 3 clips is biased", "1 sample could not be used"
    entries = [_entry("ours", 36.0, warnings=[few, own]), _entry("other", 35.0, warnings=[few])]
    write_result(tmp_path / "r.json", _result(entries=entries))
    page = write_report([tmp_path / "r.json"], tmp_path / "report", notes=["Seven clips & no more."]).read_text()
    assert "<p class=lead>Seven clips &amp; no more.</p>" in page
    assert page.count(few) == 1
    assert f"<p class=warning>{few}</p>" in page  # of all models: none is named
    assert f"<p class=warning>ours: {own}</p>" in page


def test_results_of_one_protocol_share_a_table(result_file, tmp_path):
    more = tmp_path / "more.json"
    write_result(more, _result(entries=[_entry("third", 34.0)]))
    page = write_report([result_file, more], tmp_path / "report").read_text()
    assert page.count("beside the paper&#x27;s Table 1, UCF-101</figcaption>") == 1
    assert "third" in page
    other = tmp_path / "other.json"
    write_result(other, _result("webvid", entries=[_entry("ours", 34.0)]))
    page = write_report([result_file, other], tmp_path / "report").read_text()
    assert "Table 1, WebVid-10M" in page
    assert page.count("<section") == 2
    write_result(more, _result(entries=[_entry("ours", 34.0)]))
    with pytest.raises(ValueError, match="has a model 'ours'"):
        write_report([result_file, more], tmp_path / "report")


def test_first_frame_results_get_figure_4b(tmp_path):
    entry = _entry("ours", 30.0, first_frame={"psnr": 28.0, "ssim": 0.7})
    entry["videos"][0]["first_frame_index"] = 0
    write_result(tmp_path / "first.json", _result("first-frame", [entry]))
    page = write_report([tmp_path / "first.json"], tmp_path / "report").read_text()
    assert "Fig. 4b" in page
    assert Image.open(tmp_path / "report" / "first_fig4b.png").size[0] > 500


def test_command(result_file, tmp_path):
    app = typer.Typer()
    app.command()(command.report)
    arguments = [str(result_file), "--out", str(tmp_path / "r"), "--paper", "table9/256", "--crop", "4,4,16"]
    arguments += ["--strip-frames", "2"]
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    page = (tmp_path / "r" / "index.html").read_text()
    assert "16 pixels square at (4, 4), as given" in page
    (crops,) = (tmp_path / "r").glob("*_crops.png")
    assert Image.open(crops).width == figures.LABEL + 2 * (figures.CELL + figures.GAP)
    assert "Table 9, ImageNet validation at 256x256" in page
    assert CliRunner().invoke(app, [str(result_file), "--crop", "1,2"]).exit_code == 2


def test_the_command_on_the_page_has_its_notes_shortened(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/bin/vcvae", "report", "a b.json", "--note", "long", "--out", "r", "--note", "text"])
    assert command._command_line() == "vcvae report 'a b.json' --note '…' --out r --note '…'"


PROBE = """<script>addEventListener("load", () => { document.body.dataset.probe = [
  [...document.images].filter(i => i.complete && i.naturalWidth > 0).length, document.images.length,
  document.documentElement.scrollWidth <= innerWidth, document.querySelectorAll("tr.reported").length,
  document.querySelectorAll("td.best").length].join(" "); });</script>"""


def _chromium(browser: str, folder: Path, *arguments: str) -> str:
    """Run a headless Chromium and return what it prints.

    Into a file: its helpers may outlive it and would hold a pipe open. They are ended with its session.
    """
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-breakpad", "--hide-scrollbars"]
    command = [browser, *flags, f"--user-data-dir={folder / 'profile'}", *arguments]
    printed = folder / "printed.txt"
    with printed.open("wb") as stream, (folder / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=stream, stderr=errors, env={**os.environ, "HOME": str(folder)}, start_new_session=True
        )
        try:
            status = process.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, (folder / "errors.txt").read_text()
    return printed.read_text()


def test_page_in_a_browser(result_file, tmp_path):
    """Chromium decodes every picture, nothing overflows the window, and the screenshot is not blank."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on PATH")
    page = write_report([result_file], tmp_path / "report")
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    for width in (1280, 400):
        arguments = (f"--window-size={width},1500", "--virtual-time-budget=5000", "--dump-dom", probed.as_uri())
        (found,) = re.findall(r'data-probe="([^"]*)"', _chromium(browser, tmp_path, *arguments))
        assert found == "4 4 true 8 5"
    shot = tmp_path / "shot.png"
    _chromium(browser, tmp_path, "--window-size=1280,2600", f"--screenshot={shot}", page.as_uri())
    image = np.asarray(Image.open(shot).convert("RGB"))
    assert image.shape == (2600, 1280, 3)
    assert (image == figures.ACCENT).all(axis=-1).any()  # the outline of the crop, through PNG, base64 and browser
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 500


@pytest.mark.parametrize("damage", [{"models": 3}, {"models": [{"label": {}}]}, {"samples": []}, {"protocol": {"kind": 1}}])
def test_a_result_that_contradicts_itself_is_named(tmp_path, damage):
    path = tmp_path / "result.json"
    write_result(path, _result(entries=[_entry("tiny", 30.0)]) | damage)
    with pytest.raises(ValueError, match=r"result\.json: not what `vcvae evaluate` writes"):
        write_report([path], tmp_path / "out")
