"""Who may ask the server, and for what: Host and Origin, the token, paths and sizes, as ASGI.

A page of the internet that a visitor has open can send requests to 127.0.0.1 as well. Its Origin
gives it away; if its name was made to lead here (DNS rebinding), the Host does. Paths are those
that the page needs: gradio has more, some of which fetch addresses that a visitor names.
"""

import hashlib
import hmac
import html
import ipaddress
import json
import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost", "[::1]")
MIB = 2**20
MOST_JSON = 2 * MIB
MOST_UPLOAD = 24 * MIB
PATHS = re.compile(
    r"/(v1/.*|login|config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(assets|static)/.+"
    r"|gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/\w+|cancel|reset|info"
    r"|startup-events|theme\.css|file=.+))?/?"
)
HEADERS = {
    # The page is gradio's, whose scripts are inline and compile others; none comes from elsewhere.
    b"content-security-policy": b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    b"frame-ancestors 'none'; form-action 'self'; base-uri 'self'; object-src 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
}
LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><title>latentdiff</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 24rem; margin: 15vh auto;
padding: 0 1rem; color: #222 }} input, button {{ font: inherit; padding: .5rem; width: 100%;
box-sizing: border-box; margin: .3rem 0 }} p {{ color: #a00 }}</style>
<main><h1>latentdiff</h1><form method="post" action="/login">
<label>Token, which the server printed at its start
<input name="token" type="password" autocomplete="current-password" required autofocus></label>
<button>Enter</button></form><p role="alert">{said}</p></main></html>"""


class TooLargeError(Exception):
    """A request's body is larger than its path may have."""


class Guard:
    """Lets through what may pass, and answers the rest itself.

    `token` is asked for if it is not empty. `listen` says whether the server is reachable by
    other machines, by its addresses or by one of `names`.
    """

    def __init__(
        self, app: ASGIApp, *, token: str = "", listen: bool = False, names: Sequence[str] = ()
    ) -> None:
        self.app = app
        self.token = token
        self.listen = listen
        self.names = [name.lower() for name in names]
        self.cookie = hmac.new(token.encode(), b"cookie", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Guard`."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page needs no websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        request = Request(scope, receive)
        answer = self._refusal(request)
        if answer is None and self.token:
            answer = await self._without_token(request)
        if answer is None:
            try:
                receive = await _within(request, receive)
                await self.app(scope, receive, _with_headers(send))
                return
            except TooLargeError as error:
                answer = _refused(request, 413, str(error))
            except ValueError as error:
                answer = _refused(request, 400, str(error))
        await answer(scope, receive, _with_headers(send))

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request of a page of another origin, or for what is not there."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self._is_ours(host):
            return _refused(
                request, 403, f"Host {host!r} is not this server's name; use its address"
            )
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return _refused(request, 403, f"Origin {origin!r} is another site than {host!r}")
        site = request.headers.get("sec-fetch-site", "none")
        if request.method != "GET" and site not in ("same-origin", "none"):
            return _refused(request, 403, "the request comes from another site")
        if not PATHS.fullmatch(request.url.path):
            return _refused(request, 404, "there is nothing of this name")
        return None

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":\d+$", "", host).lower()
        if name in LOCAL:
            return True
        return self.listen and (name in self.names or _is_address(name.strip("[]")))

    async def _without_token(self, request: Request) -> Response | None:
        """The answer to a request that has no token, or brings it: a cookie, then the page."""
        name = f"latentdiff-{request.url.port or 80}"  # cookies are shared by a host's ports
        if request.url.path == "/login" and request.method == "POST":
            body = await _read(request.receive, 10_000)
            given = dict(_form(body)).get("token", "")
            return self._enter(name, given) or _login("This is not the token.")
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(bearer.strip(), self.token):
            return None
        if _same(request.cookies.get(name, ""), self.cookie):
            return None
        if request.url.path != "/" or request.method != "GET":
            return _refused(request, 401, "the token is missing or wrong; see `latentdiff web`")
        given = request.query_params.get("token")
        return self._enter(name, given or "") or _login("This is not the token." if given else "")

    def _enter(self, name: str, given: str) -> Response | None:
        """Store the cookie and go on to the page, where no token is in the address."""
        if not _same(given, self.token):
            return None
        answer = RedirectResponse("/", 303)
        answer.set_cookie(name, self.cookie, httponly=True, samesite="lax")
        return answer


def _same(given: str, wanted: str) -> bool:
    """Whether two texts are equal, in a time that does not tell how much of them is."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _form(body: bytes) -> list[tuple[str, str]]:
    return parse_qsl(body.decode("utf-8", "replace"))


def _login(said: str) -> Response:
    return HTMLResponse(LOGIN.format(said=html.escape(said)), 401)


def _refused(request: Request, status: int, message: str) -> Response:
    """A refusal, in OpenAI's form for the API and as text for people."""
    if request.url.path.startswith("/v1/"):
        return JSONResponse(error_of(status, message), status)
    return Response(f"latentdiff: {message}\n", status, media_type="text/plain")


def error_of(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """An error in the form that OpenAI's clients read."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _within(request: Request, receive: Receive) -> Receive:
    """The body of a request, read whole if it is JSON, and counted if it is a file.

    Raises TooLargeError, and ValueError for a file that an event of the page names by a URL:
    gradio would fetch it.
    """
    most = MOST_UPLOAD if request.url.path.rstrip("/").endswith("/upload") else MOST_JSON
    if int(request.headers.get("content-length") or 0) > most:
        raise TooLargeError(f"the request is larger than {most // MIB} MiB")
    if most == MOST_UPLOAD or request.method in ("GET", "HEAD"):
        return _counted(receive, most)
    body = await _read(receive, most)
    if request.url.path.startswith("/gradio_api/"):
        try:
            content = json.loads(body or b"null")
        except (ValueError, RecursionError) as error:
            raise ValueError("the request is not JSON") from error
        if _names_url(content):
            raise ValueError("files are uploaded, not named by an address")
    return _again(body, receive)


async def _read(receive: Receive, most: int) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            raise TooLargeError(f"the request is larger than {most // MIB} MiB")
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read, and then whatever follows: the client's leaving."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _counted(receive: Receive, most: int) -> Receive:
    count = 0

    async def receive_counted() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > most:
            raise TooLargeError(f"the request is larger than {most // MIB} MiB")
        return message

    return receive_counted


def _names_url(content: object) -> bool:
    """Whether somewhere in JSON a file's path is an address; depth is no matter."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and re.match(r"\s*[a-z][a-z0-9+.-]+:", path, re.I):
                return True
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return False


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = Headers(raw=message["headers"])
            more = [(k, v) for k, v in HEADERS.items() if k.decode() not in given]
            message["headers"] = [*message["headers"], *more]
        await send(message)

    return send_with_headers
