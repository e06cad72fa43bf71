"""Text as a long row of tokens, of which an example is a window. No TensorFlow."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import JobError
from orchestrator.train.sources import Feature, Source

_HASHED_AT_ONCE = 2**24  # tokens; bounds what hashing reads into memory


class TokenSource(Source):
    """Windows of a row of tokens: `x` [context], and `y` [context], the token after each.

    A file is mapped into memory, not read: a worker touches only the pages that its own windows
    lie in, so the data may be larger than memory.
    """

    def __init__(
        self,
        tokens: np.ndarray | str | Path,
        *,
        context: int,
        num_examples: int | None = None,
        dtype: str = "uint16",
        name: str = "tokens",
        origin: str | None = None,
    ):
        """Open the tokens and lay windows over them.

        Args:
            tokens: integers [n], or a file of them: `.npy`, else plain numbers of type `dtype` in
                this machine's byte order.
            context: tokens that the model sees at once.
            num_examples: how many windows. They start at equal distances from the first token to
                the last possible one, and overlap if there are more than fit side by side; so the
                number can be fixed in the configuration whatever the length of the text is. None
                for as many as fit side by side.
            dtype: of a file that is not `.npy`: uint8, uint16, int32 and so on.
            name: what people call the data.
            origin: where it comes from; the path if None.

        Raises:
            JobError: the file cannot be read, or does not hold integers, or not one window.
        """
        self.name = name
        self.origin = origin or ("made in memory" if isinstance(tokens, np.ndarray) else "")
        if not isinstance(tokens, np.ndarray):
            path = Path(tokens).expanduser().absolute()
            self.origin = self.origin or str(path)
            tokens = _mapped(path, dtype)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise JobError(
                f"source {name!r}: tokens are {tokens.dtype} {list(tokens.shape)}; "
                "give integers in one row"
            )
        self._tokens = tokens
        self._context = context
        self._last_start = len(tokens) - context - 1
        if self._last_start < 0:
            raise JobError(
                f"source {name!r} has {len(tokens)} tokens; one window takes {context} and the "
                "token that follows: give a longer text or a smaller context"
            )
        self.num_examples = num_examples or self._last_start // context + 1

    @property
    def features(self) -> dict[str, Feature]:
        """`x` and `y`, one token later."""
        kind = Feature(self._tokens.dtype.name, (self._context,))
        return {"x": kind, "y": kind}

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        """SHA-256 of the tokens and of how they are cut; read once, in pieces, when asked for."""
        digest = hashlib.sha256(
            f"{self._tokens.dtype.name} {len(self._tokens)} {self._context} "
            f"{self.num_examples}\n".encode()
        )
        for start in range(0, len(self._tokens), _HASHED_AT_ONCE):
            piece: Any = np.ascontiguousarray(self._tokens[start : start + _HASHED_AT_ONCE])
            digest.update(piece.data)
        return digest.hexdigest()

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Return where windows begin: `floor(i (n - context - 1) / (num_examples - 1))`."""
        gaps = max(1, self.num_examples - 1)
        whole, rest = divmod(self._last_start, gaps)
        # In two parts: the product of a window's number and a large file's length leaves int64.
        return indices * whole + indices * rest // gaps

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows at some indices."""
        reach = np.arange(self._context + 1, dtype=np.int64)
        windows = self._tokens[self.starts(indices)[:, None] + reach]
        return {"x": windows[:, :-1], "y": windows[:, 1:]}


def _mapped(path: Path, dtype: str) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return np.memmap(path, np.dtype(dtype), mode="r")
    except (OSError, ValueError) as error:
        raise JobError(f"tokens in {path} cannot be read: {error}") from error
