"""Captions from a vision-language model behind an OpenAI-compatible endpoint: the other choice for recaptioning.

A few frames of the clip go out as PNG, one caption comes back. It knows nothing of data sets or the ledger.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from model.encode import encode_png

FRAMES = 4  # of a clip, from its first to its last
AT_ONCE = 8  # questions under way
PAUSES = (1.0, 4.0, 15.0)  # seconds, before a busy server is asked again
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


class VisionFailed(RuntimeError):
    """The vision-language model did not answer, or not with a caption. The message is its own; run again to go on."""


class VisionModel:
    """One model on one server. Temperature 0 and a fixed seed: as repeatable as the server makes it."""

    def __init__(self, url: str, model: str, key: str | None = None, *, timeout: float = 120) -> None:
        """`url` ends where `/chat/completions` is added: http://localhost:8000/v1."""
        self.model = model
        self._http = httpx.Client(
            base_url=url,
            timeout=timeout,
            headers={"authorization": f"Bearer {key}"} if key else {},
            trust_env="://127." not in url,
        )

    def captions(self, clips: NDArray[np.uint8]) -> list[str]:
        """One caption for each of the clips [B, T, H, W, 3]. Raises VisionFailed."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="vision") as pool:
            return list(pool.map(self.caption, clips))

    def caption(self, clip: NDArray[np.uint8]) -> str:
        picks = np.linspace(0, len(clip) - 1, min(FRAMES, len(clip))).round().astype(int)
        question = QUESTION.format(count=len(picks)) if len(clip) > 1 else OF_AN_IMAGE
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": _content(question, [clip[k] for k in picks])}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": TOKENS,
        }
        answer = self._ask(body)
        try:
            said = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            said = None
        if not isinstance(said, str) or not said.strip():
            raise VisionFailed(f"{self.model} answered without a caption: {answer.text[:300]}")
        return " ".join(said.split())

    def _ask(self, body: dict[str, Any]) -> httpx.Response:
        for pause in (*PAUSES, None):
            try:
                answer = self._http.post("/chat/completions", json=body)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                answer = None
            else:
                if answer.is_success:
                    return answer
                reason = f"{answer.status_code}: {answer.text[:300]}"
            busy = answer is None or answer.status_code == 429 or answer.status_code >= 500
            if not busy or pause is None:
                raise VisionFailed(f"{self.model} at {self._http.base_url} says {reason}")
            time.sleep(pause)
        raise AssertionError("the last pause is None")

    def close(self) -> None:
        self._http.close()


def _content(question: str, frames: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
    pictures = (base64.b64encode(encode_png(frame, {})).decode() for frame in frames)
    return [
        {"type": "text", "text": question},
        *({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in pictures),
    ]
