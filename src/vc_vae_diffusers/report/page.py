"""One self-contained HTML page: no script, no font and no picture comes from anywhere else."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tables import Table

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b7280; --line: #d8dbe0; --paper: #fff; --tint: #f3f5f8;
  --accent: #1f6feb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa3af; --line: #3a3f47; --paper: #16181c;
  --tint: #1f2329; --accent: #6ea8fe; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem;
  padding-bottom: .3rem; border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.lead, .note { color: var(--soft); margin: .2rem 0; } .note { font-size: .85rem; }
nav a { color: var(--accent); margin-right: 1rem; }
figure { margin: 1rem 0 1.5rem; } figcaption { font-weight: 600; margin-bottom: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { background: var(--tint); } th:first-child, td.text { text-align: left; } tbody th { font-weight: 500; }
td.best { font-weight: 700; } tr.reported { color: var(--soft); font-style: italic; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 4px; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; background: var(--tint); padding: .75rem; border-radius: 4px; font-size: .8rem; }
.warning { border-left: 3px solid #d97706; padding-left: .6rem; margin: .3rem 0; font-size: .9rem; }
"""


@dataclass
class Picture:
    """A PNG file with its caption."""

    path: Path
    caption: str


@dataclass
class Section:
    """What the page shows of one result.

    Args:
        title: head of the section.
        summary: what was measured, in a line below.
        tables: first.
        curves: then.
        strips: by sample.
        warnings: above all of them.
        details: (title, text) shown when opened.
    """

    title: str
    summary: str
    tables: list[Table]
    curves: list[Picture] = field(default_factory=list)
    strips: dict[str, list[Picture]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)


def render_page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The page as HTML text.

    Args:
        title: of the page.
        lead: lines below it: when, by which command.
        sections: one for every result.
    """
    links = "".join(f'<a href="#s{n}">{html.escape(section.title)}</a>' for n, section in enumerate(sections))
    body = "".join(_section(section, f"s{n}") for n, section in enumerate(sections))
    leads = "".join(f"<p class=lead>{html.escape(line)}</p>" for line in lead)
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n{leads}\n<nav>{links}</nav>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section, anchor: str) -> str:
    parts = [f'<section id="{anchor}"><h2>{html.escape(section.title)}</h2><p class=lead>{html.escape(section.summary)}</p>']
    parts += [f"<p class=warning>{html.escape(text)}</p>" for text in section.warnings]
    parts += [table.to_html() for table in section.tables]
    if section.curves:
        parts.append("<h3>By frame</h3>")
        parts += [_picture(picture) for picture in section.curves]
    for sample, pictures in section.strips.items():
        parts.append(f"<h3>{html.escape(sample)}</h3>")
        parts += [_picture(picture) for picture in pictures]
    for summary, text in section.details:
        parts.append(f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>")
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = html.escape(picture.caption)
    image = f'<img alt="{html.escape(picture.caption, quote=True)}" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"


def describe_models(entries: Sequence[Mapping[str, Any]]) -> str:
    """The settings of every model, as text."""
    keys = (
        *("source", "class", "parameters", "dtype", "device", "weights_sha256", "compression", "latent_channels"),
        *("frame_rule", "separate_first_frame", "streamed", "date", "measured"),
    )
    lines = []
    for entry in entries:
        lines.append(entry["label"])
        lines += [f"    {key}: {entry[key]}" for key in keys if entry.get(key) is not None]
        if entry.get("timing") is not None:
            timing = entry["timing"]
            halves = ", ".join(f"{half} {timing[f'{half}_ms_per_frame']:.1f} ms a frame" for half in ("encode", "decode"))
            lines.append(f"    time: {halves} over {timing['frames']} frames")
        lines += [f"    {name}: {backend}" for name, backend in entry["metric_backends"].items()]
    return "\n".join(lines)
