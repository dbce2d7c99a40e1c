"""Request ids: from vLLM's own back to the caller's."""

import re
from collections.abc import Mapping
from typing import Any

XARG = "guard_request_id"

# vLLM puts the route before the caller's id, the number of the prompt behind it (completions only), then eight random
# hex digits; one of several samples of a request (n > 1) carries its number in front of all.
_ENGINE_ID = re.compile(r"(?:\d+_)?(?:chatcmpl-(?P<chat>.+)|cmpl-(?P<text>.+)-\d+|(?P<other>.+))-[0-9a-f]{8}")


def caller_id(engine_id: str, extra_args: Mapping[str, Any] | None = None) -> str:
    """What the caller named the request: `vllm_xargs.guard_request_id`, else the header `X-Request-Id`.

    Without either it is the id that vLLM answers with, less its prefix. An id of another shape is handed back as it is.
    """
    given = (extra_args or {}).get(XARG)
    if isinstance(given, str) and given:
        return given
    match = _ENGINE_ID.fullmatch(engine_id)
    return next(part for part in match.groups() if part) if match else engine_id
