"""Adjusts the HAProxy settings that Ray Serve writes.

Ray's own settings have four problems. A client may take an hour to send a request. When no replica
is left, requests go to a proxy that all servers on a machine share. HAProxy trusts whatever process
listens on the port of a replica that has exited. Errors are plain text. `adjust` adds our lines to
each section, and removes or changes some of Ray's lines.

This module uses only the standard library, for the reason given in `load_balancer.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SECRET_HEADER = "x-reir-server"
"""Header with the secret of one server (`environment.SECRET`). HAProxy adds it to each request and
rejects answers without it; replicas add it to each answer and reject requests without it
(`early_rejection.py`)."""

REQUEST_TIMEOUT_S = 10
"""Timeout in seconds for the header of a request, and again for its body or its first 64 kB."""

CLIENT_CONNECTIONS_DIVISOR = 2
"""The connection limit of one client address is the total divided by this number, so that one
address cannot use up all connections."""

# If one of these is missing, this version of Ray writes other settings than those known here.
_ADJUSTED_SECTIONS = {
    "defaults",
    "frontend http_frontend",
    "backend default_backend",
    "listen stats",
}
_UNKNOWN_SETTINGS = (
    "Ray's HAProxy settings lack {}; install the version of Ray that constraints.txt specifies"
)

RETRY_AFTER_S = 1


def error_response(status: int, name: str, title: str, detail: str) -> str:
    """Return the setting for an error answer of HAProxy itself.

    The answer has the same fields as those of `problems.py`. HAProxy generates the request id,
    because the request has not reached a replica.
    """
    body = {
        "type": f"/problems/{name}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": "/requests/%[unique-id]",
        "request_id": "%[unique-id]",
        "errors": [],
    }
    # In an `lf-string` of HAProxy, a single quote would end the text and `%` would begin a
    # variable, so no other text of an answer may contain them.
    retry_after = f" hdr Retry-After {RETRY_AFTER_S}" if status == 503 else ""
    return (
        f"content-type application/problem+json lf-string '{json.dumps(body)}'"
        f" hdr X-Request-Id %[unique-id] hdr Cache-Control no-store{retry_after}"
    )


_NOT_READY = error_response(
    503, "not-ready", "Not ready", "no replica of this server is available; try again in a moment"
)
_ERROR_RESPONSES = {
    400: error_response(
        400, "bad-request", "The request cannot be read", "the request cannot be read"
    ),
    404: error_response(404, "not-found", "Not found", "nothing is served under this path"),
    408: error_response(
        408,
        "request-timeout",
        "The request arrived too slowly",
        f"the body, or the first 64 kB of it, did not arrive within {REQUEST_TIMEOUT_S} s; "
        "send it faster",
    ),
    500: error_response(
        500, "internal", "Internal error", "the proxy failed; the error is in its log"
    ),
    502: _NOT_READY,
    503: _NOT_READY,
    504: _NOT_READY,
}
"""HTTP status of HAProxy -> its error answer. For a request that HAProxy cannot parse, it uses a
fixed answer of its own, which no setting can change."""

_DEFAULTS = [
    "unique-id-format %[uuid]",
    *(f"http-error status {status} {response}" for status, response in _ERROR_RESPONSES.items()),
    f"timeout http-request {REQUEST_TIMEOUT_S}s",
    "timeout http-keep-alive 15s",
    "timeout queue 5s",
    "timeout client-fin 5s",
]
_WHOLE_BODY = f"http-request wait-for-body time {REQUEST_TIMEOUT_S}s"
"""HAProxy forwards a request only once its whole body has arrived, so a slow upload does not occupy
a replica. If the body does not fit into HAProxy's buffer, its first 64 kB must arrive in time."""

_NO_UPGRADE = "http-request del-header upgrade"
"""Protocol upgrades (such as WebSocket) are not supported. On such a request uvicorn would switch
to another protocol class, which does not have the checks that `early_rejection.py` adds."""

_NO_REPLICA = "no-replica"
"""Name of the backup server that gets requests while no replica is available. It is HAProxy itself,
on a socket. It holds a request for a second and then lets HAProxy choose a replica again, because a
replica that has crashed is usually back within seconds. An immediate 503 would have clients retry
so often that new replicas could not start (docs/LOG.md). Without any backup server, HAProxy would
just close the client's connection if a replica died during a request on a reused connection."""

_HELD_HEADER = "x-reir-held"
"""Header that a request gets each time that it was held."""

MAX_HOLDS = 10
"""How often a request is held, for a second each time, before it gets status 503."""

MAX_HELD = 400
"""Maximum number of requests that are held at the same time; further ones get status 503 at once. A
request that was held n times counts n times, because it has n connections through HAProxy."""

_ANSWER_NOW = "path -m end /readyz /healthz"
"""Requests that are never held, because probes ask whether a replica is available."""

_ONE_REQUEST_ID = (
    "http-response set-header x-request-id %[res.fhdr(x-request-id,1)]"
    " if { res.hdr_cnt(x-request-id) gt 1 }"
)
"""Removes a second request id from an answer: Ray adds the same id as we do."""


def adjust(config: str, secret: str = "", host: str = "") -> str:
    """Return Ray's HAProxy settings with our adjustments.

    Args:
        config: the settings as Ray wrote them.
        secret: secret of this server; if empty, every replica in Ray's settings is trusted.
        host: address to listen on; empty keeps the one in Ray's settings.

    Raises:
        ValueError: a section or setting to adjust is missing, because this version of Ray writes
            different settings.
    """
    has_apps = bool(re.search(r"^ +use_backend ", config, re.MULTILINE))
    max_connections = int(_setting(config, "maxconn"))
    backup_socket = admin_socket(config).with_name(_NO_REPLICA)
    lines, sections = [], [""]
    for line in config.splitlines():
        if line and not line.startswith((" ", "#")):
            sections.append(line)
            added = _additions(line, max_connections, backup_socket, secret)
            lines += [line, *(f"    {each}" for each in added)]
        elif (adjusted := _adjust_line(line, sections[-1], host, has_apps=has_apps)) is not None:
            lines.append(adjusted)
    if missing := _ADJUSTED_SECTIONS - set(sections):
        raise ValueError(_UNKNOWN_SETTINGS.format(sorted(missing)))
    lines += _holding_sections(backup_socket, secret)
    return "\n".join(lines) + "\n"


def replica_lines(config: str) -> dict[str, list[str]]:
    """Return the lines of Ray's settings that name replicas, by the application's section."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in config.splitlines():
        words = line.split()
        if line.startswith("backend http-"):
            section = line
            found[section] = []
        elif line and not line.startswith((" ", "#")):
            section = ""
        # The backup server is no replica, but Serve's own proxy.
        elif section and words[:1] == ["server"] and words[-1] != "backup":
            found[section].append(line)
    return found


def restore_replicas(config: str, previous: Mapping[str, Sequence[str]]) -> str:
    """Return Ray's settings in which an application without replicas keeps its previous ones.

    Ray leaves a replica out while it applies new live settings, although the replica still answers.
    A replica that has exited fails HAProxy's health checks, so it gets no requests.

    Args:
        config: settings as Ray wrote them.
        previous: replicas in the previous settings, as returned by `replica_lines`.
    """
    named, lines = replica_lines(config), []
    for line in config.splitlines():
        lines.append(line)
        if line in named and not named[line]:
            lines += previous.get(line, ())
    return "\n".join(lines) + "\n"


def _holding_sections(backup_socket: Path, secret: str) -> list[str]:
    """Return the sections that hold requests while no replica is available.

    A held request goes to a socket and not to the application's section. When Ray names a new
    replica, a new HAProxy process takes over all sockets, and only that process knows the replica.
    """
    own = f" hdr {SECRET_HEADER} {secret}" if secret else ""
    give_up = f"{{ req.hdr_cnt({_HELD_HEADER}) ge {MAX_HOLDS} }} || {{ fe_conn gt {MAX_HELD} }}"
    return [
        f"frontend {_NO_REPLICA}",
        f"    bind unix@{backup_socket}",
        f"    http-request return status 503 {_NOT_READY}{own} if {give_up} || {{ {_ANSWER_NOW} }}",
        "    http-request lua.hold",
        f"    http-request add-header {_HELD_HEADER} 1",
        *([f"    http-response set-header {SECRET_HEADER} {secret}"] if secret else []),
        f"    default_backend {_NO_REPLICA}",
        f"backend {_NO_REPLICA}",
        # No connection is kept for later requests, since it would lead to the old process.
        f"    server again unix@{_again_socket(backup_socket)} pool-max-conn 0",
    ]


def _again_socket(backup_socket: Path) -> Path:
    """Return the socket on which HAProxy takes a held request again."""
    return backup_socket.with_name("again")


def admin_socket(config: str) -> Path:
    """Return the administration socket that Ray queries, as named in its settings.

    Raises:
        ValueError: the settings name none.
    """
    return Path(_setting(config, "stats socket"))


def inner_socket(admin: Path) -> Path:
    """Return HAProxy's own administration socket.

    Its name is short because the path of a socket has at most 107 bytes.
    """
    return admin.with_name("inner")


def _additions(
    section: str, max_connections: int, backup_socket: Path, secret: str
) -> Iterable[str]:
    """Return the lines to add at the start of a section."""
    if section == "global":
        return [
            "maxpipes 100",  # the default, a quarter of maxconn, would need many open files
            f'lua-load "{Path(__file__).with_name("hold.lua")}"',
        ]
    if section == "defaults":
        return _DEFAULTS
    if section == "frontend http_frontend":
        client_limit = max_connections // CLIENT_CONNECTIONS_DIVISOR
        return [
            f"bind unix@{_again_socket(backup_socket)}",
            # The table counts the connections of each client address.
            # HAProxy converts IPv4 addresses to IPv6 for it.
            "stick-table type ipv6 size 100k expire 60s store conn_cur",
            "tcp-request connection track-sc0 src",
            f"tcp-request connection reject if {{ sc0_conn_cur gt {client_limit} }}",
            # When the header times out, HAProxy can only send its own fixed answer, so it sends
            # none.
            "errorfile 408 /dev/null",
            # A replica that exits while it answers counts as unavailable. Clients such as
            # `reir.Client` send a request again on status 503.
            "http-after-response set-status 503 if { status 502 504 }",
        ]
    if not section.startswith("backend http-"):
        return []
    own = [
        _WHOLE_BODY,
        _NO_UPGRADE,
        _ONE_REQUEST_ID,
        f"server {_NO_REPLICA} unix@{backup_socket} backup pool-max-conn 0",
    ]
    if secret:
        # Another server's replica may have taken over the port of one of ours that has exited.
        own += [
            f"http-request set-header {SECRET_HEADER} {secret}",
            "http-response deny deny_status 503 unless"
            f" {{ res.hdr({SECRET_HEADER}) -m str {secret} }}",
            f"http-response del-header {SECRET_HEADER}",
            f"http-check send meth GET uri /-/healthz hdr {SECRET_HEADER} {secret}",
            f"http-check expect hdr name {SECRET_HEADER} value {secret}",
        ]
    return own


def _adjust_line(line: str, section: str, host: str, *, has_apps: bool) -> str | None:
    """Return a line of Ray's settings, adjusted if necessary; None to remove it."""
    words = line.split()
    if words[:2] == ["stats", "socket"]:
        inner = inner_socket(Path(words[2]))
        return f"    stats socket {inner} mode 600 level admin expose-fd listeners"
    if words[:1] == ["errorfile"] or words[:2] == ["timeout", "http-keep-alive"]:
        return None  # we set both ourselves, see `_DEFAULTS`
    if words[:1] == ["server"] and words[-1] == "backup":
        return None  # Serve's own proxy; another server on this machine may listen on its port
    # Ray binds statistics to all interfaces, and nothing there asks for a password.
    if words[:1] == ["bind"] and section in ("frontend prometheus", "listen stats"):
        return f"    bind 127.0.0.1:{words[1].rpartition(':')[2]}"
    if words[:1] == ["bind"] and host and section == "frontend http_frontend":
        return f"    bind {host}:{words[1].rpartition(':')[2]}"
    # Requests reach this section if no application has their path. Ray answers with plain text.
    if section == "backend default_backend" and words[:2] == ["http-request", "return"]:
        return f"    http-request deny deny_status {404 if has_apps else 503}"
    return line


def _setting(config: str, name: str) -> str:
    """Return the first value of a setting.

    Raises:
        ValueError: it is not set.
    """
    found = re.search(rf"^\s+{name} (\S+)", config, re.MULTILINE)
    if found is None:
        raise ValueError(_UNKNOWN_SETTINGS.format(name))
    return found[1]
