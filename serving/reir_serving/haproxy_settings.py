"""Adjusts the HAProxy settings that Ray Serve writes.

With Ray's own settings, a client may take an hour to send a request; when no replica is left,
requests go to a proxy that all servers on a machine share; HAProxy trusts whatever process listens
on the port of a replica that has exited; and errors are plain text. `mended` adds our lines to each
section and removes the lines of Ray's that we do not want.

Uses only the standard library, for the reason given in `load_balancer.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MARK_HEADER = "x-reir-server"
"""Header with the secret of one server (`environment.MARK`). HAProxy adds it to each request and
rejects answers without it; replicas add it to each answer and reject requests without it
(`early.py`)."""

PATIENCE_S = 10
"""Timeout in seconds for the header of a request, and again for its body or its first 64 kB."""

SHARE_OF_ONE_SOURCE = 2
"""Connection limit of one client address: the total divided by this number. So one address cannot
use up all connections."""

_MENDED_SECTIONS = {"defaults", "frontend http_frontend", "backend default_backend", "listen stats"}
_UNKNOWN = (
    "Ray's HAProxy settings lack {}; install the version of Ray that constraints.txt specifies"
)

RETRY_AFTER_S = 1


def problem(status: int, name: str, title: str, detail: str) -> str:
    """Return the setting for an error answer that HAProxy gives itself, as `problems.py` does.

    HAProxy generates the request id, because the request has not reached a replica.
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
    later = f" hdr Retry-After {RETRY_AFTER_S}" if status == 503 else ""
    return (
        f"content-type application/problem+json lf-string '{json.dumps(body)}'"
        f" hdr X-Request-Id %[unique-id] hdr Cache-Control no-store{later}"
    )


_NOT_READY = problem(
    503, "not-ready", "Not ready", "no replica of this server is available; try again in a moment"
)
_PROBLEMS = {
    400: problem(400, "bad-request", "The request cannot be read", "the request cannot be read"),
    404: problem(404, "not-found", "Not found", "nothing is served under this path"),
    408: problem(
        408,
        "request-timeout",
        "The request came too slowly",
        f"the body, or the first 64 kB of it, did not arrive within {PATIENCE_S} s; send it faster",
    ),
    500: problem(500, "internal", "Internal error", "the proxy failed; the error is in its log"),
    502: _NOT_READY,
    503: _NOT_READY,
    504: _NOT_READY,
}
"""HTTP status of HAProxy -> its error answer. For a request that HAProxy cannot parse it uses a
fixed answer of its own, which no setting changes."""

_DEFAULTS = [
    "unique-id-format %[uuid]",
    *(f"http-error status {status} {said}" for status, said in _PROBLEMS.items()),
    f"timeout http-request {PATIENCE_S}s",
    "timeout http-keep-alive 15s",
    "timeout queue 5s",
    "timeout client-fin 5s",
]
_WHOLE_BODY = f"http-request wait-for-body time {PATIENCE_S}s"
"""HAProxy forwards a request only once its whole body has arrived, so a slow upload does not occupy
a replica. If the body does not fit into HAProxy's buffer, its first 64 kB must arrive in time."""

_NO_UPGRADE = "http-request del-header upgrade"
"""Protocol upgrades (such as WebSocket) are not supported. On such a request uvicorn would switch
to another protocol class, which does not have the checks that `early.py` adds."""

_NOBODY = "nobody"
"""Name of the backup server for when no replica is left: HAProxy itself, on a socket. Without it,
HAProxy would just close the client's connection when a replica dies during a request that was sent
over a reused connection."""

_ONE_REQUEST_ID = (
    "http-response set-header x-request-id %[res.fhdr(x-request-id,1)]"
    " if { res.hdr_cnt(x-request-id) gt 1 }"
)
"""Removes the second header: both we and Ray add the request id, and the two are the same."""


def mended(config: str, mark: str = "", host: str = "") -> str:
    """Return Ray's HAProxy settings with our adjustments.

    Args:
        config: settings as Ray wrote them.
        mark: secret of this server; if empty, every replica in Ray's settings is trusted.
        host: address to listen on; empty keeps the one in Ray's settings.

    Raises:
        ValueError: a section or setting to adjust is missing, because this version of Ray writes
            different settings.
    """
    has_apps = bool(re.search(r"^ +use_backend ", config, re.MULTILINE))
    most, nobody = int(_setting(config, "maxconn")), admin_socket(config).with_name(_NOBODY)
    lines, sections = [], [""]
    for line in config.splitlines():
        if line and not line.startswith((" ", "#")):
            sections.append(line)
            lines += [line, *(f"    {each}" for each in _additions(line, most, nobody, mark))]
        elif (kept := _kept(line, sections[-1], host, has_apps=has_apps)) is not None:
            lines.append(kept)
    if missing := _MENDED_SECTIONS - set(sections):
        raise ValueError(_UNKNOWN.format(sorted(missing)))
    lines += [f"frontend {_NOBODY}", f"    bind unix@{nobody}", f"    {_no_replica(mark)}"]
    return "\n".join(lines) + "\n"


def replicas_in(config: str) -> dict[str, list[str]]:
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
        elif section and words[:1] == ["server"] and words[-1] != "backup":
            found[section].append(line)
    return found


def with_replicas(config: str, last: Mapping[str, Sequence[str]]) -> str:
    """Return Ray's settings in which an application without replicas keeps its previous ones.

    Ray leaves a replica out while it applies new live settings, although it still answers. A
    replica that has exited fails HAProxy's health checks, so it gets no requests.

    Args:
        config: settings as Ray wrote them.
        last: replicas in the previous settings, as returned by `replicas_in`.
    """
    named, lines = replicas_in(config), []
    for line in config.splitlines():
        lines.append(line)
        if line in named and not named[line]:
            lines += last.get(line, ())
    return "\n".join(lines) + "\n"


def _no_replica(mark: str) -> str:
    own = f" hdr {MARK_HEADER} {mark}" if mark else ""
    return f"http-request return status 503 {_NOT_READY}{own}"


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


def _additions(section: str, most: int, nobody: Path, mark: str) -> Iterable[str]:
    """Return the lines to add at the start of a section."""
    if section == "global":
        return ["maxpipes 100"]  # the default, a quarter of maxconn, would need many open files
    if section == "defaults":
        return _DEFAULTS
    if section == "frontend http_frontend":
        return [
            "stick-table type ipv6 size 100k expire 60s store conn_cur",
            "tcp-request connection track-sc0 src",
            f"tcp-request connection reject if {{ sc0_conn_cur gt {most // SHARE_OF_ONE_SOURCE} }}",
            # When the header times out, HAProxy can only send its own fixed answer: send none.
            "errorfile 408 /dev/null",
            # A replica that exits while it answers counts as unavailable: the request may be sent
            # again, which our clients do on status 503.
            "http-after-response set-status 503 if { status 502 504 }",
        ]
    if not section.startswith("backend http-"):
        return []
    own = [_WHOLE_BODY, _NO_UPGRADE, _ONE_REQUEST_ID, f"server {_NOBODY} unix@{nobody} backup"]
    if mark:
        own += [
            f"http-request set-header {MARK_HEADER} {mark}",
            f"http-response deny deny_status 503 unless {{ res.hdr({MARK_HEADER}) -m str {mark} }}",
            f"http-response del-header {MARK_HEADER}",
            f"http-check send meth GET uri /-/healthz hdr {MARK_HEADER} {mark}",
            f"http-check expect hdr name {MARK_HEADER} value {mark}",
        ]
    return own


def _kept(line: str, section: str, host: str, *, has_apps: bool) -> str | None:
    """Return a line of Ray's settings, adjusted if necessary; None to remove it."""
    words = line.split()
    if words[:2] == ["stats", "socket"]:
        inner = inner_socket(Path(words[2]))
        return f"    stats socket {inner} mode 600 level admin expose-fd listeners"
    if words[:1] == ["errorfile"] or words[:2] == ["timeout", "http-keep-alive"]:
        return None
    if words[:1] == ["server"] and words[-1] == "backup":
        return None  # Serve's own proxy; another server on this machine may listen on its port
    if words[:1] == ["bind"] and section in ("frontend prometheus", "listen stats"):
        return f"    bind 127.0.0.1:{words[1].rpartition(':')[2]}"
    if words[:1] == ["bind"] and host and section == "frontend http_frontend":
        return f"    bind {host}:{words[1].rpartition(':')[2]}"
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
        raise ValueError(_UNKNOWN.format(name))
    return found[1]
