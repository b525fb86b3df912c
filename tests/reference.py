"""The reference, built by pdoc, and a check of its links.

python -m tests.reference [FOLDER]      # build/reference by default; needs the extra `dev`
"""

import importlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import bilevel_jax

EXPORTED = ("certify", "checkpointing", "curvature", "single_loop", "solvers", "weightings")
MODULES = (
    "bilevel_jax",
    *(f"bilevel_jax.core.{name}" for name in (*EXPORTED, "types")),
    "bilevel_jax.runs.config.schema",
)
"""Modules with a page; pdoc adds those that a module's `__all__` names."""


def build_reference(folder: Path) -> None:
    """Write one page for each module."""
    import pdoc  # of the extra `dev`, which the tests do without

    for lazy in (bilevel_jax.lm, bilevel_jax.scores, bilevel_jax.commands):
        module = importlib.import_module(lazy.__name__)
        for name in module.__all__:
            module.__dict__[name] = getattr(module, name)  # pdoc reads the names that a module holds
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*MODULES, output_directory=folder)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key == "href" and value:
                self.links.append(value)
            elif key == "id" and value:
                self.anchors.add(value)


def broken_links(folder: Path) -> list[str]:
    """Links within the pages that lead to no page or to no anchor of it."""
    pages = {}
    for path in folder.rglob("*.html"):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if target not in pages or (anchor and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(folder.resolve())}: {link}")
    return broken


def missing_names(folder: Path) -> list[str]:
    """Public names that no page documents."""
    pages = {module: folder / f"{module.replace('.', '/')}.html" for module in ("bilevel_jax", "bilevel_jax.lm")}
    pages["bilevel_jax.commands"] = folder / "bilevel_jax" / "commands.html"
    missing = [f"bilevel_jax.{name}" for name in EXPORTED if not (folder / f"bilevel_jax/core/{name}.html").is_file()]
    for module, page in pages.items():
        text = page.read_text(encoding="utf-8")
        names = importlib.import_module(module).__all__
        names = [name for name in names if name not in EXPORTED]
        missing += [f"{module}.{name}" for name in names if f'id="{name}"' not in text and f"/{name}.html" not in text]
    return missing


def main() -> int:
    """0 where every public name has its place and every link its target."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/reference")
    build_reference(folder)
    faults = [f"broken link: {link}" for link in broken_links(folder)]
    faults += [f"not in the reference: {name}" for name in missing_names(folder)]
    print("\n".join([*faults, f"{folder}/bilevel_jax.html: {len(faults)} faults"]))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
