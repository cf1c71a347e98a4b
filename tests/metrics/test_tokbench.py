"""TokBench: annotations, geometry, bins, and the networks on rendered text and real faces."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vc_vae_diffusers.evaluation.loading import ModelSpec
from vc_vae_diffusers.evaluation.protocols import load_protocol
from vc_vae_diffusers.evaluation.results import find_model, read_result
from vc_vae_diffusers.evaluation.runner import RunOptions, run_evaluation
from vc_vae_diffusers.metrics import tokbench
from vc_vae_diffusers.metrics.tokbench import AnnotatedVideo, FrameGeometry, VideoScorer, Word, bin_means, text_scores
from vc_vae_diffusers.metrics.tokbench_backends import (
    ARCFACE_POINTS,
    FRENCH,
    GlintEmbedder,
    ParseqReader,
    aligned_crop,
    similarity_transform,
)
from vc_vae_diffusers.video import VideoWriter

WORDS = ("Hello", "World42", "STOP", "Table", "19.99")


def _font(size: int) -> ImageFont.FreeTypeFont:
    matplotlib = pytest.importorskip("matplotlib")
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _sign(words=WORDS, size: int = 30) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """A frame (240, 320, 3) with words, and their boxes."""
    picture = Image.new("RGB", (320, 240), (190, 200, 210))
    draw, font, boxes = ImageDraw.Draw(picture), _font(size), []
    for index, word in enumerate(words):
        place = (20 + 8 * index, 8 + 46 * index)
        draw.text(place, word, font=font, fill=(20, 10, 40))
        left, top, right, bottom = draw.textbbox(place, word, font=font)
        boxes.append((int(left) - 3, int(top) - 3, int(right) + 3, int(bottom) + 3))
    return np.asarray(picture), boxes


# The astronaut of scikit-image (public domain), and where eyes, nose and mouth corners are.
FACE_POINTS = np.array([[203.2, 101.5], [246.5, 104.2], [225.0, 127.0], [201.0, 139.0], [246.0, 141.0]])


def _astronaut() -> np.ndarray:
    data = pytest.importorskip("skimage.data")
    return np.ascontiguousarray(data.astronaut()[..., :3])


def _blurred(frame: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(radius)))


# A writer of ONNX files, so that the readers of such files are tested without the onnx package ---------------------------


def _varint(value: int) -> bytes:
    result = bytearray()
    while True:
        result.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(result)


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _onnx_tensor(name: str, array: np.ndarray) -> bytes:
    kind = {"float32": 1, "int64": 7}[array.dtype.name]
    return b"".join(_field(1, size) for size in array.shape) + _field(2, kind) + _field(8, name) + _field(9, array.tobytes())


def _onnx_node(operator: str, inputs: list[str], output: str, **attributes: int | list[int]) -> bytes:
    encoded = b""
    for name, value in attributes.items():
        if isinstance(value, int):
            body = _field(1, name) + _field(3, value) + _field(20, 2)
        else:
            body = _field(1, name) + b"".join(_field(8, item) for item in value) + _field(20, 7)
        encoded += _field(5, body)
    return b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, operator) + encoded


def _onnx_model(path: Path, nodes: list[bytes], constants: dict[str, np.ndarray], shape: tuple[int, ...]) -> Path:
    def value(name: str, sizes: tuple[int, ...] | None) -> bytes:
        dims = b"" if sizes is None else _field(2, b"".join(_field(1, _field(1, n) if n else _field(2, "N")) for n in sizes))
        return _field(1, name) + _field(2, _field(1, _field(1, 1) + dims))

    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "graph")
    graph += b"".join(_field(5, _onnx_tensor(name, array)) for name, array in constants.items())
    graph += _field(11, value("input", shape)) + _field(12, value("output", None))
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path


def _column_ocr(path: Path, classes: int = len(FRENCH) + 3) -> Path:
    """(N, 3, 32, 128) to (N, 8, classes): column means, 16 by 16, times fixed weights."""
    weights = np.random.default_rng(0).standard_normal((16, classes)).astype(np.float32)
    nodes = [
        _onnx_node("ReduceMean", ["input"], "columns", axes=[1, 2], keepdims=0),
        _onnx_node("Reshape", ["columns", "shape"], "groups"),
        _onnx_node("MatMul", ["groups", "weights"], "output"),
    ]
    return _onnx_model(path, nodes, {"shape": np.array([-1, 8, 16]), "weights": weights}, (0, 3, 32, 128))


def _mean_face(path: Path) -> Path:
    """(1, 3, 112, 112) to (1, 6): means of the colours above and below the middle."""
    nodes = [
        _onnx_node("Reshape", ["input", "shape"], "halves"),
        _onnx_node("ReduceMean", ["halves"], "means", axes=[3], keepdims=0),
        _onnx_node("Flatten", ["means"], "output"),
    ]
    return _onnx_model(path, nodes, {"shape": np.array([1, 3, 2, 56 * 112])}, (1, 3, 112, 112))


# Definitions -----------------------------------------------------------------------------------------------------------


def test_the_mean_is_that_of_the_bins():
    """Rows of Table 3, CogVideoX at 256x: the mean column is the unweighted mean of the other three."""
    for bins, mean in (((24.80, 72.47, 86.34), 61.21), ((43.06, 82.29, 92.41), 72.59), ((0.58, 0.78, 0.91), 0.76)):
        values = [(ratio, value) for ratio, value in zip((0.015, 0.025, 0.5), bins, strict=True) for _ in range(3)]
        values.append((0.015, bins[0]))  # more small ones, which must not pull the mean
        found = bin_means(values, (0.01, 0.02, 0.03, 1.0))
        assert found["value"] == pytest.approx(mean, abs=0.011)
        assert found["small"] == pytest.approx(bins[0])
        assert found["counts"] == [4, 3, 3]


def test_bins_are_half_open_and_empty_ones_are_not_zero():
    edges = (0.1, 0.2, 0.3, 1.0)
    found = bin_means([(0.1, 1.0), (0.2, 2.0), (0.3, 3.0), (1.0, 9.0), (0.09, 9.0)], edges)
    assert (found["small"], found["medium"], found["large"]) == (1.0, 2.0, 3.0)
    empty = bin_means([(0.1, 1.0)], edges)
    assert np.isnan(empty["large"])
    assert np.isnan(empty["value"])
    assert empty["counts"] == [1, 0, 0]


def test_text_scores_against_the_textbook():
    def distance(a: str, b: str) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            previous, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
        return row[-1]

    assert text_scores("Stop", "STOP") == (0.0, 0.25)
    assert text_scores("STOP", "STOP") == (1.0, 1.0)
    assert text_scores("", "STOP") == (0.0, 0.0)
    assert text_scores("", "") == (1.0, 1.0)
    generator = np.random.default_rng(0)
    for _ in range(300):
        a, b = ("".join(generator.choice(list("abAé"), generator.integers(0, 9))) for _ in range(2))
        longest = max(len(a), len(b))
        expected = 1.0 if longest == 0 else 1 - distance(a, b) / longest
        assert text_scores(a, b) == (float(a == b), pytest.approx(expected, abs=1e-12))


def test_text_ratio():
    assert tokbench.text_ratio((10, 20, 110, 40), "Hello", 480, 640) == pytest.approx(100 / (5 * 640))
    assert tokbench.text_ratio((0, 0, 10, 90), "ab", 480, 640) == pytest.approx(90 / (2 * 640))


def test_frames_go_to_the_model_and_back():
    wide, tall = FrameGeometry(480, 854, 256), FrameGeometry(640, 360, 256)
    assert (wide.resized, wide.padded, wide.offset) == ((256, 455), (256, 480), (0, 12))
    assert (tall.resized, tall.padded, tall.offset) == ((455, 256), (480, 256), (12, 0))
    assert FrameGeometry(1080, 1920, 480).padded == (480, 864)
    frame = np.random.default_rng(0).integers(0, 256, (480, 854, 3), dtype=np.uint8)
    small = wide.shrink(frame)
    assert small.shape == (256, 480, 3)
    assert not small[:, :12].any()
    assert not small[:, 467:].any()
    resized = Image.fromarray(frame).resize((455, 256), Image.Resampling.BILINEAR)
    assert np.array_equal(small[:, 12:467], np.asarray(resized))
    back = wide.restore(small)
    assert np.array_equal(back, np.asarray(resized.resize((854, 480), Image.Resampling.BILINEAR)))


def test_crops_of_a_pixel_are_dropped_and_boxes_clipped():
    class Sizes:
        name = description = "sizes"

        def read(self, crops):
            return [f"{crop.shape[0]}x{crop.shape[1]}" for crop in crops]

    boxes = {"10x20": (5, 5, 25, 15), "gone": (5, 5, 6, 30), "outside": (90, 5, 120, 9), "8x4": (-6, -2, 4, 8)}
    video = AnnotatedVideo("v", Path("v.mp4"), 50, 60, words={3: [Word(box, text, 0.1) for text, box in boxes.items()]})
    scorer = VideoScorer(video, Sizes(), None)
    assert scorer.wants(3)
    assert not scorer.wants(2)
    frame = np.zeros((50, 60, 3), np.uint8)
    scorer.add(3, frame, frame)
    assert [(word[1], word[3]) for word in scorer.words] == [(1.0, "10x20"), (1.0, "8x4")]


# Annotations -------------------------------------------------------------------------------------------------------------


def _dataset(root: Path, texts: bool = True, faces: bool = True) -> Path:
    """The benchmark's layout with one text video (words in frames 1 and 3) and one face video (faces in frames 0 and 2)."""
    (root / "video_annotations").mkdir(parents=True)
    if texts:
        folder = root / "videos" / "text_data" / "ch3"
        folder.mkdir(parents=True)
        frame, boxes = _sign()
        words = [{"rec": word, "bbox": list(box), "ratio": 0.02} for word, box in zip(WORDS, boxes, strict=True)]
        del words[0]["ratio"]
        entry = {"video_name": "signs", "height": 240, "width": 320}
        entries = [{**entry, "file_name": f"signs-frame{n}.jpg", "annotations": words} for n in (2, 4)]
        entries.append({**entry, "file_name": "signs-frame1.jpg", "annotations": []})
        (root / "video_annotations" / "text_ch3.json").write_text(json.dumps(entries))
        _write(folder / "signs.mp4", [frame] * 5)
    if faces:
        folder = root / "videos" / "face_data" / "face_clip_3s"
        folder.mkdir(parents=True)
        face = {"kps": FACE_POINTS.tolist(), "ratio": 0.15}
        meta = {"video_name": "astronaut.mp4", "video_height": 512, "video_width": 512, "frame_anns": [[face], [], [face]]}
        (root / "video_annotations" / "videoface_meta.json").write_text(json.dumps([meta]))
        _write(folder / "astronaut.mp4", [_astronaut()] * 3)
    return root


def _write(path: Path, frames: list[np.ndarray]) -> None:
    with VideoWriter(path, 24, codec="lossless") as writer:
        writer.write(torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2))


def test_annotations_are_read_as_published(tmp_path):
    videos = tokbench.read_annotations(_dataset(tmp_path / "data"))
    assert [video.name for video in videos] == ["ch3/signs", "face_clip_3s/astronaut.mp4"]
    signs, astronaut = videos
    assert sorted(signs.words) == [1, 3]  # frame numbers in the file count from 1
    assert [word.text for word in signs.words[1]] == list(WORDS)
    box = signs.words[1][0].box
    assert signs.words[1][0].ratio == pytest.approx((box[2] - box[0]) / (5 * 320))
    assert signs.words[1][1].ratio == 0.02
    assert sorted(astronaut.faces) == [0, 2]
    assert np.allclose(astronaut.faces[0][0].key_points, FACE_POINTS)


def test_annotations_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="Junfeng5/TokBench"):
        tokbench.read_annotations(tmp_path)
    root = _dataset(tmp_path / "data", faces=False)
    (root / "videos" / "text_data" / "ch3" / "signs.mp4").unlink()
    with pytest.raises(ValueError, match=r"1 annotated videos are missing .*signs\.mp4"):
        tokbench.read_annotations(root)
    path = root / "video_annotations" / "text_ch3.json"
    entries = json.loads(path.read_text())
    entries[1]["annotations"][0]["bbox"] = [[0, 0], [1, 0], [1, 1], [0, 1]]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="entry 1 of"):
        tokbench.read_annotations(root)


# Faces -----------------------------------------------------------------------------------------------------------------


def test_similarity_transform_is_the_published_one():
    transform = pytest.importorskip("skimage.transform")
    generator = np.random.default_rng(0)
    for _ in range(20):
        points = ARCFACE_POINTS * generator.uniform(0.5, 4) + generator.normal(0, 6, (5, 2)) + generator.uniform(0, 300, 2)
        expected = transform.SimilarityTransform.from_estimate(points, ARCFACE_POINTS).params[:2]
        assert np.abs(similarity_transform(points, ARCFACE_POINTS) - expected).max() < 1e-9
    mirrored = ARCFACE_POINTS * [-1, 1]  # a reflection is not allowed
    linear = similarity_transform(mirrored, ARCFACE_POINTS)[:, :2]
    assert np.linalg.det(linear) > 0


def test_key_points_land_where_the_network_expects_them():
    pytest.importorskip("cv2")
    frame = np.zeros((200, 300, 3), np.uint8)
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = ARCFACE_POINTS @ turn.T * 1.2 + [140, 20]
    for x, y in points.round().astype(int):
        frame[y - 1 : y + 2, x - 1 : x + 2] = 255
    crop = aligned_crop(frame, points, ARCFACE_POINTS, 112)
    assert crop.shape == (112, 112, 3)
    for x, y in ARCFACE_POINTS.round().astype(int):
        assert crop[y - 1 : y + 2, x - 1 : x + 2].max() > 150
    assert crop[:30].max() == 0


def test_glint_reads_rgb_crops_from_its_file(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("cv2")
    embedder = GlintEmbedder(_mean_face(tmp_path / "glintr100.onnx"), verify=False)
    frame = _astronaut()
    crop = aligned_crop(frame, FACE_POINTS, ARCFACE_POINTS, 112).astype(np.float64)
    halves = (crop.reshape(2, 56 * 112, 3).mean(axis=1) - 127.5) / 127.5
    assert np.allclose(embedder.embed(frame, FACE_POINTS), halves.T.ravel(), atol=1e-5)
    from vc_vae_diffusers.metrics.weights import WeightsChecksumError

    with pytest.raises(WeightsChecksumError):
        GlintEmbedder(tmp_path / "glintr100.onnx")


def test_dlib_on_a_real_face():
    pytest.importorskip("dlib")
    pytest.importorskip("cv2")
    from vc_vae_diffusers.metrics.tokbench_backends import DlibEmbedder

    embedder, frame = DlibEmbedder(), _astronaut()
    source = embedder.embed(frame, FACE_POINTS)
    assert source.shape == (128,)
    similarities = [tokbench.cosine(embedder.embed(_blurred(frame, radius), FACE_POINTS), source) for radius in (0, 2, 4, 8)]
    assert similarities[0] == pytest.approx(1.0, abs=1e-9)
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[1] > 0.95
    assert similarities[3] < 0.9
    # dlib's own alignment of this face gives nearly the same embedding: the key points land where it expects them.
    import dlib
    import face_recognition_models

    models = Path(face_recognition_models.__file__).parent / "models"
    shape = dlib.shape_predictor(str(models / "shape_predictor_68_face_landmarks.dat"))(
        frame, dlib.rectangle(175, 76, 265, 166)
    )
    theirs = np.asarray(embedder._network.compute_face_descriptor(frame, shape))
    assert tokbench.cosine(theirs, source) > 0.99


# Words -----------------------------------------------------------------------------------------------------------------


def test_parseq_sees_crops_as_doctr_prepares_them(tmp_path):
    pytest.importorskip("onnxruntime")
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    reader = ParseqReader(_column_ocr(tmp_path / "parseq.onnx"))
    generator = np.random.default_rng(0)
    for height, width, expected in ((20, 200, (12, 128)), (50, 60, (32, 38)), (8, 32, (32, 128)), (3, 300, (1, 128))):
        crop = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = torch.from_numpy(crop).permute(2, 0, 1).float() / 255
        resized = functional.resize(picture, list(expected), antialias=True)
        padded = torch.zeros(3, 32, 128)
        padded[:, : expected[0], : expected[1]] = resized
        normalised = functional.normalize(padded, [0.694, 0.695, 0.693], [0.299, 0.296, 0.301])
        assert np.abs(reader.prepare(crop) - normalised.numpy()).max() < 1e-5


def test_parseq_classes_become_words(tmp_path):
    pytest.importorskip("onnxruntime")
    assert len(FRENCH) == len(set(FRENCH)) == 126
    assert (FRENCH[0], FRENCH[10], FRENCH[36], FRENCH[94], FRENCH[95], FRENCH[-1]) == ("0", "a", "A", "°", "£", "Ç")
    assert ParseqReader._word(np.array([36, 11, 126, 12, 12])) == "Ab"
    assert ParseqReader._word(np.array([127, 11])) == ""
    assert ParseqReader._word(np.array([1, 2])) == "12"
    reader = ParseqReader(_column_ocr(tmp_path / "parseq.onnx"), batch_size=2)
    generator = np.random.default_rng(1)
    crops = [generator.integers(0, 256, (12, 12 + 9 * k, 3), dtype=np.uint8) for k in range(5)]
    weights = np.random.default_rng(0).standard_normal((16, len(FRENCH) + 3)).astype(np.float32)
    expected = [
        ParseqReader._word((reader.prepare(crop).mean(axis=(0, 1)).reshape(8, 16) @ weights).argmax(axis=1))
        for crop in crops
    ]
    assert reader.read(crops) == expected
    assert any(expected)
    assert "sha256" in reader.description
    with pytest.raises(ValueError, match="French vocabulary"):
        ParseqReader(_column_ocr(tmp_path / "latin.onnx", classes=100)).read(crops)
    with pytest.raises(ValueError, match="not a file"):
        ParseqReader(tmp_path / "missing.onnx")


def test_rapidocr_on_rendered_text():
    pytest.importorskip("rapidocr")
    from vc_vae_diffusers.metrics.tokbench_backends import RapidOCRReader

    reader = RapidOCRReader()
    frame, boxes = _sign()
    read = {}
    for radius in (0, 9):
        picture = _blurred(frame, radius)
        read[radius] = reader.read([picture[top:bottom, left:right] for left, top, right, bottom in boxes])
    assert read[0] == list(WORDS)
    scores = {radius: [text_scores(*pair)[1] for pair in zip(words, WORDS, strict=True)] for radius, words in read.items()}
    assert sum(scores[9]) < 0.6 * sum(scores[0])
    assert reader.read([np.full((30, 60, 3), 128, np.uint8)]) == [""]


# The whole benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture
def image_vae(tmp_path) -> Path:
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "image_vae")
    return tmp_path / "image_vae"


def test_benchmark_with_the_original_networks_files(tmp_path, image_vae):
    """The runner, with networks that compute something simple from files of the originals' form."""
    pytest.importorskip("onnxruntime")
    root = _dataset(tmp_path / "data", faces=False)
    ocr = _column_ocr(tmp_path / "parseq.onnx")
    options = RunOptions(device="cpu", ocr=ocr)
    protocol = load_protocol("tokbench-video-256", {"size": 64})
    out = tmp_path / "r.json"
    run_evaluation([ModelSpec("vae", str(image_vae))], protocol, root, out, options)
    result = read_result(out)
    assert [entry["label"] for entry in result["models"]] == ["original", "resized", "vae"]
    frame, boxes = _sign()
    geometry, reader = FrameGeometry(240, 320, 64), ParseqReader(ocr)
    resized = geometry.restore(geometry.shrink(frame))
    for label, picture in (("original", frame), ("resized", resized)):
        read = reader.read([picture[top:bottom, left:right] for left, top, right, bottom in boxes])
        (record,) = find_model(result, label)["videos"]
        assert record["frames"] == 5
        assert [word[3] for word in record["words"]] == read * 2
        assert [word[4] for word in record["words"]] == list(WORDS) * 2
        expected = [text_scores(*pair)[1] * 100 for pair in zip(read, WORDS, strict=True)]
        metrics = find_model(result, label)["metrics"]
        assert metrics["t_ned[parseq]"]["medium"] == pytest.approx(np.mean(expected[1:]))
        assert metrics["t_ned[parseq]"]["counts"] == [0, 8, 2]  # "Hello" has no ratio of its own: its size decides
        assert np.isnan(metrics["t_ned[parseq]"]["value"])
    assert set(find_model(result, "vae")["metrics"]) == {"t_acc[parseq]", "t_ned[parseq]"}
    assert "parseq.onnx" in find_model(result, "vae")["metric_backends"]["t_acc[parseq]"]


def test_benchmark_with_the_stand_ins(tmp_path, image_vae):
    for name in ("rapidocr", "dlib", "cv2"):
        pytest.importorskip(name)
    root = _dataset(tmp_path / "data")
    protocol = load_protocol("tokbench-video-256")
    models = [ModelSpec("noise", str(image_vae))]
    result = run_evaluation(models, protocol, root, tmp_path / "r.json", RunOptions(device="cpu"))
    metrics = {entry["label"]: entry["metrics"] for entry in result["models"]}
    assert list(metrics) == ["original", "resized", "noise"]
    if any("f_sim[glintr100]" in values for values in metrics.values()):
        pytest.skip("glintr100 is on this machine: faces are measured with it")
    assert metrics["original"]["t_acc[rapidocr]"]["medium"] == 100.0
    assert metrics["original"]["f_sim[dlib]"]["medium"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["resized"]["t_acc[rapidocr]"]["medium"] == 100.0  # 240 lines are enlarged to 256
    assert 0.97 < metrics["resized"]["f_sim[dlib]"]["medium"] < 1.0
    assert metrics["noise"]["t_ned[rapidocr]"]["medium"] < 20.0
    assert metrics["noise"]["f_sim[dlib]"]["medium"] < 0.95
    assert "stand-in" in result["models"][0]["metric_backends"]["f_sim[dlib]"]


def test_videos_of_another_size_are_not_scored(tmp_path, image_vae):
    pytest.importorskip("onnxruntime")
    root = _dataset(tmp_path / "data", faces=False)
    _write(root / "videos" / "text_data" / "ch3" / "signs.mp4", [_sign()[0][:200]] * 3)
    options = RunOptions(device="cpu", ocr=_column_ocr(tmp_path / "parseq.onnx"))
    with pytest.raises(ValueError, match=r"is 320x200, but its annotations are of 320x240"):
        run_evaluation([], load_protocol("tokbench-video-256"), root, tmp_path / "r.json", options)


def test_annotations_beyond_the_end_are_counted(tmp_path):
    pytest.importorskip("onnxruntime")
    root = _dataset(tmp_path / "data", faces=False)
    _write(root / "videos" / "text_data" / "ch3" / "signs.mp4", [_sign()[0]] * 3)
    options = RunOptions(device="cpu", ocr=_column_ocr(tmp_path / "parseq.onnx"))
    result = run_evaluation([], load_protocol("tokbench-video-256"), root, tmp_path / "r.json", options)
    assert result["models"][0]["warnings"] == ["1 annotated frames are beyond the end of their videos"]
    assert len(result["models"][0]["videos"][0]["words"]) == 5
