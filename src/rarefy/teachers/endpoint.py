"""A teacher behind an OpenAI-compatible HTTP endpoint.

Levels: T0; T1 if the server is said to return log-probabilities; T2 if it is said to be a vLLM
server with ``prompt_logprobs``, because the chat protocol itself has no way to score a given text.
Every sample is a request of its own: not all servers know ``n``, and one that is cut loses one.
"""

from __future__ import annotations

import json
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rarefy.errors import RarefyError
from rarefy.teachers.base import Answer, Ask, Level, Prompt, Teacher, TokenScore
from rarefy.teachers.transport import Patience, Transport

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True)
class Endpoint:
    """Where a teacher is and what it can do.

    Attributes:
        url: up to and with the version, for example ``http://localhost:8000/v1``.
        model: as the server names it.
        key_variable: environment variable that holds the API key; None to send none.
        logprobs: the server returns log-probabilities of generated tokens.
        prompt_logprobs: it is a vLLM server, which also scores given texts; implies logprobs.
        limit_field: the server's name for the largest number of generated tokens.
        extra: more fields for every request, as a server of one's own may want; ``{"top_k": -1}``
            keeps vLLM from applying the model's own top_k.
        patience: limits and waiting.
    """

    url: str
    model: str
    key_variable: str | None = None
    logprobs: bool = False
    prompt_logprobs: bool = False
    limit_field: str = "max_tokens"
    extra: Mapping[str, Any] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)

    @property
    def level(self) -> Level:
        """T0, T1 or T2."""
        if self.prompt_logprobs:
            return Level.T2
        return Level.T1 if self.logprobs else Level.T0


class EndpointTeacher(Teacher):
    """Asks over HTTP, several requests at a time.

    Args:
        endpoint: where and how.

    Raises:
        RarefyError: the URL is none or holds a password, or the key variable is not set.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        extra = json.dumps(dict(endpoint.extra), sort_keys=True) if endpoint.extra else ""
        super().__init__(f"{endpoint.model} {extra}".strip(), endpoint.level)
        parts = urlsplit(endpoint.url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise RarefyError(
                f"an endpoint's URL looks like http://localhost:8000/v1, not {endpoint.url!r}"
            )
        if "@" in parts.netloc or parts.query:
            raise RarefyError(
                f"the URL of the endpoint at {parts.hostname} holds a secret or a query: give the "
                "bare URL, and the key in an environment variable"
            )
        self._endpoint = endpoint
        self._base = endpoint.url.rstrip("/")
        self._transport = Transport(endpoint.patience, endpoint.key_variable)

    def _answers(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        """Keep a few requests under way; a new one starts once an answer has been taken in.

        So a kill loses no more answers than there are requests at once, and after a failure those
        under way, which are paid for, are still taken in.
        """
        waiting = iter(enumerate(asks))
        failed: BaseException | None = None
        pending: dict[Future[Answer], int] = {}
        pool = ThreadPoolExecutor(self._endpoint.patience.concurrent)
        room = self._endpoint.patience.concurrent
        try:
            while True:
                if failed is None:
                    for index, ask in islice(waiting, room - len(pending)):
                        pending[pool.submit(self._ask, ask)] = index
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    index, error = pending.pop(future), future.exception()
                    if error is None:
                        yield index, future.result()
                    elif failed is None:
                        failed = error
                        self._transport.stopped.set()
            if failed is not None:
                raise failed
        finally:
            self._transport.stopped.set()
            pool.shutdown(cancel_futures=True)
            self._transport.stopped.clear()

    def _ask(self, ask: Ask) -> Answer:
        how = ask.sampling
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": _messages(ask.prompt),
            "temperature": how.temperature,
            "top_p": how.top_p,
            self._endpoint.limit_field: how.max_tokens,
            "seed": ask.stream,
        }
        if how.top_k:
            body["top_k"] = how.top_k
        if how.stop:
            body["stop"] = list(how.stop)
        if how.logprobs:
            body |= {"logprobs": True, "top_logprobs": how.logprobs}
        url = f"{self._base}/chat/completions"
        value = self._transport.post(url, body | dict(self._endpoint.extra))
        try:
            choice = value["choices"][0]
            text = choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError
            tokens = _scores(choice) if how.logprobs else ()
            text = text.encode(errors="replace").decode()  # JSON may hold half a character
            return Answer(text, str(choice.get("finish_reason") or "unknown"), tokens)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _odd(url, value, "choices[0].message.content") from error

    def score(self, prompt: Prompt, completion: str, top: int = 0) -> list[TokenScore]:
        """Score a completion's tokens by vLLM's extension (level T2); see :meth:`Teacher.score`."""
        self.require(Level.T2, "score")
        root = self._base.removesuffix("/v1")
        name = {"model": self._endpoint.model}
        asked = {"messages": _messages(prompt), "add_generation_prompt": True}
        given = {"prompt": completion, "add_special_tokens": False}
        before = self._tokens(f"{root}/tokenize", name | asked)
        after = self._tokens(f"{root}/tokenize", name | given)
        ids = before + after
        body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": top}
        url = f"{self._base}/completions"
        value = self._transport.post(url, name | body | dict(self._endpoint.extra))
        try:
            places = value["choices"][0]["prompt_logprobs"][len(before) :]
            return [_given(place, str(i), top) for place, i in zip(places, after, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _odd(url, value, "choices[0].prompt_logprobs") from error

    def _tokens(self, url: str, body: dict[str, Any]) -> list[int]:
        value = self._transport.post(url, body)
        tokens = value.get("tokens")
        if not isinstance(tokens, list):
            raise _odd(url, value, "tokens")
        return tokens


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def _scores(choice: Mapping[str, Any]) -> tuple[TokenScore, ...]:
    """Scores of generated tokens, in the chat protocol's form."""
    return tuple(
        TokenScore(
            entry["token"],
            float(entry["logprob"]),
            tuple((other["token"], float(other["logprob"])) for other in entry["top_logprobs"]),
        )
        for entry in choice["logprobs"]["content"]
    )


def _given(place: Mapping[str, Mapping[str, Any]], token: str, top: int) -> TokenScore:
    """The score of one given token; vLLM lists it beside the ``top`` most probable ones."""
    ranked = sorted(place.values(), key=lambda entry: -entry["logprob"])[:top]
    pairs = tuple((str(entry["decoded_token"]), float(entry["logprob"])) for entry in ranked)
    own = place[token]
    return TokenScore(str(own["decoded_token"]), float(own["logprob"]), pairs)


def _odd(url: str, value: Mapping[str, Any], missing: str) -> RarefyError:
    """Say what a well-formed answer lacks; servers put their own reason under ``error``."""
    error = value.get("error")
    reason = error.get("message") if isinstance(error, dict) else error
    said = f" ({' '.join(str(reason).split())[:200]})" if reason else ""
    return RarefyError(
        f"{url} answered without {missing}{said}: check that it is an OpenAI-compatible endpoint "
        "and offers what its options say"
    )
