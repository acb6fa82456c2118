"""Samples text from a server of the OpenAI API, as calibration text in the model's own words."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2

from hcsmoe_hub.errors import CalibrationError

KEY = "OPENAI_API_KEY"
# Tokens of one document, and documents of one request.
TOKENS = 512
DOCUMENTS = 8
_TIMEOUT_SECONDS = 600.0
_PAUSES_SECONDS = (1.0, 2.0, 4.0)
_TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
_HINT = "check that it serves /v1/models and /v1/completions, as vLLM, SGLang and llama.cpp do"


def sample_from_server(
    address: str, *, seed: int, begin: str, sleep: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """Documents at temperature 1 without end.

    Args:
        address: The address that ends in ``/v1``.
        seed: Seed of the first request; later ones count up.
        begin: The prompt: the text of the model's begin token, may be empty.
        sleep: Waits before a request is tried again.

    Yields:
        The text of each document, without the prompt.

    Raises:
        CalibrationError: If the server cannot be reached, refuses a request or answers in another form.
    """
    key = os.environ.get(KEY, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx2.Client(headers=headers, timeout=_TIMEOUT_SECONDS) as client:
        server = _Server(client, address.rstrip("/"), sleep)
        model = server.model()
        while True:
            yield from server.complete(model, begin, seed)
            seed += 1


class _Server:
    """One server, named in messages without what its address may hold of a user and a password."""

    def __init__(self, client: httpx2.Client, address: str, sleep: Callable[[float], None]) -> None:
        self._client = client
        self._address = address
        self._sleep = sleep
        parts = urlsplit(address)
        self._name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def model(self) -> str:
        """The name of the first model that the server lists."""
        listed = self._request("GET", "/models", None)
        models = listed.get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise CalibrationError(f"{self._name} lists no model.", hint=_HINT)
        return str(models[0]["id"])

    def complete(self, model: str, prompt: str, seed: int) -> list[str]:
        """The documents of one request; at least one has text."""
        asked = {
            "model": model,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 1.0,
            "top_p": 1.0,
            "n": DOCUMENTS,
            "seed": seed,
        }
        answer = self._request("POST", "/completions", asked)
        choices = answer.get("choices")
        texts = [choice.get("text") for choice in choices if isinstance(choice, dict)] if choices else []
        found = [text for text in texts if isinstance(text, str) and text.strip()]
        if not found:
            raise CalibrationError(f"{self._name} answers a request for text without any.", hint=_HINT)
        return found

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        for pause in (*_PAUSES_SECONDS, None):
            try:
                response = self._client.request(method, self._address + path, json=body)
            except _TRANSIENT_ERRORS as error:
                if pause is None:
                    raise self._unreachable(error) from error
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise self._unreachable(error) from error
            else:
                if pause is None or response.status_code not in _TRANSIENT_STATUSES:
                    return self._read(response, path)
            self._sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _unreachable(self, error: Exception) -> CalibrationError:
        reason = str(error) or type(error).__name__
        return CalibrationError(
            f"the server {self._name} cannot be reached: {reason}.", hint="start it, or correct the address"
        )

    def _read(self, response: httpx2.Response, path: str) -> dict[str, Any]:
        status = response.status_code
        if status in (401, 403):
            raise CalibrationError(
                f"the server {self._name} refuses the request: {status}.", hint=f"set {KEY} to a key that it accepts"
            )
        if response.is_error:
            detail = " ".join(response.text.split())[:200]
            raise CalibrationError(f"the server {self._name} answers {path} with {status}: {detail}.", hint=_HINT)
        try:
            content = response.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise CalibrationError(f"the server {self._name} answers {path} with something else than JSON.", hint=_HINT)
        return content
