"""The API key of a service, and its removal from texts."""

import base64
import binascii
import html
import os
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field

SHOWN_INSTEAD = "(the key)"
SECRET_RUN = 8
"""Letters and digits of a key in a row that no error shows; a shorter key is replaced where it stands as it is."""
SECRET_KEY = 16
"""Letters and digits of a key, at least, that no answer may hold; a shorter one may be a placeholder or a word."""


@dataclass(frozen=True)
class ApiKey:
    """A key, "" for none; neither its repr nor an error shows it."""

    value: str = field(default="", repr=False)
    variable: str = ""
    """The environment variable that holds it."""

    def hide(self, text: str) -> str:
        """The text with the key replaced, also as base64, in URLs and in hexadecimal; all of it where parts remain."""
        for form in sorted(self._forms(), key=len, reverse=True):
            text = text.replace(form, SHOWN_INSTEAD)
        key = _letters(self.value)
        runs = {key[at : at + SECRET_RUN] for at in range(len(key) - SECRET_RUN + 1)}
        if runs and any(run in reading for reading in _readings(text) for run in runs):
            return f"{SHOWN_INSTEAD}, or a part of it, stands in the text, which is left out"
        return text

    def is_in(self, text: str) -> bool:
        """Whether a text holds the whole key, in any form that `hide` knows.

        False for a key that may be an ordinary word, as `not-needed`: of fewer than SECRET_KEY letters and digits, or
        without either of them.
        """
        key = _letters(self.value)
        if len(key) < SECRET_KEY or key.isalpha() or key.isdigit():
            return False
        return any(key in reading for reading in _readings(text))

    def _forms(self) -> set[str]:
        if not self.value:
            return set()
        raw = self.value.encode()
        forms = {self.value, urllib.parse.quote(self.value, safe=""), html.escape(self.value), raw.hex()}
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            for text in (raw, b"Bearer " + raw):
                forms |= {encode(text).decode(), encode(text).decode().rstrip("=")}
        return forms


def read_api_key(variable: str, config_key: str = "generate.api_key_env") -> ApiKey:
    """The key that an environment variable holds, without white space around it.

    Args:
        variable: its name.
        config_key: the key of the config that names it, for the error.

    Raises:
        ValueError: it holds a character that no HTTP header can carry; the text does not show it.
    """
    value = os.environ.get(variable, "").strip()
    for at, character in enumerate(value, 1):
        if not "!" <= character <= "~":
            raise ValueError(
                f"the environment variable {variable} ({config_key}) holds no key: its character {at} of "
                f"{len(value)} is U+{ord(character):04X}, and a key is of ASCII letters, digits and signs. Set it to "
                "the key alone."
            )
    return ApiKey(value, variable)


def _letters(text: str) -> str:
    """Letters and digits in lower case: white space or hyphens between them hide nothing."""
    return "".join(filter(str.isalnum, text.casefold()))


def _readings(text: str) -> Iterator[str]:
    """The text as a reader may decode it, by letters and digits alone."""
    plain = [text, urllib.parse.unquote_plus(urllib.parse.unquote(text)), html.unescape(text)]
    plain.append(re.sub(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})", lambda m: chr(int(m[1] or m[2], 16)), text))
    for reading in dict.fromkeys(plain):
        letters = _letters(reading)
        yield letters
        yield letters[::-1]
        for coded in re.findall(r"[A-Za-z0-9+/_-]{8,}", "".join(reading.split())):
            standard = coded.replace("-", "+").replace("_", "/")
            for start in range(4):  # a key inside of what was encoded begins at any of the four
                body = standard[start:]
                body = body[:-1] if len(body) % 4 == 1 else body
                yield _letters(base64.b64decode(body + "=" * (-len(body) % 4)).decode("latin-1"))
        for coded in re.findall(r"(?:[0-9a-fA-F]{2}[\s:,]?){8,}", reading):
            digits = re.sub(r"[\s:,]", "", coded)
            for start in range(2):
                body = digits[start:]
                yield _letters(binascii.unhexlify(body[: len(body) // 2 * 2]).decode("latin-1"))
