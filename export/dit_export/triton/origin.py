"""Whose requests are answered: none that a web page of others makes a browser send.

Browsers let any page send a request to any address, this machine's own too. They say in ``Origin``
which page it was, and in ``Host`` by which name they found the server: a page of others whose name
suddenly leads to this machine ("DNS rebinding") could read the answers too. The server forwards
both headers as parameters of a request where it was told to with `HTTP_HEADERS`.
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
"""Variable of the environment: names by which the server is reached, with commas in between."""
FORWARDS = "DIT_SERVER_FORWARDS"
"""Variable that is set where the server was told to forward both kinds of headers."""


def refusal(request: Any, named: bool = False) -> str | None:
    """Why a request to a model of the Python backend is not answered, in one line; else None.

    named: whether it must say where it comes from, where the server `FORWARDS` that. Only requests
    to /generate do not, of which nothing is forwarded, and those of other models of this server.
    """
    said = request.parameters() if hasattr(request, "parameters") else "{}"  # not in all versions
    # A parameter of the request's own may have the name of a header, which it does not replace.
    pairs = [(name.lower(), value) for name, value in json.loads(said, object_pairs_hook=list)]
    hosts = [value for name, value in pairs if name == "host"]
    for host in hosts:
        if not _is_ours(str(host)):
            return (
                f"Host {shown(host)} is none of this server's names: ask it by its address, as "
                f"localhost, or name it in the server's environment, as {NAMES}"
            )
    for origin in (value for name, value in pairs if name == "origin"):
        if not hosts or any(origin not in (f"http://{host}", f"https://{host}") for host in hosts):
            return f"Origin {shown(origin)}: requests of web pages are not answered"
    if (
        named
        and FORWARDS in os.environ
        and not {"host", "user-agent"} & {name for name, _ in pairs}
    ):
        return "the request has neither Host nor User-Agent: send it to /infer, with both"
    return None


def _is_ours(host: str) -> bool:
    """Whether a ``Host``, with or without a port, is an address or one of our names. No page can
    have an address for its name and lead it elsewhere."""
    name, _, port = host.lower().rpartition(":")
    name = (name if port.isdecimal() and name else host.lower()).strip("[]").rstrip(".")
    try:
        return bool(ip_address(name))
    except ValueError:
        others = os.environ.get(NAMES, "").lower().split(",")
        return name == "localhost" or name.endswith(".localhost") or name in filter(None, others)
