"""Request bodies that vLLM's app would stumble over are refused before they get there.

vLLM 0.32 answers bad input with 400, but for these:

- text that is no Unicode (half of a surrogate pair, in JSON ``"\\ud800"``): as a stop string it
  can't be sent to the engine, and the answer is 500;
- numbers that are not finite, which Python's parser takes though JSON has none: as a logit bias
  they reach the sampler;
- bodies of any size, which are parsed on the event loop, while every other request waits.
"""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Cheap signs that a body needs a closer look: nearly none has one. A run of digits is tried at its
# first one only: at each of 308, one request would hold the event loop for a second a megabyte.
_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|NaN|Infinity|[eE]\+?\d{3}|(?<!\d)\d{309}")


class BodyError(ValueError):
    """A body that is refused. The text names the reason and the fix."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StrictBody:
    """ASGI middleware: bodies are of a bounded size, and JSON in them is strict."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Wrap ``app``, which gets bodies of up to ``max_bytes``."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection. Other protocols than HTTP pass through untouched."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            first = await self._read(receive)
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
    """Refuse what Python's JSON parser takes and JSON does not have. Bodies that are no JSON pass:
    the app says what is wrong with them.

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
        "code": "body_too_large" if error.status == 413 else "invalid_json",
    }
    return JSONResponse({"error": described}, error.status)
