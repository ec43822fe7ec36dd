"""Refuse requests that other people's web pages make a browser send.

Browsers let any page send a request to any address, including this machine's own. They put the
page's address into the header ``Origin``, and the name by which they found the server into
``Host``. ``Host`` matters because a page can make its own name point to this machine ("DNS
rebinding"), and could then read the answers too. The server forwards both headers as parameters of
the request if it was started with `HTTP_HEADERS`.
"""

from __future__ import annotations

import json
import os
from ipaddress import ip_address
from typing import Any

from dit_engine.arguments import shown

HTTP_HEADERS, GRPC_HEADERS = "(?i)(host|origin)", "(?i)user-agent"
"""For the server's --http-header-forward-pattern and --grpc-header-forward-pattern."""
NAMES = "DIT_SERVER_NAMES"
"""Environment variable: names by which the server may be addressed, separated by commas."""
HEADER_INPUTS = ("host", "Host", "HOST", "user-agent")
"""Optional inputs of "dit" that nobody uses. The keys of a request to /generate become parameters,
which look like headers, but a key with the name of an input becomes that input. So a parameter of
one of these names is a header: Host as clients write it, or gRPC's User-Agent."""
FORWARDS = "DIT_SERVER_FORWARDS"
"""Environment variable, set if the server was started with `HTTP_HEADERS` and `GRPC_HEADERS`."""


def refusal(request: Any, named: bool = False) -> str | None:
    """Why a request to a model of the Python backend is refused, in one line; None if it is not.

    named: also refuse a request without one of `HEADER_INPUTS` as a header, if the server
    `FORWARDS` them. The server forwards none for requests to /generate. Requests from its own
    model "dit" have none either, so the models that "dit" calls do not set this.
    """
    # A list keeps both values where a client gives a parameter the name of a header.
    given = json.loads(request.parameters(), object_pairs_hook=list)
    hosts = [str(value) for name, value in given if name.lower() == "host"]
    for host in hosts:
        if not _is_ours(host):
            return (
                f"Host {shown(host)} is not a name of this server: use its address or localhost, "
                f"or start the server with {NAMES}=NAME in its environment"
            )
    for origin in (value for name, value in given if name.lower() == "origin"):
        if not hosts or any(origin not in (f"http://{host}", f"https://{host}") for host in hosts):
            return f"Origin {shown(origin)}: requests from web pages are refused"
    if named and FORWARDS in os.environ and {name for name, _ in given}.isdisjoint(HEADER_INPUTS):
        return "the request has neither Host nor User-Agent: send it to /infer, with both"
    return None


def _is_ours(host: str) -> bool:
    """Whether a ``Host``, with or without a port, is an IP address or one of our names. An IP
    address is safe: a page cannot make it point elsewhere, as it can with its own name."""
    name, _, port = host.lower().rpartition(":")
    name = (name if port.isdecimal() and name else host.lower()).strip("[]").rstrip(".")
    try:
        return bool(ip_address(name))
    except ValueError:
        others = os.environ.get(NAMES, "").lower().split(",")
        return name == "localhost" or name.endswith(".localhost") or name in filter(None, others)


def failed(error: object, mistake: bool) -> Any:
    """An answer with an error; mistake: whether it is the client's (HTTP's 400) or ours (500)."""
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

    codes = pb_utils.TritonError
    code = codes.INVALID_ARG if mistake else codes.INTERNAL
    message = " ".join(str(error).split()) or type(error).__name__
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, which no proxy can reach."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
