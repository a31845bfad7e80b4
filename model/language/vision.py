"""Captions from a vision-language model behind an OpenAI-compatible endpoint: the other choice for recaptioning.

A few frames of the clip go out as PNG, one caption comes back. It knows nothing of data sets or the ledger.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.language.chat import Chat
from model.media.encode import encode_png

FRAMES = 4  # of a clip, from its first to its last
AT_ONCE = 8  # questions under way
TIMEOUT = 120.0  # seconds for one answer
TOKENS = 120  # of an answer
QUESTION = (
    "These are {count} frames of a video, evenly spaced, in order. Write one caption of it: a single English sentence "
    "that names every object with its colour and shape, what moves and in which direction, the camera's motion, the "
    "ground, the sky and the light. Only what can be seen. Answer with the caption alone."
)
OF_AN_IMAGE = (
    "Write one caption of this image: a single English sentence that names every object with its colour and shape, the "
    "ground, the sky and the light. Only what can be seen. Answer with the caption alone."
)


class VisionModel:
    """One model on one server."""

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        """`url` ends where `/chat/completions` is added: http://localhost:8000/v1."""
        self._chat = Chat(url, model, key, timeout=TIMEOUT)

    def captions(self, clips: NDArray[np.uint8]) -> list[str]:
        """One caption for each of the clips [B, T, H, W, 3]. Raises ChatFailed; run again to go on."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="vision") as pool:
            return list(pool.map(self.caption, clips))

    def caption(self, clip: NDArray[np.uint8]) -> str:
        """The caption of one clip [T, H, W, 3]. Raises ChatFailed."""
        picks = np.linspace(0, len(clip) - 1, min(FRAMES, len(clip))).round().astype(int)
        question = QUESTION.format(count=len(picks)) if len(clip) > 1 else OF_AN_IMAGE
        content = _content(question, [clip[k] for k in picks])
        said = " ".join(self._chat.ask([{"role": "user", "content": content}], tokens=TOKENS).split())
        if not said:
            raise self._chat.failure("answered without a caption")
        return said

    def close(self) -> None:
        self._chat.close()


def _content(question: str, frames: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
    pictures = (base64.b64encode(encode_png(frame, {})).decode() for frame in frames)
    return [
        {"type": "text", "text": question},
        *({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in pictures),
    ]
