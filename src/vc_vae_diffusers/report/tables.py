"""Tables of measured and reported numbers, as Markdown, LaTeX, CSV and HTML."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .paper import TABLES, ReportedTable

HIGHER, LOWER = "higher", "lower"
REPORTED_MARK = "†"
REPORTED_NOTE = f"{REPORTED_MARK} as the paper reports it; not measured here."


@dataclass(frozen=True)
class Column:
    """A column of values.

    Args:
        key: of the values in a row.
        label: head of the column.
        better: `"higher"`, `"lower"` or None.
        digits: after the decimal point.
    """

    key: str
    label: str
    better: str | None
    digits: int


@dataclass(frozen=True)
class Row:
    """A model's values.

    Args:
        label: of the model.
        values: by column.
        reported: the paper's, not measured here.
        reference: the source itself, which does not compete for the best value.
        compression, channels: of the latents.
    """

    label: str
    values: Mapping[str, float]
    reported: bool = False
    reference: bool = False
    compression: str = ""
    channels: int | None = None


@dataclass
class Table:
    """A table that can be written in several forms; the best measured value of a column is set in bold."""

    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        measured = [row for row in self.rows if not row.reported and not row.reference]
        self._best: dict[str, float] = {}
        for column in self.columns:
            values = [row.values[column.key] for row in measured if math.isfinite(row.values.get(column.key, math.nan))]
            if column.better is not None and len(values) > 1:
                self._best[column.key] = max(values) if column.better == HIGHER else min(values)
        self.described = any(row.compression for row in self.rows)
        if any(row.reported for row in self.rows):
            self.notes = [REPORTED_NOTE, *self.notes]

    def _is_best(self, row: Row, column: Column) -> bool:
        # As printed: two values that read the same are both the best.
        best = self._best.get(column.key)
        return (
            best is not None
            and not (row.reported or row.reference)
            and self._number(row, column) == f"{best:.{column.digits}f}"
        )

    def _number(self, row: Row, column: Column) -> str:
        value = row.values.get(column.key)
        if value is None or math.isnan(value):
            return ""
        return "inf" if math.isinf(value) else f"{value:.{column.digits}f}"

    def _heads(self, arrows: tuple[str, str]) -> list[str]:
        arrow = {HIGHER: arrows[0], LOWER: arrows[1], None: ""}
        described = ["FCR", "Chn"] if self.described else []
        return ["model", *described, *(f"{column.label}{arrow[column.better]}" for column in self.columns)]

    def _descriptions(self, row: Row) -> list[str]:
        if not self.described:
            return []
        return [row.compression, "" if row.channels is None else str(row.channels)]

    def to_markdown(self) -> str:
        """GitHub's Markdown, with title and notes."""
        heads = self._heads((" ↑", " ↓"))
        text_columns = 3 if self.described else 1
        lines = [f"**{self.title}**", "", "| " + " | ".join(heads) + " |"]
        lines.append("|" + "---|" * text_columns + "---:|" * (len(heads) - text_columns))
        for row in self.rows:
            label = _markdown(row.label) + (f" {REPORTED_MARK}" if row.reported else "")
            cells = []
            for column in self.columns:
                number = self._number(row, column) or "—"
                cells.append(f"**{number}**" if self._is_best(row, column) else number)
            lines.append("| " + " | ".join([label, *self._descriptions(row), *cells]) + " |")
        lines += ["", *(f"{_markdown(note)}  " for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def to_latex(self) -> str:
        """A `table` environment for booktabs."""
        heads = [_latex(head) for head in self._heads(("", ""))]
        arrows = {HIGHER: r"$\uparrow$", LOWER: r"$\downarrow$", None: ""}
        offset = len(heads) - len(self.columns)
        heads = heads[:offset] + [
            f"{head}{arrows[column.better]}" for head, column in zip(heads[offset:], self.columns, strict=True)
        ]
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{{'l' * offset}{'r' * len(self.columns)}}}", r"\toprule"]
        lines += [" & ".join(heads) + r" \\", r"\midrule"]
        for row in self.rows:
            label = _latex(row.label) + (r"$^\dagger$" if row.reported else "")
            cells = []
            for column in self.columns:
                number = self._number(row, column) or "--"
                number = r"$\infty$" if number == "inf" else number
                cells.append(rf"\textbf{{{number}}}" if self._is_best(row, column) else number)
            lines.append(" & ".join([label, *(_latex(text) for text in self._descriptions(row)), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\\ {{\footnotesize {_latex(note)}}}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def to_csv(self) -> str:
        """One line a row, full precision, with a column that says whether it was measured or reported."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", "kind", "compression", "channels", *(column.key for column in self.columns)])
        for row in self.rows:
            kind = "reported" if row.reported else "measured"
            values = [row.values.get(column.key, "") for column in self.columns]
            writer.writerow([row.label, kind, row.compression, "" if row.channels is None else row.channels, *values])
        return stream.getvalue()

    def to_html(self) -> str:
        """A `<figure>` with the table."""
        heads = "".join(f"<th scope=col>{html.escape(head)}</th>" for head in self._heads((" ↑", " ↓")))
        body = []
        for row in self.rows:
            label = html.escape(row.label) + (f" {REPORTED_MARK}" if row.reported else "")
            cells = "".join(f"<td class=text>{html.escape(text)}</td>" for text in self._descriptions(row))
            for column in self.columns:
                number = self._number(row, column) or "—"
                best = " class=best" if self._is_best(row, column) else ""
                cells += f"<td{best}>{number}</td>"
            kind = " class=reported" if row.reported else ""
            body.append(f"<tr{kind}><th scope=row>{label}</th>{cells}</tr>")
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in self.notes)
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        caption = f"<figcaption>{html.escape(self.title)}</figcaption>"
        return f"<figure class=table>{caption}<div class=scroll>{table}</div>{notes}</figure>"


def _markdown(text: str) -> str:
    for character in "\\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return text


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", REPORTED_MARK: r"$^\dagger$", "Δ": r"$\Delta$"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


# From results ------------------------------------------------------------------------------------------------------------

_KNOWN = {
    "psnr": ("PSNR", HIGHER, 2),
    "ssim": ("SSIM", HIGHER, 4),
    "lpips_vgg": ("LPIPS (vgg)", LOWER, 5),
    "lpips_alex": ("LPIPS (alex)", LOWER, 5),
    "fvd": ("FVD (set)", LOWER, 2),
    "flicker": ("flicker", LOWER, 5),
    "temporal_difference_psnr": ("Δ-PSNR", HIGHER, 2),
}


def column_of(key: str) -> Column:
    """The column of a metric, of a part of it (`t_acc[parseq]/small`), or of a reported value."""
    if key in _KNOWN:
        return Column(key, *_KNOWN[key])
    name, _, part = key.partition("/")
    suffix = f" {'mean' if part == 'value' else part}" if part else ""
    if name.startswith("fvd"):
        return Column(key, name.replace("fvd_batch_mean", "FVD batch ").replace("fvd", "FVD"), LOWER, 2)
    if name.startswith("lpips"):
        return Column(key, name.replace("lpips", "LPIPS"), LOWER, 5)
    head, bracket, backend = name.partition("[")
    digits = 3 if head == "f_sim" else 2
    labels = {"t_acc": "T-ACC", "t_ned": "T-NED", "f_sim": "F-Sim"}
    return Column(key, f"{labels.get(head, head)}{suffix} {bracket}{backend}".rstrip(), HIGHER, digits)


def measured_row(entry: Mapping[str, Any], first_frame: bool = False) -> Row:
    """A row from a model's entry in a result; the parts of a TokBench metric become values of their own."""
    values: dict[str, float] = {}
    if first_frame:
        values = dict(entry["first_frame"])
    else:
        for name, metric in entry["metrics"].items():
            parts = [part for part in ("small", "medium", "large", "value") if part in metric]
            values.update({f"{name}/{part}": metric[part] for part in parts} if len(parts) > 1 else {name: metric["value"]})
    compression = "x".join(str(factor) for factor in entry["compression"]) if "compression" in entry else ""
    reference = entry.get("source") == "original"
    return Row(
        entry["label"],
        values,
        reference=reference,
        compression="" if reference else compression,
        channels=entry.get("latent_channels"),
    )


def _rank(key: str) -> int:
    """Place of a column: other kinds of LPIPS and FVD beside the known ones, unknown metrics at the end."""
    order = list(_KNOWN)
    for known, place in (("lpips", "lpips_alex"), ("fvd", "fvd")):
        if key.startswith(known) and key not in order:
            return order.index(place)
    return order.index(key) if key in order else len(order)


def make_table(
    title: str,
    entries: Sequence[Mapping[str, Any]],
    reported: ReportedTable | None = None,
    notes: Sequence[str] = (),
    first_frame: bool = False,
) -> Table:
    """Measured rows, and below them those that the paper reports.

    Args:
        title: of the table.
        entries: models of a result file.
        reported: the paper's table; its columns come after the measured ones where they are different.
        notes: below the table.
        first_frame: values of the first frame alone (Table 6).
    """
    rows = [measured_row(entry, first_frame) for entry in entries]
    if reported is not None:
        rows += [
            Row(row.label, row.values, reported=True, compression=row.compression, channels=row.channels)
            for row in reported.rows
        ]
        notes = [*notes, *reported.notes]
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    keys.sort(key=_rank)  # what has one rank keeps its order
    return Table(title, [column_of(key) for key in keys], rows, list(notes))


def tables_of(result: Mapping[str, Any], name: str, paper: Sequence[str] = ()) -> list[Table]:
    """The tables of a result: one for every table of the paper that its protocol answers, or one of the measured alone.

    Args:
        result: as `evaluation.results.read_result` returns it.
        name: of the result, for the title.
        paper: tables of the paper to compare with besides, by key of `paper.TABLES`.

    Raises:
        ValueError: for a key that does not exist.
    """
    for key in paper:
        if key not in TABLES:
            raise ValueError(f"paper has {key!r}, but the tables are {', '.join(TABLES)}; choose among them")
    protocol, models = result["protocol"], result["models"]
    counts = {entry["label"]: entry["measured"] for entry in models}
    notes = [f"{name}: {result['samples']['count']} samples, protocol {protocol['name']}."]
    if len(set(counts.values())) > 1:
        notes.append("Not all models were measured on the same samples: " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    tables = []
    for key in dict.fromkeys([*protocol["tables"], *paper]):
        extra = list(notes)
        if key in paper and key not in protocol["tables"]:
            extra.append("The paper's numbers are of other data or another protocol: they are no comparison.")
        elif protocol["name"].endswith("(changed)"):
            extra.append("The protocol was changed from the preset: the paper's numbers are no comparison.")
        reported = TABLES[key]
        what = f"{name}, the first frame" if reported.first_frame else name
        title = f"{what}, beside the paper's {reported.title}"
        tables.append(make_table(title, models, reported, extra, reported.first_frame))
    if not tables:
        tables.append(make_table(protocol["name"], models, None, notes))
    elif all(TABLES[key].first_frame for key in protocol["tables"]) and protocol["tables"]:
        tables.append(make_table(f"{protocol['name']}, all frames", models, None, notes))
    return tables
