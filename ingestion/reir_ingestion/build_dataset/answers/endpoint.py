"""A vision-language model behind an OpenAI-compatible HTTP endpoint, such as vLLM or a vendor's.

Everything that comes back is untrusted: its size and the time that it may take are limited,
redirects are not followed, and only the text of the answer is used. A request that failed for a
reason that may go away is repeated with growing pauses.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from reir.errors import ConfigError
from reir_ingestion.build_dataset.answers.budget import Budget
from reir_ingestion.build_dataset.answers.failures import ModelUnavailable
from reir_ingestion.build_dataset.answers.question import Answer, Question, checked_answer

URL_VARIABLE, MODEL_VARIABLE = "REIR_ENDPOINT_URL", "REIR_ENDPOINT_MODEL"
KEY_VARIABLE = "REIR_ENDPOINT_KEY"
MAX_ANSWER_BYTES = 512 * 1024
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
MAX_REFUSALS_IN_A_ROW = 10
"""After so many refusals for lack of access, no further request is sent in this run."""
_BUSY = (408, 425, 429, 500, 502, 503, 504)
# 402 is a lack of credit. 404 also comes from a wrong path or the name of an unknown model.
_NO_ACCESS = (401, 402, 403, 404)
_CHARS_PER_TOKEN, _TOKENS_OF_PICTURE = 4, 1000
"""Estimates for an answer that does not say how many tokens it took."""


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """Where the model is, and how it is asked.

    Attributes:
        url: base URL, such as `http://localhost:8000/v1`.
        model: name of the model there.
        key: sent as a bearer token; empty to send none.
        timeout_s: maximum time of one request, answer included.
        attempts: maximum number of requests for one question.
        max_tokens: maximum length of an answer.
    """

    url: str
    model: str
    key: str = ""
    timeout_s: float = 120.0
    attempts: int = 5
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        """Check the address."""
        place = urlsplit(self.url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ConfigError(
                f"endpoint {self.url!r} is not valid; expected http://HOST:PORT/v1 or "
                f"https://HOST/v1, from --endpoint or {URL_VARIABLE}"
            )
        if not self.model:
            raise ConfigError(
                f"endpoint {self.url} needs the name of a model; set --model or {MODEL_VARIABLE}"
            )

    @staticmethod
    def key_of_environment() -> str:
        """Return the key; it is not an option, because other users can see options."""
        return os.environ.get(KEY_VARIABLE, "")


class _Busy(Exception):
    """An attempt failed for a reason that may go away.

    Attributes:
        retry_after_s: how long the server asks to wait; None if it does not say.
    """

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    # Validated apart from the rest, so that wrong counts do not make a good answer unusable.
    usage: Any = None


class EndpointModel:
    """Asks a model over HTTP; many threads may use it, each request has its own connection.

    Args:
        settings: see `EndpointSettings`.
        budget: is asked before each request.
        sleep: function that waits between attempts.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        budget: Budget,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._budget, self._sleep = settings, budget, sleep
        self._refusals_in_a_row = 0

    @property
    def name(self) -> str:
        """The model, for provenance."""
        return f"endpoint:{self._settings.model}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What an answer depends on, besides the question; the key and the address are not."""
        return {"max_tokens": self._settings.max_tokens}

    def ask(self, question: Question, key: str) -> Answer:
        """Answer a question.

        Raises:
            ModelUnavailable: there is no answer after all attempts, the endpoint refuses the
                request, or the budget is spent.
        """
        body = json.dumps(self._request(question)).encode()
        why = ""
        for attempt in range(self._settings.attempts):
            if self._refusals_in_a_row >= MAX_REFUSALS_IN_A_ROW:
                raise ModelUnavailable("no access: the endpoint refused all recent requests")
            # Within the loop, because each repetition is a request that may be charged, too.
            self._budget.take(key)
            try:
                return _answer(question, *self._post(body, key))
            except _Busy as busy:
                why = str(busy)
                if attempt + 1 < self._settings.attempts:
                    self._sleep(_pause_s(attempt, busy.retry_after_s))
        raise ModelUnavailable(f"no answer: {why}, after {self._settings.attempts} attempts")

    def _request(self, question: Question) -> dict[str, Any]:
        schema = {"name": "answer", "schema": dict(question.schema)}
        return {
            "model": self._settings.model,
            "messages": question.messages(),
            "temperature": 0,
            "max_tokens": self._settings.max_tokens,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    def _post(self, body: bytes, key: str) -> tuple[str, bytes]:
        """Send a request; return the content type and the body of the answer.

        Raises:
            _Busy: it may succeed later.
            ModelUnavailable: it will not.
        """
        # `key` is a hash of the question, so it is the same for repetitions and in later runs.
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        if self._settings.key:
            headers["Authorization"] = f"Bearer {self._settings.key}"
        path = urlsplit(self._settings.url).path.rstrip("/") + "/chat/completions"
        try:
            with self._connection() as connection:
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                # The additional byte tells an answer that is too large from one that just fits.
                data = response.read(MAX_ANSWER_BYTES + 1)
                # A body that ends early is no error of `read` with a limit.
                if response.length and len(data) <= MAX_ANSWER_BYTES:
                    raise http.client.IncompleteRead(data, response.length)
        except (OSError, http.client.HTTPException) as error:
            raise _Busy(f"{type(error).__name__}: {error}"[:200]) from error
        self._check_status(response)
        return response.headers.get_content_type(), data

    def _check_status(self, response: http.client.HTTPResponse) -> None:
        status = response.status
        # Another thread may count at the same time; the limit need not be exact.
        self._refusals_in_a_row = self._refusals_in_a_row + 1 if status in _NO_ACCESS else 0
        if status in _BUSY:
            raise _Busy(f"status {status}", _seconds(response.headers.get("Retry-After")))
        if status in _NO_ACCESS:
            raise ModelUnavailable(
                f"no access: status {status}; check --endpoint, --model and {KEY_VARIABLE}"
            )
        if 300 <= status < 400:
            raise ModelUnavailable(f"redirect: status {status}; redirects are not followed")
        if status != 200:
            raise ModelUnavailable(f"request refused: status {status}")

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        """Open a connection that is cut after the time limit, even if bytes trickle in."""
        place, limit_s = urlsplit(self._settings.url), self._settings.timeout_s
        assert place.hostname, "checked by EndpointSettings"
        # `timeout` limits each single read: an answer that arrives byte by byte would never reach
        # it, hence the timer below.
        connection = (
            http.client.HTTPSConnection(
                place.hostname, place.port, timeout=limit_s, context=ssl.create_default_context()
            )
            if place.scheme == "https"
            else http.client.HTTPConnection(place.hostname, place.port, timeout=limit_s)
        )
        is_cut = threading.Event()

        def cut() -> None:
            is_cut.set()
            if connection.sock is not None:
                # `shutdown` and not `close`, which would not wake the thread that waits for data.
                with suppress(OSError):  # it is closed already
                    connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(limit_s, cut)
        timer.daemon = True
        timer.start()
        try:
            yield connection
        except TimeoutError:
            # A single read has the same limit, so it gets the same message.
            is_cut.set()
        except (OSError, http.client.HTTPException):
            if not is_cut.is_set():
                raise
        finally:
            timer.cancel()
            connection.close()
        # A body that is cut looks like one that ends.
        if is_cut.is_set():
            raise TimeoutError(f"the answer took more than {limit_s:g} s")


def _answer(question: Question, content_type: str, data: bytes) -> Answer:
    """Return the answer in a response with status 200; never raises for a malformed one."""
    estimate = (
        _TOKENS_OF_PICTURE + len(question.text) // _CHARS_PER_TOKEN,
        len(data) // _CHARS_PER_TOKEN,
    )

    def refused(why: str) -> Answer:
        return Answer(text="", tokens_in=estimate[0], tokens_out=estimate[1], refused=why)

    # From here on, the answer may have been charged. What cannot be used is returned as refused and
    # not raised, so that it is kept, and the question is not asked again without `--ask-again`.
    if len(data) > MAX_ANSWER_BYTES:
        return refused(f"too large: the answer has more than {MAX_ANSWER_BYTES} bytes")
    if content_type != "application/json":
        return refused(f"not JSON: the content type is {content_type[:60]!a}")
    try:
        completion = _Completion.model_validate_json(data)
    except ValidationError as error:
        return refused(f"not a completion: {first_problem(error)}")
    try:
        usage = _Usage.model_validate(completion.usage)
        tokens_in, tokens_out = usage.prompt_tokens, usage.completion_tokens
    except ValidationError:
        tokens_in, tokens_out = estimate
    choice = completion.choices[0]
    return checked_answer(
        choice.message.content or "",
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        cut_off=choice.finish_reason == "length",
        refused="the model refuses" if choice.message.refusal else "",
    )


def first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found, in words, without the untrusted value."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}"[:200] if where else str(first["msg"])[:200]


def _pause_s(attempt: int, retry_after_s: float | None) -> float:
    """Return how long to wait: what the server asks, or twice as long each time, with jitter."""
    if retry_after_s is not None:
        return min(retry_after_s, MAX_PAUSE_S)
    return min(FIRST_PAUSE_S * 2.0**attempt, MAX_PAUSE_S) * random.uniform(0.5, 1.0)


def _seconds(retry_after: str | None) -> float | None:
    """Return a `Retry-After` in seconds; None for a date, which servers of models do not send."""
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None
