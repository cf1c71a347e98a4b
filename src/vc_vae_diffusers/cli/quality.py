"""What is printed about a reconstruction."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from rich.table import Table


def summary_line(result: dict[str, Any]) -> str:
    """What was reconstructed, how fast."""
    size = f"{result['width']}x{result['height']} at {float(Fraction(result['fps'])):.4g} fps"
    speed = f"{result['frames_per_second']:.1f} frames/s on {result['device']} in {result['dtype']}"
    return f"{result['frames']} frames, {size}, through the {result['model']} model: {speed}"


def quality_table(result: dict[str, Any]) -> Table:
    """PSNR and SSIM by frame range, and of the whole."""
    table = Table()
    for column in ("frames", "PSNR (dB)", "SSIM"):
        table.add_column(column, justify="right")
    for row in result["ranges"]:
        first, last = row["start"], row["stop"] - 1
        table.add_row(f"{first}-{last}" if first < last else f"{first}", *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(result))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, str]:
    decibels = "identical" if row["psnr"] is None else f"{row['psnr']:.2f}"
    return decibels, "-" if row["ssim"] is None else f"{row['ssim']:.4f}"
