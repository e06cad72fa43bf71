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
_CREDENTIALS = re.compile(r"(?P<scheme>\w+://)[^/@\s]+@")


def is_secret_key(key: str) -> bool:
    """Tell whether a key looks as if its value were a secret."""
    return bool(_KEY.search(key))


def mask_text(text: str) -> str:
    """Mask credentials inside the addresses of a text."""
    return _CREDENTIALS.sub(rf"\g<scheme>{MASK}@", text)


def masked(value: Any, key: str = "") -> Any:
    """Return nested values with everything secret replaced by `***`."""
    if isinstance(value, Mapping):
        return {name: masked(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, key) for item in value]
    if is_secret_key(key) and isinstance(value, str) and value:
        return MASK
    return mask_text(value) if isinstance(value, str) else value


def mask_overrides(overrides: list[str]) -> list[str]:
    """Return overrides as typed, with the values of secret keys masked."""
    shown = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        shown.append(f"{key}={MASK}" if equals and is_secret_key(key) else mask_text(override))
    return shown
