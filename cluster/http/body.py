"""Request bodies that vLLM's app would stumble over are refused before they get there.

vLLM 0.32 answers bad input with 400, but for these:

- text that is no Unicode (half of a surrogate pair, in JSON ``"\\ud800"``): as a stop string it
  can't be sent to the engine, and the answer is 500;
- numbers that are not finite, which Python's parser takes though JSON has none: as a logit bias
  they reach the sampler;
- ``true`` as an option of MemShare, of which its parser makes the number 1;
- bodies of any size, which are parsed on the event loop, while every other request waits;
- bodies that never end, which hold their place among a replica's requests.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import NoReturn

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memshare.request_options import RequestOptionsError, parse_request_options

# Cheap signs that a body needs a closer look: nearly none has one. A run of digits is tried at its
# first one only: at each of 308, one request would hold the event loop for a second a megabyte.
_SUSPECT = re.compile(
    rb"\\u[dD][89a-fA-F]|NaN|Infinity|[eE]\+?\d{3}|(?<!\d)\d{309}"
    rb'|"memshare\w*"\s*:\s*(?:true|false)'
)
_CODES = {408: "request_timeout", 413: "body_too_large"}


class BodyError(ValueError):
    """A body that is refused. The text names the reason and the fix."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StrictBody:
    """ASGI middleware: bodies are of a bounded size, arrive in a bounded time, and JSON in them is
    strict."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        """Wrap ``app``, which gets bodies of up to ``max_bytes`` that came in ``timeout_s``."""
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection. Other protocols than HTTP pass through untouched."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                first = await self._read(receive)
        except TimeoutError:
            late = f"the body did not arrive within {self._timeout_s:g} s; send it faster"
            await _refuse(BodyError(408, late))(scope, receive, send)
            return
        except BodyError as error:
            await _refuse(error)(scope, receive, send)
            return
        messages = [first]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> Message:
        """The whole body as one message; or the message that the client has left.

        Raises:
            BodyError: it is too large, or wrong.
        """
        parts: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return message
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                raise BodyError(
                    413, f"the body has more than {self._max_bytes} bytes; send a shorter prompt"
                )
            parts.append(part)
            more = message.get("more_body", False)
        body = b"".join(parts)
        require_strict(body)
        return {"type": "http.request", "body": body, "more_body": False}


def require_strict(body: bytes) -> None:
    """Refuse what Python's JSON parser takes and JSON does not have, and wrong options of MemShare
    that vLLM would make right ones of. Bodies that are no JSON pass: the app says what is wrong
    with them.

    Raises:
        BodyError: names what was found.
    """
    if _SUSPECT.search(body) is None:
        return
    try:
        value = json.loads(body, parse_constant=_no_number, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except BodyError:
        raise
    except UnicodeEncodeError as error:
        text = json.dumps(error.object[error.start : error.end])
        raise BodyError(400, f"{text} is half of a surrogate pair; send text in UTF-8") from None
    except (ValueError, RecursionError):
        return
    options = value.get("vllm_xargs") if isinstance(value, dict) else None
    if isinstance(options, dict):
        try:
            parse_request_options(options)
        except RequestOptionsError as error:
            raise BodyError(400, str(error)) from None


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(constant: str) -> NoReturn:
    raise BodyError(400, f"{constant} is no finite number; send one, or null")


def _refuse(error: BodyError) -> JSONResponse:
    described = {
        "message": str(error),
        "type": "invalid_request_error",
        "param": None,
        "code": _CODES.get(error.status, "invalid_json"),
    }
    # Who is late would go on: what comes must not be taken for another request.
    headers = {"Connection": "close"} if error.status == 408 else None
    return JSONResponse({"error": described}, error.status, headers)
