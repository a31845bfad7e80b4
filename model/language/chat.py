"""A model behind an OpenAI-compatible chat endpoint: messages go out, a text comes back.

It knows neither prompts nor captions; who asks also judges the answer. Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

TRIES = 6
WAIT = 0.5  # seconds before the second try, at most; twice as long before each further one


class ChatFailed(RuntimeError):
    """The endpoint gave no answer that can be used. The message names the endpoint, and says why and what to do."""


class Chat:
    """One model on one endpoint. Temperature 0 and a fixed seed: as repeatable as the server makes it."""

    def __init__(self, url: str, model: str, key: str | None = None, *, timeout: float) -> None:
        """`url` is what `/chat/completions` is added to: http://localhost:8000/v1; `timeout` is in seconds."""
        self._model = model
        self.name = f"{model} at {url}"
        host = httpx.URL(url).host
        self._http = httpx.Client(
            base_url=url,
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # No proxy: a proxy meant for the internet would swallow calls to loopback.
            trust_env=not (host == "localhost" or host.startswith("127.")),
        )

    def ask(self, messages: Sequence[dict[str, Any]], *, tokens: int) -> str:
        """The model's answer, of at most `tokens`; asks again while that may help. Raises ChatFailed."""
        question = {"model": self._model, "messages": messages, "temperature": 0, "seed": 0, "max_tokens": tokens}
        retrying = Retrying(
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=WAIT, max=15),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            answer = retrying(self._post, question)
        except httpx.HTTPStatusError as error:
            raise self.failure(f"answered {error.response.status_code} {error.response.text[:300]!r}") from None
        except httpx.HTTPError as error:
            raise self.failure(f"did not answer ({type(error).__name__} {error})") from None
        try:
            said = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            said = None
        if not isinstance(said, str):
            raise self.failure(f"gave no completion but {answer.text[:300]!r}")
        return said

    def failure(self, what: str) -> ChatFailed:
        """To be raised where an answer is not what was asked for; `what` follows the endpoint's name."""
        return ChatFailed(f"{self.name} {what}: mend the endpoint and try again")

    def close(self) -> None:
        self._http.close()

    def _post(self, question: dict[str, Any]) -> httpx.Response:
        return self._http.post("/chat/completions", json=question).raise_for_status()


def _may_pass(error: BaseException) -> bool:
    """Is it worth asking again?"""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
