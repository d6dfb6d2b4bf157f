"""Which requests the page answers: those to trusted host names, and changes only from its own origin."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
READING = ("GET", "HEAD", "OPTIONS")


def trusted_hosts(host: str, share: bool, allowed: Sequence[str]) -> list[str]:
    """The names under which the page may be called, "*" for any.

    A page of this machine alone answers to the names of the loopback: another site's name may be made to point there, and
    the browser then takes the page for part of that site. A page for others is called by names that it cannot know.

    Args:
        host: the address the page listens on.
        share: whether a tunnel leads to it.
        allowed: further names; they replace "*".
    """
    if host in LOOPBACK and not share:
        return [*LOOPBACK, *allowed]
    return [*LOOPBACK, host, *allowed] if allowed else ["*"]


def guards(hosts: Sequence[str]) -> dict[str, Any]:
    """Settings of the web application that refuse other names, and changes that other sites ask for."""
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return {"middleware": [trusted, Middleware(SameOrigin)]}


class SameOrigin:
    """Refuse a request that changes something if the browser says that it comes from a page of another host."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] == "http" and scope["method"] not in READING:
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            host = headers.get("x-forwarded-host") or headers.get("host", "")
            if origin is not None and urlsplit(origin).hostname != urlsplit(f"//{host}").hostname:
                await PlainTextResponse("This page answers only itself.", status_code=403)(scope, receive, send)
                return
        await self.app(scope, receive, send)
