"""Messages between an engine and its ranks: a pipe each, pixels through memory files."""

from __future__ import annotations

import json
import math
import os
import threading
from contextlib import ExitStack
from dataclasses import fields
from mmap import PROT_READ, mmap
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, TypeAlias

import numpy as np

from model.engine.clip import BROUGHT, ClipSpec

Message: TypeAlias = dict[str, Any]


class Wire:
    """JSON messages over a socket pair, some with an open file. Several threads may send."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.turn = connection, threading.Lock()

    def send(self, message: Message, file: int | None = None) -> None:
        """`file` is a descriptor that the other side gets one of its own for. Raises OSError when it is gone."""
        with self.turn:
            self.connection.send_bytes(json.dumps({**message, "file": file is not None}).encode())
            if file is not None:
                send_handle(self.connection, file, None)

    def receive(self) -> Message:
        """Waits for a message; "file" is a descriptor or None. Raises EOFError or OSError when the other is gone."""
        message = json.loads(self.connection.recv_bytes())
        message["file"] = recv_handle(self.connection) if message["file"] else None
        return message


def without_pixels(spec: ClipSpec) -> Message:
    """A clip as a rank is told of it; of what comes in a memory file the length: frames, or bytes."""
    apart = (*BROUGHT, "resume_state")
    lengths = {name: len(brought) for name in apart if (brought := getattr(spec, name)) is not None and len(brought)}
    return {each.name: getattr(spec, each.name) for each in fields(spec) if each.name not in apart} | lengths


def pixels_file(spec: ClipSpec) -> int | None:
    """A memory file with all that a clip brings, one after the other; None if it brings nothing."""
    parts = [np.ascontiguousarray(frames).reshape(-1).data for frames in (spec.start, spec.end) if frames is not None]
    parts += [memoryview(spec.resume_state)] if spec.resume_state else []
    if not parts:
        return None
    with ExitStack() as unless_whole:
        file = os.memfd_create("rushes-sources")
        unless_whole.callback(os.close, file)
        for view in parts:
            while view:
                view = view[os.write(file, view) :]
        unless_whole.pop_all()
    return file


def clip_in(message: Message) -> ClipSpec:
    """The clip of a job as a rank got it, its frames mapped from the memory file, which is closed."""
    clip = dict(message["clip"])
    if message["file"] is not None:
        with open(message["file"], "rb") as file:
            pixels = np.frombuffer(mmap(file.fileno(), 0, prot=PROT_READ), np.uint8)
        for name in BROUGHT:
            if name in clip:
                shape = clip[name], clip["height"], clip["width"], 3
                clip[name], pixels = pixels[: math.prod(shape)].reshape(shape), pixels[math.prod(shape) :]
        if "resume_state" in clip:
            clip["resume_state"] = pixels.tobytes()
    return ClipSpec(**clip)


def all_of(file: int) -> bytes:
    """What a memory file holds; it is closed."""
    with open(file, "rb") as stream:
        stream.seek(0)
        return stream.read()
