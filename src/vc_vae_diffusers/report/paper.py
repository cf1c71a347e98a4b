"""The numbers that the paper reports, by table. They are never mixed with measured ones: every row of them is marked.

The paper does not say which LPIPS network and which kind of FVD it means; they have columns of their own. `NOTES` says what
its tables leave open.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReportedRow:
    """One row of a table of the paper.

    Args:
        label: as the paper has it.
        values: by column of our tables.
        compression: time x height x width, where the table states it.
        channels: of the latents, where the table states them.
    """

    label: str
    values: dict[str, float]
    compression: str = ""
    channels: int | None = None


@dataclass(frozen=True)
class ReportedTable:
    """A table of the paper, or the part of it that one protocol answers.

    Args:
        title: number and subject.
        rows: as printed.
        first_frame: whether its values are of the first frame alone.
        notes: what it leaves open.
    """

    title: str
    rows: tuple[ReportedRow, ...]
    first_frame: bool = False
    notes: tuple[str, ...] = field(default_factory=tuple)


LPIPS = "lpips (net not stated)"
FVD = "fvd (kind not stated)"
_OPEN = (
    "The paper does not name its LPIPS network (probably VGG) nor the kind of its FVD (almost surely the mean over small "
    "batches): compare with the measured columns in that knowledge.",
)


def _rows(keys: tuple[str, ...], lines: str, described: bool = False) -> tuple[ReportedRow, ...]:
    """Rows from lines `label | values`, or `label | compression | channels | values`."""
    rows = []
    for line in lines.strip().splitlines():
        label, *cells = (cell.strip() for cell in line.split("|"))
        compression, channels = (cells.pop(0), int(cells.pop(0))) if described else ("", None)
        values = dict(zip(keys, (float(cell) for cell in cells), strict=True))
        rows.append(ReportedRow(label, values, compression, channels))
    return tuple(rows)


_TABLE_1 = (FVD, "psnr", LPIPS, "ssim")
_TOKBENCH = tuple(f"{name}/{part}" for name in ("t_acc[parseq]", "t_ned[parseq]", "f_sim[glintr100]") for part in (
    "small", "medium", "large", "value"
))  # fmt: skip
_ABLATION = ("psnr", "ssim", LPIPS)

TABLES = {
    "table1/webvid": ReportedTable(
        "Table 1, WebVid-10M",
        _rows(
            _TABLE_1,
            """
            CogvideoX | 4x8x8 | 16 | 41.70 | 35.23 | 0.04125 | 0.9394
            Wanx2.1   | 4x8x8 | 16 | 42.40 | 35.40 | 0.03724 | 0.9385
            IVVAE     | 4x8x8 | 16 | 42.80 | 35.21 | 0.04301 | 0.9343
            WFVAE     | 4x8x8 | 16 | 36.86 | 35.60 | 0.03778 | 0.9394
            Hunyuan   | 4x8x8 | 16 | 36.23 | 35.84 | 0.03452 | 0.9425
            VC-VAE    | 4x8x8 | 16 | 36.80 | 36.04 | 0.03315 | 0.9459
            WFVAE     | 8x8x8 | 32 | 44.13 | 35.86 | 0.03735 | 0.9396
            VC-VAE    | 8x8x8 | 32 | 36.63 | 36.40 | 0.03298 | 0.9485
            """,
            described=True,
        ),
        notes=_OPEN,
    ),
    "table1/ucf101": ReportedTable(
        "Table 1, UCF-101",
        _rows(
            _TABLE_1,
            """
            CogvideoX | 4x8x8 | 16 | 50.47 | 37.61 | 0.03292 | 0.9605
            Wanx2.1   | 4x8x8 | 16 | 43.26 | 38.19 | 0.02971 | 0.9644
            IVVAE     | 4x8x8 | 16 | 40.68 | 38.48 | 0.02853 | 0.9660
            WFVAE     | 4x8x8 | 16 | 42.73 | 38.31 | 0.03036 | 0.9645
            Hunyuan   | 4x8x8 | 16 | 37.07 | 38.80 | 0.02757 | 0.9671
            VC-VAE    | 4x8x8 | 16 | 36.30 | 38.97 | 0.02747 | 0.9684
            WFVAE     | 8x8x8 | 32 | 53.11 | 37.95 | 0.03307 | 0.9627
            VC-VAE    | 8x8x8 | 32 | 38.47 | 38.85 | 0.02854 | 0.9672
            """,
            described=True,
        ),
        notes=_OPEN,
    ),
    "table3/256": ReportedTable(
        "Table 3, TokBench-Video at 256",
        _rows(
            _TOKBENCH,
            """
            CogvideoX | 24.80 | 72.47 | 86.34 | 61.21 | 43.06 | 82.29 | 92.41 | 72.59 | 0.58 | 0.78 | 0.91 | 0.76
            Wanx2.1   | 17.88 | 69.52 | 87.56 | 58.32 | 37.27 | 81.04 | 93.18 | 70.50 | 0.59 | 0.79 | 0.92 | 0.77
            IVVAE     | 18.43 | 72.08 | 89.52 | 60.01 | 38.29 | 82.49 | 94.36 | 71.72 | 0.57 | 0.79 | 0.93 | 0.76
            Hunyuan   | 26.85 | 69.12 | 87.47 | 61.15 | 45.55 | 80.54 | 93.12 | 73.07 | 0.60 | 0.80 | 0.92 | 0.77
            VC-VAE    | 31.81 | 77.21 | 89.70 | 66.24 | 51.21 | 85.24 | 94.39 | 76.95 | 0.64 | 0.82 | 0.93 | 0.80
            """,
        ),
        notes=("TokBench's scripts fed some baselines values in [0, 1] where [-1, 1] is due; those rows may be too low.",),
    ),
    "table3/480": ReportedTable(
        "Table 3, TokBench-Video at 480",
        _rows(
            _TOKBENCH,
            """
            CogvideoX | 28.02 | 65.41 | 91.71 | 61.71 | 43.47 | 78.24 | 95.60 | 72.43 | 0.67 | 0.80 | 0.91 | 0.79
            Wanx2.1   | 18.88 | 63.42 | 92.36 | 58.22 | 35.95 | 77.43 | 96.02 | 69.80 | 0.68 | 0.82 | 0.92 | 0.81
            IVVAE     | 20.58 | 63.89 | 92.98 | 59.15 | 37.85 | 78.07 | 96.37 | 70.76 | 0.68 | 0.82 | 0.92 | 0.80
            Hunyuan   | 28.65 | 64.49 | 91.83 | 61.66 | 44.43 | 77.83 | 95.83 | 72.70 | 0.69 | 0.82 | 0.92 | 0.81
            VC-VAE    | 31.24 | 72.27 | 92.72 | 65.41 | 48.11 | 82.90 | 96.24 | 75.75 | 0.72 | 0.83 | 0.92 | 0.83
            """,
        ),
        notes=("TokBench's scripts fed some baselines values in [0, 1] where [-1, 1] is due; those rows may be too low.",),
    ),
    "table4": ReportedTable(
        "Table 4, the TDC operator",
        _rows(
            _ABLATION,
            """
            Causal conv baseline | 33.29 | 0.9298 | 0.04946
            Causal conv + TDC    | 33.64 | 0.9336 | 0.04599
            GCConv baseline      | 33.49 | 0.9323 | 0.04720
            GCConv + TDC (full)  | 33.79 | 0.9357 | 0.04455
            """,
        ),
        notes=_OPEN,
    ),
    "table5": ReportedTable(
        "Table 5, the image VAE of the initialisation",
        _rows(
            _ABLATION,
            """
            SD3.5-VAE init, no TDC | 33.13 | 0.9264 | 0.05519
            Flux-VAE init, no TDC  | 33.49 | 0.9323 | 0.04720
            SD3.5-VAE init, TDC    | 33.74 | 0.9337 | 0.04691
            Flux-VAE init, TDC     | 33.79 | 0.9357 | 0.04455
            """,
        ),
        notes=_OPEN,
    ),
    "table6": ReportedTable(
        "Table 6, the first frame",
        _rows(
            _ABLATION,
            """
            Separate    | 32.15 | 0.9242 | 0.04059
            In-sequence | 33.34 | 0.9346 | 0.03601
            """,
        ),
        first_frame=True,
        notes=_OPEN,
    ),
    "table8": ReportedTable(
        "Table 8, the TDC operator at 8x8x8",
        _rows(
            _ABLATION,
            """
            GCConv without TDC | 31.11 | 0.9018 | 0.07641
            GCConv with TDC    | 32.01 | 0.9122 | 0.07099
            """,
        ),
        notes=_OPEN,
    ),
    "table9/256": ReportedTable(
        "Table 9, ImageNet validation at 256x256",
        _rows(
            _ABLATION,
            """
            SD3.5 VAE | 31.29 | 0.877 | 0.060
            Flux VAE  | 32.87 | 0.911 | 0.044
            Wanx2.1   | 31.34 | 0.879 | 0.058
            Wanx2.1*  | 33.03 | 0.915 | 0.037
            Hunyuan   | 33.33 | 0.910 | 0.054
            VC-VAE    | 33.42 | 0.919 | 0.048
            """,
        ),
        notes=("* the image as video frames.", *_OPEN),
    ),
    "table9/512": ReportedTable(
        "Table 9, ImageNet validation at 512x512",
        _rows(
            _ABLATION,
            """
            SD3.5 VAE | 33.54 | 0.910 | 0.060
            Flux VAE  | 35.40 | 0.939 | 0.042
            Wanx2.1   | 34.25 | 0.913 | 0.056
            Wanx2.1*  | 35.96 | 0.942 | 0.036
            Hunyuan   | 36.03 | 0.935 | 0.053
            VC-VAE    | 36.37 | 0.944 | 0.046
            """,
        ),
        notes=("* the image as video frames.", *_OPEN),
    ),
    "table9/1024": ReportedTable(
        "Table 9, ImageNet validation at 1024x1024",
        _rows(
            _ABLATION,
            """
            SD3.5 VAE | 37.61 | 0.971 | 0.034
            Flux VAE  | 39.84 | 0.982 | 0.023
            Wanx2.1   | 40.96 | 0.973 | 0.032
            Wanx2.1*  | 42.43 | 0.981 | 0.022
            Hunyuan   | 43.15 | 0.982 | 0.026
            VC-VAE    | 43.65 | 0.984 | 0.024
            """,
        ),
        notes=("* the image as video frames.", *_OPEN),
    ),
}
