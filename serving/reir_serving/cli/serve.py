"""The subcommand `reir serve`."""

from __future__ import annotations

import errno
import os
import queue
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reir.cli.common import (
    AsJson,
    Checkpoint,
    Encoder,
    Store,
    connect,
    encoder_from_options,
    messages,
    print_json,
)
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.store import InstanceStore
    from reir_serving.config import ServeConfig
    from reir_serving.ray.supervisor import ServerProcess

EXAMPLES = """[bold]Examples[/bold]

reir serve --gallery photos

reir serve --host 0.0.0.0 --keys keys.yaml --min-replicas 2 --max-replicas 4

reir serve --gallery photos --build serve.yaml

RAY_ADDRESS=auto reir serve --config serve-config.yaml"""

SECTION = "serve"
"""Section of the settings."""

STOP = (signal.SIGINT, signal.SIGTERM)
IMPORT_PATH = "reir_serving.ray.deployments:build_app"

Galleries = Annotated[
    list[str] | None,
    typer.Option("--gallery", help="Gallery to serve; repeat it for several; default: all."),
]
Localizer = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Searches with `zoom` let this model look at the first photos, and order them by its "
        "scores: grounding-dino:NAME_OR_DIR or piza:DIR. By default, the encoder zooms in.",
    ),
]
Host = Annotated[
    str | None,
    typer.Option(
        help="Address to listen on, 127.0.0.1 by default; one that others can reach needs --keys."
    ),
]
Port = Annotated[
    int | None, typer.Option(min=1, max=65_535, help="Port to listen on, 8000 by default.")
]
Keys = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with API keys, which `reir keys new` creates."),
]
MinReplicas = Annotated[
    int | None, typer.Option(min=1, help="Minimum number of replicas, 1 by default.")
]
MaxReplicas = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Maximum number of replicas, 1 by default; Ray Serve adjusts the number to the load.",
    ),
]
SearchLogFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Log searches in this folder, and let users say whether hits are right. By default, "
        "nothing is logged. `reir canary make` makes canaries from it, by default from "
        "$REIR_HOME/searches.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file with the settings of the section `serve`; `REIR_SERVE__...` variables and "
        "options count more. SIGHUP has the server read its settings `live` again.",
    ),
]
Build = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a config file for Ray Serve and KubeRay instead of starting a server.",
    ),
]

SCALED = ("ingress", "text", "retriever", "reranker")
"""Deployments whose number of replicas `--min-replicas` and `--max-replicas` set. The localizer is
not among them, because only few requests use it."""


def register(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("serve", epilog=EXAMPLES)(serve)


def serve(  # noqa: PLR0913, every argument is an option of the command
    gallery: Galleries = None,
    store: Store = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    localizer: Localizer = None,
    host: Host = None,
    port: Port = None,
    keys: Keys = None,
    min_replicas: MinReplicas = None,
    max_replicas: MaxReplicas = None,
    search_log: SearchLogFolder = None,
    config: ConfigFile = None,
    build: Build = None,
    as_json: AsJson = False,
) -> None:
    """Serve galleries over HTTP and on a web page, until Ctrl-C."""
    from reir.settings import load_settings
    from reir.tracing import set_variables
    from reir_serving.config import ServeConfig
    from reir_serving.middleware.access import check_bind

    given: dict[str, Any] = {
        "galleries": gallery or None,
        "store": store,
        "encoder": encoder_from_options(checkpoint, encoder),
        "zoomer": localizer,
        "host": host,
        "port": port,
        "keys_file": keys,
        "search_log": search_log,
    }
    scaling = {"min_replicas": min_replicas, "max_replicas": max_replicas}
    # Options that were not given are left out: for `load_settings`, None is a value, too.
    given |= {deployment: _without_none(scaling) or None for deployment in SCALED}
    chosen = load_settings(SECTION, ServeConfig, _without_none(given), config).values
    set_variables()
    check_bind(chosen.host, chosen.keys_file)
    if build is not None:
        build.write_text(serve_file(chosen), encoding="utf-8")
        messages().print(
            f"wrote {build}; run it with `serve run {build}`, or copy it into a RayService"
        )
        return
    _check(chosen)
    _serve(chosen, config, as_json=as_json)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def serve_file(config: ServeConfig) -> str:
    """Return the config file with which Ray Serve and KubeRay run this application, as YAML."""
    import yaml

    # The store is always written, because its default depends on the machine and its environment.
    values = config.model_dump(mode="json", exclude_defaults=True) | {"store": config.store}
    application = {
        "name": "reir",
        "import_path": IMPORT_PATH,
        "route_prefix": "/",
        "args": values,
        "deployments": [{"name": "ingress", "user_config": config.live.model_dump(mode="json")}],
    }
    http = {"host": config.host, "port": config.port}
    return yaml.safe_dump({"http_options": http, "applications": [application]}, sort_keys=False)


def _check(config: ServeConfig) -> None:
    """Check the settings before Ray starts, because that takes several seconds.

    Raises:
        ConfigError: the server cannot listen on the port or write its search log, or the name of
            the localizer cannot be parsed.
        GalleryNotFound: a gallery does not exist, or has neither a live nor a pinned version.
        SchemaMismatch: a gallery was indexed with another checkpoint than the given one.
    """
    from reir.models.localizers import parse_localizer_spec

    check_port(config.host, config.port)
    if config.search_log is not None:
        check_search_log(config.search_log)
    if config.zoomer is not None:
        parse_localizer_spec(config.zoomer)
    with connect(config.store) as store:
        for name in config.galleries or ():
            _check_gallery(store, name, config)


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on a port.

    Raises:
        ConfigError: the port is in use, or the address does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # Otherwise the connections of a server that has just stopped would keep its port in use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} of {host} is in use; choose another one, "
                    f"for example --port {port + 1}"
                ) from error
            raise ConfigError(
                f"the server cannot listen on port {port} of {host}: {error}; "
                "--host must be an address of this machine"
            ) from error


def check_search_log(folder: Path) -> None:
    """Create the folder of the search log, and check that files can be written there.

    Raises:
        ConfigError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not by writing a file: on a full disk, the server can still search.
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"the search log cannot be written to {folder}: {error.strerror}; name a folder that "
            f"you may write with --search-log, or leave the option out"
        ) from error


def _check_gallery(store: InstanceStore, name: str, config: ServeConfig) -> None:
    from reir.encoders import load_encoder_spec
    from reir.query.retrieval import Retriever
    from reir.query.search import check_gallery

    check_gallery(store, name)
    pinned = config.live.pinned.get(name, "")
    if not pinned:
        store.live_version(name)  # raises if no version is live
    if config.encoder is not None:
        with messages().status("loading the model"):
            model = load_encoder_spec(config.encoder)
        # Raises if the checkpoints differ.
        Retriever(store, name, model.digest, model.dim, pinned).refresh()


def _serve(config: ServeConfig, file: Path | None, *, as_json: bool) -> None:
    """Serve until a signal says to stop; SIGHUP reloads the section `live` of the config file.

    Raises:
        ReirError: the server could not start, or exited unexpectedly.
        ModuleNotFoundError: the server needs a package that is not installed.
    """
    from reir_serving.ray.environment import server_folder
    from reir_serving.ray.supervisor import ServerProcess, StatusMessage, ready_address

    # Signals and status messages arrive in one queue, so that one loop handles them in order. A
    # signal handler may call `SimpleQueue.put`, but not `Queue.put`, which could wait for itself.
    events: queue.SimpleQueue[int | StatusMessage] = queue.SimpleQueue()
    for number in (*STOP, signal.SIGHUP):
        signal.signal(number, lambda number, _: events.put(number))
    # The folder comes first, so that it is deleted only when no process of the server is left.
    with server_folder() as folder, ServerProcess(config, folder, events.put) as server:
        with messages().status("starting"):
            while (event := events.get()) == signal.SIGHUP and file is not None:
                _reload(server, file)  # the server process applies it as soon as it is ready
        if isinstance(event, int):
            return  # not ready yet, so there are no requests to finish
        address = ready_address(event)
        if as_json:
            print_json({"address": address, "pid": os.getpid()})
        else:
            typer.echo(f"ready: {address}  (press Ctrl-C to stop)")
        while (event := events.get()) not in STOP:
            if event == signal.SIGHUP and file is not None:
                _reload(server, file)
            elif isinstance(event, StatusMessage):
                messages().print(event.message())
            else:  # SIGHUP without a config file: the terminal was closed
                break
        messages().print("stopping: finishing open requests")
        server.stop(config.graceful_shutdown_timeout_s)


def _reload(server: ServerProcess, file: Path) -> None:
    """Read the config file again and apply its section `live`."""
    from reir.settings import load_settings
    from reir_serving.config import ServeConfig

    try:
        server.reconfigure(load_settings(SECTION, ServeConfig, extra_file=file).values.live)
    except ConfigError as error:  # the server keeps its settings
        messages().print(f"the settings were not reloaded: {error}")
