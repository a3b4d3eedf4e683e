"""Ray Serve's settings of HAProxy, mended.

As Ray writes them, a client may take an hour for a request, a proxy that all servers of a machine
share answers where no replica is left, whatever listens at the port of a replica that has gone is
believed, and errors are plain text. `mended` adds to each section what we want, and takes out what
we do not.

Only the standard library: see `load_balancer.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MARK_HEADER = "x-reir-server"
"""With the secret of one server (`environment.MARK`). Its proxy sends it along and takes no answer
without it; its replicas do the same with requests (`early.py`)."""

PATIENCE_S = 10
"""How long the header of a request may take, and then its body, or the first 64 kB of that."""

SHARE_OF_ONE_SOURCE = 2
"""One address may have a half of all connections, so that there is always room for others."""

_MENDED_SECTIONS = {"defaults", "frontend http_frontend", "backend default_backend", "listen stats"}
_UNKNOWN = "Ray's settings of HAProxy lack {}; constraints.txt names the Ray that this is made for"

RETRY_AFTER_S = 1


def problem(status: int, name: str, title: str, detail: str) -> str:
    """Return what HAProxy says by itself, as the setting for one status: see `problems.py`.

    The request id is one of HAProxy's, since the request has not come to a replica.
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
    503, "not-ready", "Not ready", "no replica of this server answers just now; try again"
)
_PROBLEMS = {
    400: problem(400, "bad-request", "The request cannot be read", "the request cannot be read"),
    404: problem(404, "not-found", "Not found", "nothing is served under this path"),
    408: problem(
        408,
        "request-timeout",
        "The request came too slowly",
        f"the body, or the first 64 kB of it, was not there after {PATIENCE_S} s",
    ),
    500: problem(500, "internal", "Internal error", "it is logged by the proxy"),
    502: _NOT_READY,
    503: _NOT_READY,
    504: _NOT_READY,
}
"""Status of HAProxy -> what it says. To a request that cannot be parsed it says in words of its own
that it is bad; nothing can be set for that."""

_DEFAULTS = [
    "unique-id-format %[uuid]",
    *(f"http-error status {status} {said}" for status, said in _PROBLEMS.items()),
    f"timeout http-request {PATIENCE_S}s",
    "timeout http-keep-alive 15s",
    "timeout queue 5s",
    "timeout client-fin 5s",
]
_WHOLE_BODY = f"http-request wait-for-body time {PATIENCE_S}s"
"""A replica sees a request when all of it is there, so one that trickles in takes no place; of one
that does not fit into HAProxy's buffer the first 64 kB have to come in this time."""

_NO_UPGRADE = "http-request del-header upgrade"
"""No other protocol is spoken; uvicorn would leave HTTP for it, and what we add to that."""

_NOBODY = "nobody"
"""What stands in where no replica is left: HAProxy itself, behind a socket. Else a request whose
replica dies ends with a closed connection, where the one to the replica had been used before."""

_ONE_REQUEST_ID = (
    "http-response set-header x-request-id %[res.fhdr(x-request-id,1)]"
    " if { res.hdr_cnt(x-request-id) gt 1 }"
)
"""Ours and the one that Ray adds are the same id."""


def mended(config: str, mark: str = "", host: str = "") -> str:
    """Return Ray's settings of HAProxy with ours.

    Args:
        config: as Ray has written it.
        mark: secret of this server; empty believes every replica that Ray names.
        host: where to serve; empty takes what Ray says.

    Raises:
        ValueError: what should be mended is not found: Ray writes something else by now.
    """
    has_apps = bool(re.search(r"^ +use_backend ", config, re.MULTILINE))
    most, nobody = int(_setting(config, "maxconn")), admin_socket(config).with_name(_NOBODY)
    lines, sections = [], [""]
    for line in config.splitlines():
        if line and not line.startswith((" ", "#")):
            sections.append(line)
            lines += [line, *(f"    {each}" for each in _ours(line, most, nobody, mark))]
        elif (kept := _kept(line, sections[-1], host, has_apps=has_apps)) is not None:
            lines.append(kept)
    if missing := _MENDED_SECTIONS - set(sections):
        raise ValueError(_UNKNOWN.format(sorted(missing)))
    lines += [f"frontend {_NOBODY}", f"    bind unix@{nobody}", f"    {_no_replica(mark)}"]
    return "\n".join(lines) + "\n"


def replicas_in(config: str) -> dict[str, list[str]]:
    """Return the lines by which Ray names the replicas of each application, by its section."""
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
    """Return Ray's settings in which an application without replicas keeps those that it had.

    Ray leaves out a replica while it takes over other live settings, though it answers meanwhile.
    One that is gone does not pass HAProxy's checks, so it is asked nothing.

    Args:
        config: as Ray has written it.
        last: of the settings before, as `replicas_in` returns them.
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
    """Where Ray asks HAProxy, by its settings.

    Raises:
        ValueError: they do not say.
    """
    return Path(_setting(config, "stats socket"))


def inner_socket(admin: Path) -> Path:
    """Where HAProxy answers; the path is short, since one of a socket has at most 107 bytes."""
    return admin.with_name("inner")


def _ours(section: str, most: int, nobody: Path, mark: str) -> Iterable[str]:
    """Return what we add at the head of a section."""
    if section == "global":
        return ["maxpipes 100"]  # else a quarter of all connections, and files to open for them
    if section == "defaults":
        return _DEFAULTS
    if section == "frontend http_frontend":
        return [
            "stick-table type ipv6 size 100k expire 60s store conn_cur",
            "tcp-request connection track-sc0 src",
            f"tcp-request connection reject if {{ sc0_conn_cur gt {most // SHARE_OF_ONE_SOURCE} }}",
            # A header that never ends: HAProxy's own words cannot be changed there, so none.
            "errorfile 408 /dev/null",
            # A replica that goes while it answers is as good as none: the same request may be sent
            # again, and our clients do that for this status.
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
    """Return a line of Ray's as it stays; None where it goes."""
    words = line.split()
    if words[:2] == ["stats", "socket"]:
        inner = inner_socket(Path(words[2]))
        return f"    stats socket {inner} mode 600 level admin expose-fd listeners"
    if words[:1] == ["errorfile"] or words[:2] == ["timeout", "http-keep-alive"]:
        return None
    if words[:1] == ["server"] and words[-1] == "backup":
        return None  # Serve's own proxy; other servers of this machine may listen on its port
    if words[:1] == ["bind"] and section in ("frontend prometheus", "listen stats"):
        return f"    bind 127.0.0.1:{words[1].rpartition(':')[2]}"
    if words[:1] == ["bind"] and host and section == "frontend http_frontend":
        return f"    bind {host}:{words[1].rpartition(':')[2]}"
    if section == "backend default_backend" and words[:2] == ["http-request", "return"]:
        return f"    http-request deny deny_status {404 if has_apps else 503}"
    return line


def _setting(config: str, name: str) -> str:
    """Return the first value that a name is set to.

    Raises:
        ValueError: there is none.
    """
    found = re.search(rf"^\s+{name} (\S+)", config, re.MULTILINE)
    if found is None:
        raise ValueError(_UNKNOWN.format(name))
    return found[1]
