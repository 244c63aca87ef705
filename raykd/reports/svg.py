"""A drawing as inline SVG: the same drawing gives the same bytes, and two on one page do not clash.

Text stays text, ink is `currentColor` and no shape has a background, so a page in light or dark
styles them; drawings are narrow, so that letters are still read on a phone.
"""

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

INK = "#010203"  # replaced by currentColor
WIDTH_IN = 4.6
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # class names come from users
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8080804d",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def svg(name: str, title: str, height_in: float, draw: Callable[[Any], None]) -> str:
    """`draw(axes)` as one <svg> whose ids start with `name`; it holds no date, no metadata and no
    font.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # letters are the browser's to find
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, title)


def _inline(text: str, name: str, title: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(
        r"<style[^>]*>.*?</style>", "", text, flags=re.S
    )  # a rule for every element of the page
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    label = html.escape(title)
    head = re.search(r'viewBox="[^"]*"', text)
    assert head, "matplotlib writes a viewBox"
    start = (
        f'<svg class="chart" role="img" aria-label="{label}" {head[0]} '
        'style="width:100%;max-width:100%;height:auto;stroke-linejoin:round;stroke-linecap:butt" '
        'xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><title>{label}</title>'
    )
    return start + text[text.index(">") + 1 :].strip()
