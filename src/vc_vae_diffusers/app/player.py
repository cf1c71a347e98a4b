"""Source and reconstruction in one picture with a line to drag between them.

Both come from one file whose frames hold them beside or above each other, so that no two clocks can part them: what is left
of the line and what is right of it is always the same frame.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from string import Template

from .work import Outcome, stacked_across


def player(outcome: Outcome, url: str) -> str:
    """HTML of the player, in a frame of its own.

    Args:
        outcome: what is shown.
        url: where the browser gets `outcome.comparison`.
    """
    settings = {
        "url": url,
        "image": outcome.frames == 1,
        "panels": outcome.panels,
        "width": outcome.width,
        "height": outcome.height,
        "across": stacked_across(outcome.width, outcome.height),
        "fps": outcome.fps,
        "times": [round(time, 4) for time in outcome.times],
        "psnr": [round(value, 2) if value < 1000 else None for value in outcome.scores.psnr],
    }
    # In a script element, "</script" would end it: JSON may write "<" as an escape.
    page = Template(files(__package__).joinpath("player.html").read_text(encoding="utf-8"))
    filled = page.substitute(settings=json.dumps(settings).replace("<", "\\u003c"))
    return (
        f'<iframe class="vcvae-player" title="source and reconstruction" srcdoc="{html.escape(filled)}" '
        'style="width:100%;border:0;height:420px" allow="fullscreen"></iframe>'
    )
