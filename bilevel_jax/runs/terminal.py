"""Terminal output in which control characters of foreign text are made visible."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

INVISIBLE_CONTROLS = (*range(0x80, 0xA0), 0x2028, 0x2029, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""C1 controls, other line ends, and characters that turn the direction of what follows: text needs none of them."""
VISIBLE_CONTROLS: dict[int, str] = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {127: "\u2421"}
    | {code: f"⟨U+{code:X}⟩" for code in INVISIBLE_CONTROLS}
)


def show_control_characters(text: str) -> str:
    """The text with control characters made visible, and half surrogate pairs replaced: UTF-8 cannot hold them."""
    return text.translate(VISIBLE_CONTROLS).encode("utf-8", "replace").decode("utf-8")


@contextlib.contextmanager
def guard_streams() -> Iterator[None]:
    """Inside, whatever is written to stdout and stderr passes `show_control_characters`, also what libraries write.

    Consoles of `make_console` write to the streams behind it: their styles are control characters of our own.
    """
    streams, describe = (sys.stdout, sys.stderr), warnings.formatwarning
    guards = tuple(_GuardedStream(stream, name) for stream, name in zip(streams, ("stdout", "stderr"), strict=True))
    sys.stdout, sys.stderr = guards
    warnings.formatwarning = lambda message, *about: f"bilevel-jax: warning: {message}\n"
    try:
        yield
    finally:
        for guard in guards:
            guard.release()
        sys.stdout, sys.stderr = streams
        warnings.formatwarning = describe


@contextlib.contextmanager
def styled_output() -> Iterator[None]:
    """Inside, stdout is the stream behind the guard, for a library that prints styles of its own and our text."""
    guarded = sys.stdout
    sys.stdout = getattr(guarded, "rich_proxied_file", guarded)
    try:
        yield
    finally:
        sys.stdout = guarded


def make_console(**options: Any) -> Any:
    """A console of rich that obeys no markup and shows the control characters of what is printed.

    Args:
        options: of `rich.console.Console`.
    """
    from rich.console import Console  # here, so that help is quick

    class GuardedConsole(Console):
        """Every text passes here, of lines, tables and progress bars alike; styles and cursor moves come later."""

        def render(self, renderable: Any, options: Any = None) -> Iterator[Any]:
            for segment in super().render(renderable, options):
                shown = segment.text if segment.control else show_control_characters(segment.text)
                yield segment if shown == segment.text else segment._replace(text=shown)

    # plain text in a notebook, too, not an HTML box for each line
    return GuardedConsole(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)


def in_notebook() -> bool:
    """Whether the code runs in a kernel that a notebook shows, such as Jupyter's or Colab's."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


class _GuardedStream:
    """A text stream that shows control characters. `rich_proxied_file` is where rich looks for the one behind it."""

    def __init__(self, stream: Any, name: str):
        self.rich_proxied_file, self._name = stream, name

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(show_control_characters(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def release(self) -> None:
        """From now on write to the present stream of that name: a logger may have kept this one."""
        del self.rich_proxied_file

    def __getattr__(self, name: str) -> Any:
        present = self.__dict__.get("rich_proxied_file") or getattr(sys, f"__{self.__dict__['_name']}__")
        return present if name == "rich_proxied_file" else getattr(present, name)
