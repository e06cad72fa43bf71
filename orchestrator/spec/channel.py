"""The bytes between agent, zygote and worker."""

from __future__ import annotations

import json
import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any

from orchestrator.spec.messages import Message, Request

REQUEST_BYTES = {Request.SAVE: b"s", Request.SAVE_AND_STOP: b"t"}
_LENGTHS = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
_MAX_FDS = 2


def pack_request(header: dict[str, Any], payload: bytes) -> tuple[bytes, bytes]:
    """Return the lengths, with which descriptors travel, and the body of a request."""
    encoded = json.dumps(header).encode()
    return _LENGTHS.pack(len(encoded), len(payload)), encoded + payload


def unpack_request(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and payload of a whole request."""
    header_bytes, payload_bytes = _LENGTHS.unpack(data[: _LENGTHS.size])
    body = data[_LENGTHS.size :]
    return json.loads(body[:header_bytes]), body[header_bytes : header_bytes + payload_bytes]


def receive_request(connection: socket.socket) -> tuple[dict[str, Any], bytes, list[int]]:
    """Read a request and the descriptors that came with it.

    Raises:
        ValueError: the peer hung up in the middle.
    """
    lengths, fds, _, _ = socket.recv_fds(connection, _LENGTHS.size, _MAX_FDS)
    if len(lengths) != _LENGTHS.size:
        raise ValueError("no request came")
    size = sum(_LENGTHS.unpack(lengths))
    body = b""
    while len(body) < size:
        part = connection.recv(size - len(body))
        if not part:
            raise ValueError("the request is cut short")
        body += part
    return *unpack_request(lengths + body), list(fds)


def frame(message: Message) -> bytes:
    """Return a message as it travels in a pipe: its length, then its pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Turns the bytes of a pipe back into messages, however they were cut."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete with these bytes."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack(self._buffer[: _LENGTH.size])
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            body, self._buffer = self._buffer[_LENGTH.size : end], self._buffer[end:]
            yield pickle.loads(body)
