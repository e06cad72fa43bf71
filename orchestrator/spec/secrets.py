"""What must not be read by others: keys that look like secrets, credentials inside addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
# The last word of a key tells: `api_token` is a secret, `tokenizer` and `token_count` are not.
_KEY = re.compile(
    r"(^|[_.\-])(password|passwd|pwd|secret|token|(api|access|private|secret)_?key|credentials?)$",
    re.IGNORECASE,
)
# A password may hold an @, and even a slash.
_PASSWORD = r"[^/\s:@]*:(?!\d+(?:/|$))\S*"
_CREDENTIALS = re.compile(rf"(?P<scheme>\w+://)(?:[^/\s]+|{_PASSWORD})@")
# What stands for a reference to something that is set elsewhere, and such references.
_REFERENCE = "\0"
_INTERPOLATION = re.compile(r"\$\{[^${}]*\}")
_LITERAL_CREDENTIALS = re.compile(rf"\w+://{_PASSWORD}@")


def is_secret_key(key: str) -> bool:
    """Tell whether a key looks as if its value were a secret."""
    return bool(_KEY.search(key))


def is_literal_secret(key: str, value: object) -> bool:
    """Tell whether a secret is written out instead of taken from the environment."""
    if value is None or isinstance(value, bool):
        return False
    text = _without_references(str(value))
    if any(is_secret_key(part) for part in key.split(".")):
        return value != "" and _REFERENCE not in text
    found = _LITERAL_CREDENTIALS.search(text)
    if found is None:
        return False
    # Of `//USER:${oc.env:PASSWORD}@` nothing but the user is written out.
    return found[0].partition("://")[2].partition(":")[2] != f"{_REFERENCE}@"


def _without_references(text: str) -> str:
    """Return a text with a sign in the place of each `${...}`."""
    while (shorter := _INTERPOLATION.sub(_REFERENCE, text)) != text:
        text = shorter
    return text


def mask_text(text: str) -> str:
    """Mask credentials inside the addresses of a text."""
    return _CREDENTIALS.sub(rf"\g<scheme>{MASK}@", text)


def without_credentials(uri: str) -> str:
    """Return an address without the credentials in it."""
    return mask_text(uri).replace(f"{MASK}@", "")


def masked(value: Any, key: str = "") -> Any:
    """Return nested values with everything secret replaced by `***`."""
    if isinstance(value, Mapping):
        # What lies below a secret key is secret too.
        return {
            name: masked(item, key if is_secret_key(key) else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(item, key) for item in value]
    if is_secret_key(key) and value not in (None, "") and not isinstance(value, bool):
        return MASK
    return mask_text(value) if isinstance(value, str) else value


def mask_overrides(overrides: list[str]) -> list[str]:
    """Return overrides as typed, secrets masked; `${oc.env:NAME}` names a secret and tells none."""
    return [_mask_override(override) for override in overrides]


def _mask_override(override: str) -> str:
    key, equals, value = override.partition("=")
    if "${" in value and not is_literal_secret(key, value):
        return override
    if equals and any(is_secret_key(part) for part in key.split(".")):
        return f"{key}={MASK}"
    return mask_text(override)
