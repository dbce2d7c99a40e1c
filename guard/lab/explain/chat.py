"""An OpenAI-compatible chat endpoint: its settings, and one question asked of it.

The client library retries (429, 5xx, time-outs, lost connections; it waits as long as Retry-After says). The pace, and
what a question may cost at most, are added here.
"""

import os
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guard.errors import InvalidInput

Messages = tuple[dict[str, str], ...]  # role and content of each
_TEMPLATE_TOKENS = 64  # what a chat template may add to the messages


class EndpointConfig(BaseModel):
    """An endpoint's TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="such as http://127.0.0.1:8000/v1")
    model: str
    key_env: str = Field("", description="environment variable that holds the key; empty: the endpoint needs none")
    parallel: int = Field(4, ge=1, description="requests at a time")
    per_minute: float = Field(0, ge=0, description="requests, retries among them; 0: as fast as they go")
    retries: int = Field(8, ge=0)
    timeout: float = Field(300, gt=0, description="seconds")
    answer_tokens: int = Field(1000, ge=1, description="of one answer at most, reasoning included")
    budget_tokens: int = Field(ge=0, description="sent and received, by all runs in one folder")
    budget_money: float | None = Field(None, ge=0)
    price_sent: float = Field(0, ge=0, description="of a million tokens")
    price_received: float = Field(0, ge=0)
    parameters: dict[str, Any] = Field(
        {"temperature": 0, "response_format": {"type": "json_object"}}, description="of each request, sent as they are"
    )

    @model_validator(mode="after")
    def _check_prices(self) -> Self:
        if self.budget_money is not None and not self.price_sent + self.price_received:
            raise ValueError("budget_money: found neither price_sent nor price_received, expected a price to count by")
        return self


@dataclass(frozen=True)
class Cost:
    sent: int = 0
    received: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.sent + other.sent, self.received + other.received)

    def money(self, config: EndpointConfig) -> float:
        return (self.sent * config.price_sent + self.received * config.price_received) / 1e6

    def within_budget(self, config: EndpointConfig) -> bool:
        if config.budget_money is not None and self.money(config) > config.budget_money:
            return False
        return self.sent + self.received <= config.budget_tokens


class Chat:
    """The endpoint of one configuration; threads may share it."""

    def __init__(self, config: EndpointConfig) -> None:
        """Raises InvalidInput where the environment does not hold the key."""
        self._config = config
        pace = _Pace(config.per_minute)
        self._client = openai.OpenAI(
            base_url=config.url,
            api_key=_key(config),
            max_retries=config.retries,
            timeout=config.timeout,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [lambda _request: pace.wait()]}),
        )

    def ask(self, messages: Messages) -> tuple[str, Cost]:
        """What it says, and what that cost: `bound`, where the endpoint does not tell. Raises openai.OpenAIError."""
        given: Sequence[ChatCompletionMessageParam] = list(messages)  # type: ignore[arg-type]
        reply: object = self._client.chat.completions.create(
            model=self._config.model,
            messages=given,
            max_completion_tokens=self._config.answer_tokens,
            extra_body=self._config.parameters,
        )
        if not isinstance(reply, ChatCompletion) or not reply.choices:
            raise openai.OpenAIError(f"found no chat completion but {str(reply)[:200]!r}")
        cost = self.bound(messages)
        if reply.usage is not None:
            cost = Cost(reply.usage.prompt_tokens, reply.usage.completion_tokens)
        return reply.choices[0].message.content or "", cost

    def bound(self, messages: Messages) -> Cost:
        """What asking may cost at most: a token is a byte or more."""
        sent = sum(len(message["content"].encode()) for message in messages) + _TEMPLATE_TOKENS
        return Cost(sent, self._config.answer_tokens)


def read_config(file: Path) -> EndpointConfig:
    """Raises InvalidInput naming the file, the key, what was found and what was expected."""
    if not file.is_file():
        raise InvalidInput(f"{file}: found no such file, expected an endpoint's TOML file")
    try:
        return EndpointConfig.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{file}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(EndpointConfig.model_fields)
        told = {
            "extra_forbidden": f"{key}: found an unknown key, expected one of: {known}",
            "missing": f"{key}: found nothing, expected a value",
            "value_error": str(first.get("ctx", {}).get("error")),
        }
        plain = f"{key}: found {first['input']!r}, expected {first['msg'].removeprefix('Input should be ')}"
        raise InvalidInput(f"{file}: {told.get(first['type'], plain)}") from None


class _Pace:
    """Spaces requests out evenly, whichever thread they come from."""

    def __init__(self, per_minute: float) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + self._gap
        time.sleep(mine - now)


def _key(config: EndpointConfig) -> str:
    if not config.key_env:
        return "none"  # the client wants one
    key = os.environ.get(config.key_env, "")
    if not key:
        raise InvalidInput(
            f"key_env: found no environment variable {config.key_env}, expected the endpoint's key in it"
        )
    return key
