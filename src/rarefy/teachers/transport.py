"""Patient HTTP: POST some JSON, get JSON back, whatever the server does in between.

Tried again: 408, 409, 425, 429 and 5xx, timeouts, broken connections, bodies that end early or are
no JSON. Waiting doubles from one try to the next, with jitter so that clients do not return in
step, and never undercuts the server's Retry-After. Not tried again: answers that say that the
request itself is wrong.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from rarefy.errors import RarefyError

_AGAIN = {408, 409, 425, 429}
_QUOTED = 300
_STRUCK = "***"


@dataclass(frozen=True)
class Patience:
    """How a server is treated.

    Attributes:
        timeout: seconds for one try, from connecting to the last byte.
        tries: of one request, at least 1.
        backoff: seconds before the second try; doubles with every further one.
        longest: seconds waited between two tries at most. A server that asks for more ends the
            run with a sentence, and nothing is lost.
        per_minute: requests started in a minute at most; None for no limit.
        concurrent: requests under way at once.
    """

    timeout: float = 120.0
    tries: int = 7
    backoff: float = 1.0
    longest: float = 300.0
    per_minute: float | None = None
    concurrent: int = 4

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.tries < 1 or self.backoff < 0 or self.concurrent < 1:
            raise RarefyError(
                "an endpoint needs timeout > 0, tries >= 1, backoff >= 0 and concurrent >= 1"
            )
        if self.per_minute is not None and self.per_minute <= 0:
            raise RarefyError(f"per_minute must be positive, not {self.per_minute}")


class _AgainError(Exception):
    """One try failed in a way that may pass; the server may have said when to return."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class Transport:
    """One server; safe to use from many threads.

    Args:
        patience: limits and waiting.
        key_variable: environment variable with the API key, or None. The key is read when a
            request is sent, is kept nowhere, and is struck out of what a server says.

    Raises:
        RarefyError: the variable is named but not set.
    """

    def __init__(self, patience: Patience, key_variable: str | None) -> None:
        self._patience, self._key_variable = patience, key_variable
        self._client = httpx2.Client(timeout=patience.timeout)
        self._turnstile = threading.Lock()
        self._next = 0.0
        self.stopped = threading.Event()
        self._key()

    def _key(self) -> str | None:
        if self._key_variable is None:
            return None
        key = os.environ.get(self._key_variable, "").strip()
        if not key:
            raise RarefyError(
                f"the environment variable {self._key_variable} holds no API key: set it, or give "
                "no key variable for a server that needs none"
            )
        return key

    def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object that ``url`` answers.

        Raises:
            RarefyError: the request is refused, or every try failed; the last reason is given.
        """
        for number in range(1, self._patience.tries + 1):
            self._queue()
            try:
                return self._try(url, body)
            except _AgainError as error:
                why = str(error)
                if number < self._patience.tries:
                    self._wait(url, number, error)
        raise RarefyError(
            f"{url} gave no answer in {self._patience.tries} tries, the last time because {why}; "
            "run the same command again later: finished calls are kept"
        )

    def _try(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        key = self._key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        content = bytearray()
        limit = self._patience.timeout
        deadline = time.monotonic() + limit
        try:
            with self._client.stream("POST", url, json=body, headers=headers) as response:
                # The client's own limit is for one read: a trickle would never meet it.
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        raise httpx2.ReadTimeout("the answer did not end in time")
        except httpx2.TimeoutException as error:
            raise _AgainError(f"it took longer than {limit:g} s") from error
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise RarefyError(f"{url} is not the URL of an endpoint: {error}") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _AgainError(f"the connection failed ({_brief(str(error))})") from error
        return self._judge(url, response, bytes(content), key)

    def _judge(
        self, url: str, response: httpx2.Response, content: bytes, key: str | None
    ) -> dict[str, Any]:
        status, text = response.status_code, content.decode(errors="replace")
        if key:
            text = text.replace(key, _STRUCK)
        said = _brief(text)
        if status in _AGAIN or status >= 500:
            wait = _retry_after(response.headers.get("retry-after"))
            raise _AgainError(f"it answered {status} ({said})", wait)
        if status in {401, 403}:
            where = f"the key in {self._key_variable}" if key else "a request without a key"
            raise RarefyError(f"{url} refuses {where} ({status}: {said})")
        if status != 200:
            raise RarefyError(
                f"{url} refuses the request ({status}: {said}): check the URL, the model's name "
                "and the options"
            )
        try:
            value = json.loads(text)
        except ValueError as error:
            raise _AgainError(f"it answered what is no JSON ({said})") from error
        if not isinstance(value, dict):
            raise RarefyError(f"{url} answered no JSON object but {said}: is it an endpoint?")
        return value

    def _queue(self) -> None:
        """Wait for this request's turn under the rate limit."""
        with self._turnstile:
            at = max(time.monotonic(), self._next)
            self._next = at + 60 / self._patience.per_minute if self._patience.per_minute else at
        self._sleep(at - time.monotonic())

    def _wait(self, url: str, number: int, error: _AgainError) -> None:
        if error.wait > self._patience.longest:
            raise RarefyError(
                f"{url} asks to wait {error.wait:.0f} s; run the same command again after that: "
                "finished calls are kept"
            ) from error
        step = min(self._patience.backoff * 2 ** (number - 1), self._patience.longest)
        if error.wait:
            # What the server says of one request holds for all.
            with self._turnstile:
                self._next = max(self._next, time.monotonic() + error.wait)
        self._sleep(error.wait + step * random.uniform(0.5, 1.0))  # noqa: S311 - only jitter

    def _sleep(self, seconds: float) -> None:
        if self.stopped.wait(max(seconds, 0.0)):
            raise RarefyError("the run was stopped")


def _brief(said: str) -> str:
    """One short line of what was said."""
    line = " ".join(said.split())
    return line[:_QUOTED] + ("..." if len(line) > _QUOTED else "") if line else "nothing"


def _retry_after(value: str | None) -> float:
    """Seconds asked for in a Retry-After header: a number, or a date; 0 where there is none."""
    if value is None:
        return 0.0
    try:
        return max(float(value), 0.0)
    except ValueError:
        return _until(value)


def _until(date: str) -> float:
    """Seconds until a date of HTTP; 0 if it has passed, or is none."""
    try:
        when = parsedate_to_datetime(date)
    except ValueError:
        return 0.0
    return max((when.astimezone(UTC) - datetime.now(UTC)).total_seconds(), 0.0)
