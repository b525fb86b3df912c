"""matplotlib figures as inline SVG in the page's colours."""

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from bilevel_jax.runs.terminal import show_control_characters

if TYPE_CHECKING:  # imported where a figure is drawn: a training that writes no report does without it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAME = 25
"""Characters of a name in a figure; the whole name appears under a pointer."""
VARIABLES = ("ink", "muted", "rule", "panel", "good", "c0", "c1", "c2", "c3", "c4", "c5")
"""The page's colours; in light, dark and print each has another value."""
COLOURS = {name: f"#0000{at:02x}" for at, name in enumerate(VARIABLES, 1)}
"""What matplotlib draws with; every one becomes a variable of the page."""
SENTINEL = re.compile("#0000([0-9a-f]{2})")
DECIMALS = re.compile(r"-?\d+\.\d{3,}")
TITLE = "title: "
"""An artist's id that begins so becomes its <title>: the words that appear under a pointer."""


@contextlib.contextmanager
def matplotlib_style() -> Iterator[None]:
    """matplotlib with the page's colours, text as text ($ begins no mathematics), and the same bytes again."""
    import matplotlib

    muted, rule = COLOURS["muted"], COLOURS["rule"]
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "bilevel_jax", "text.parse_math": False, "text.usetex": False,
        "font.family": ["DejaVu Sans"], "font.size": 11, "text.color": muted, "axes.labelcolor": muted,
        "xtick.color": muted, "ytick.color": muted, "xtick.major.size": 0, "ytick.major.size": 0,
        "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.edgecolor": muted,
        "axes.linewidth": 1, "ytick.major.pad": 7,
        "axes.spines.top": False, "axes.spines.left": False, "axes.spines.right": False, "axes.labelsize": 11,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": rule, "grid.linewidth": 1, "lines.linewidth": 1.8,
        "lines.solid_capstyle": "butt", "legend.frameon": False, "legend.fontsize": 11, "legend.borderpad": 0.4,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a browser has other fonts
        yield


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure, its size in points."""
    from matplotlib.figure import Figure

    figure = Figure((width / 72, height / 72), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def to_markup(figure: "Figure", words: str) -> Markup:
    """The figure as an <svg> element; `words` is what it says to those who cannot see it."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    root = ElementTree.fromstring(file.getvalue())
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": clean_text(words)}
    prefix, ids = hashlib.sha256(file.getvalue().encode()).hexdigest()[:8], dict[str, str]()
    for element in list(root.iter()):
        if (old_id := element.attrib.pop("id", "")).startswith(TITLE):
            title = ElementTree.Element("title")
            title.text = old_id.removeprefix(TITLE)
            element.insert(0, title)
        elif old_id and not element.tag.endswith("}g"):
            ids[old_id] = f"f{prefix}-{len(ids)}"
            element.set("id", ids[old_id])
        _rewrite_for_page(element, ids)
    for group in root.iter("g"):  # marks of one look share their style
        styles = {mark.get("style", "") for mark in group}
        if len(group) > 1 and len(styles) == 1 and all(mark.tag == "use" for mark in group):
            group.set("style", styles.pop())
            for mark in group:
                del mark.attrib["style"]
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _rewrite_for_page(element: ElementTree.Element, ids: Mapping[str, str]) -> None:
    """Plain names of tags and attributes, the page's colours and font, no more digits than are seen."""
    element.tag = element.tag.rpartition("}")[2]
    element.text = element.text and element.text.strip()
    for child in list(element):
        child.tail = None
        if child.tag.endswith(("}style", "}clipPath")):  # the page has a style; values beyond an axis lie at its edge
            element.remove(child)
    old, element.attrib = element.attrib, {}
    for key, value in old.items():
        if key == "style":
            value = SENTINEL.sub(lambda match: f"var(--{VARIABLES[int(match[1], 16) - 1]})", value)
            element.set(key, value.replace("'DejaVu Sans'", "var(--font)"))
        elif key.endswith("}href"):
            element.set("href", f"#{ids[value[1:]]}")
        elif key in ("d", "x", "y", "transform"):
            value = " ".join(DECIMALS.sub(lambda match: f"{float(match[0]):.2f}", value).split())
            if not value.startswith("rotate(-0 "):
                element.set(key, value)
        elif key != "clip-path":
            element.set(key, value)


def truncate_name(text: str) -> str:
    """The beginning of a name that is too long for a figure."""
    text = clean_text(text)
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"


def clean_text(text: str, *, keep_lines: bool = False) -> str:
    """Text that XML can hold, in one line."""
    lines = [" ".join(line.split()) for line in show_control_characters(text).split("\n" if keep_lines else "\0")]
    return "\n".join(lines).translate({0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD})
