"""Keys of config.json and adapter_config.json, read by kind."""

import difflib
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MAX_INTEGER = 2**31 - 1
"""Sizes and token ids are int32 in the arrays."""
MAX_LAYERS = 10_000
"""A checkpoint's names are made for each layer: a file must not ask for a billion of them."""
REQUIRED: Any = object()
"""The default of a key that must be there."""


class ConfigKeys:
    """The keys of a JSON object. Errors do not name the file: the reader of the file does.

    Each method reads one key and remembers it; `refuse_others` names what was not read. So the list of understood keys
    is the code that reads them, and cannot fall behind it.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = ""):
        self._raw = raw
        self._prefix = prefix
        """Stands before the name of a key in errors: the object that has it."""
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._raw

    def require(self, names: Sequence[str], of: str) -> None:
        """Raise ValueError that names the keys which are not there, and what stands there in their place."""
        if missing := [name for name in names if name not in self._raw]:
            hints = [
                f" ({name} may be meant by {close[0]!r})"
                for name in missing
                if (close := difflib.get_close_matches(name, [*self._raw], 1, 0.85))
            ]
            raise ValueError(f"no {', '.join(missing)}; {of} has them{''.join(hints)}.")

    def value(self, key: str, default: Any = None) -> Any:
        """Whatever stands there."""
        self._read.add(key)
        return self._raw.get(key, default)

    def integer(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        at_least: int = 1,
        at_most: int = MAX_INTEGER,
        optional: bool = False,
    ) -> Any:
        """A whole number; None where `optional` and the file says null."""
        value = self._value_or_default(key, default)
        if (value is None and (optional or key not in self._raw)) or (
            type(value) is int and at_least <= value <= at_most
        ):
            return value
        raise self._refusal(key, f"it is a whole number from {at_least} to {at_most}", optional)

    def number(
        self, key: str, default: Any = REQUIRED, *, above: float | None = None, at_least: float | None = None
    ) -> float:
        """A finite number above or from a bound."""
        value = self._value_or_default(key, default)
        fits = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
        if fits and (above is None or value > above) and (at_least is None or value >= at_least):
            return float(value)
        bound = "" if above is None else f" above {above:g}"
        bound = bound if at_least is None else f" of at least {at_least:g}"
        raise self._refusal(key, f"it is a finite number{bound}")

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value_or_default(key, default)
        if type(value) is bool:
            return value
        raise self._refusal(key, "it is true or false")

    def choice(self, key: str, default: str, known: Collection[str]) -> str:
        """One of the known names."""
        value = self._value_or_default(key, default)
        if isinstance(value, str) and value in known:
            return value
        raise ValueError(f"{self._prefix}{key} {reprlib.repr(value)} is not supported; supported: {sorted(known)}.")

    def strings(self, key: str) -> list[str] | None:
        """A list of strings; None where there is none."""
        value = self.value(key)
        if value is None or (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
            return None if value is None else list(value)
        raise self._refusal(key, "it is a list of strings", optional=True)

    def token(self, key: str, default: int | None = None) -> int | None:
        """A token id, -1 (none, as some models spell it) or null."""
        return self.integer(key, default, at_least=-1, optional=True)

    def tokens(self, key: str, default: int | None = None) -> int | tuple[int, ...] | None:
        """A token id, or several."""
        value = self.value(key, default)
        if not isinstance(value, list | tuple):
            return self.token(key, default)
        if not value or not all(type(token) is int and 0 <= token <= MAX_INTEGER for token in value):
            raise self._refusal(key, "it is a token id or a list of token ids", optional=True)
        return tuple(value)

    def mapping(self, key: str) -> dict[str, Any] | None:
        """A JSON object; None where there is none."""
        value = self.value(key)
        if value is None or isinstance(value, Mapping):
            return None if value is None else dict(value)
        raise self._refusal(key, "it is a JSON object", optional=True)

    def expect(self, key: str, *understood: Any, why: str = "") -> None:
        """Raise ValueError where a key has another value than the understood ones; an absent one has the first."""
        value = self.value(key, understood[0])
        if any(_is_same(value, wanted) for wanted in understood) or (value is None and not understood[0]):
            return
        wanted = " or ".join(repr(wanted) for wanted in understood)
        raise ValueError(f"{self._prefix}{key} {_shorten(value)} is not supported{why}; supported: {wanted}.")

    def refuse_others(
        self, neutral: Collection[str] = (), inert: Mapping[str, Sequence[Any]] | None = None, *, of: str
    ) -> None:
        """Raise ValueError that names each key which was not read.

        Args:
            neutral: keys that change nothing, whatever their value.
            inert: key -> values under which it changes nothing. null is one of them where such a value is false or
                null, and of keys that do not stand here.
            of: what has the keys, for the error.
        """
        inert = inert or {}
        unknown = {
            key: value
            for key, value in self._raw.items()
            if key not in self._read
            and key not in neutral
            and not any(_is_same(value, wanted) or (value is None and not wanted) for wanted in inert.get(key, [None]))
        }
        if not unknown:
            return
        shown = []
        for key, value in [*unknown.items()][:3]:
            close = difflib.get_close_matches(key, [*self._read, *neutral, *inert], 1, 0.85)
            hint = f" (supported: {' or '.join(map(repr, inert[key]))})" if key in inert else ""
            hint = hint or (f" (is {close[0]!r} meant?)" if close else "")
            shown.append(f"{self._prefix}{_shorten(key)[1:-1]} {_shorten(value)}{hint}")
        more = f" and {len(unknown) - 3} more keys" if len(unknown) > 3 else ""
        note = " and could change what is computed; delete what is only a note" if set(unknown) - set(inert) else ""
        raise ValueError(
            f"{', '.join(shown)}{more} {'is' if len(unknown) == 1 else 'are'} not supported in {of}{note}."
        )

    def _value_or_default(self, key: str, default: Any) -> Any:
        if default is REQUIRED:
            self.require([key], "this file")
        return self.value(key, default)

    def _refusal(self, key: str, wanted: str, optional: bool = False) -> ValueError:
        given = "null" if self._raw.get(key) is None else _shorten(self._raw[key])
        return ValueError(f"{self._prefix}{key} is {given}; {wanted}{' or null' if optional else ''}.")


def _is_same(value: Any, wanted: Any) -> bool:
    # true is not 1, but 1 is 1.0
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}...{text[-10:]}"
