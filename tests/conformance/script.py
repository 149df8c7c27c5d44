"""The language that the steps are written in.

A scenario is a list of steps that starts from nothing and ends with everything removed. Words in angle brackets are
symbols: given by the side (`<host>`, `<internet>`), or captured by an earlier step; `<pool:NETWORK>` is the first three
numbers of the subnet that a network was given, because which pool is the next free one depends on what was there
before. In what a step answers, captured values are written as their symbols again, so that "the id that create printed
is the one that inspect shows" is compared.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from engines import COMPOSE, IMAGE, Engine
from machine import run

COMPOSE_FILES = Path(__file__).parent / "compose"
# What either side takes from its pools; steps that name a subnet name others.
_POOL = re.compile(r"(172\.(1[89]|2\d|3[01])|10\.(12[89]|1[3-9]\d|2\d\d))\.0\.0/16$")

Kind = Literal["cli", "compose", "api", "inside", "host", "internet", "mark", "serve"]


@dataclass(frozen=True)
class Step:
    """One thing to do, and what of its answer is kept."""

    kind: Kind
    title: str
    argv: tuple[str, ...] = ()
    method: str = ""
    path: str = ""
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    input: str = ""
    capture: str = ""  # a symbol for what was printed, or for `capture_path` in the JSON answer
    capture_path: tuple[str | int, ...] = ()
    until: bool = False  # repeated until it succeeds: for what takes a moment in the container, such as its server
    newest: bool = False  # the client uses the newest version that both know instead of 1.41
    unordered: bool = False  # the lines' order means nothing
    show: tuple[str, ...] = ()  # response headers that are compared
    silent: bool = False  # only success is compared
    ignored: bool = False  # nothing is compared: it clears up after a step that is


@dataclass
class Result:
    """What a step answered on one side, before it is normalised."""

    exit: int
    stdout: str = ""
    stderr: str = ""
    document: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Scenario:
    """Steps that belong together."""

    name: str
    steps: list[Step] = field(default_factory=list)
    # True: slow, and leaves nothing behind. It runs beside the others.
    background: bool = False

    def cli(self, command: str | Sequence[str], **options: Any) -> None:
        """`docker COMMAND`: exit code, standard output (as JSON when it is), standard error."""
        argv = tuple(shlex.split(command) if isinstance(command, str) else command)
        self.steps.append(Step("cli", "docker " + shlex.join(argv), argv, **options))

    def run(self, options: str, command: str = "sleep 86400", **more: Any) -> None:
        """`docker run -d OPTIONS IMAGE COMMAND`."""
        self.cli(f"run -d {options} {IMAGE} {command}", **more)

    def api(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        version: str = "v1.41",
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """A request: status and answer. `raw` is a body that need not be JSON; no version: the newest."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if data is not None and headers is None else headers or {}
        full = f"/{version}{path}" if version else path
        title = f"{method} {full}" + (f" {data.decode(errors='replace')}" if data is not None else "")
        if headers:
            title += f" {headers}"
        self.steps.append(Step("api", title, (), method, full, data, tuple(given.items()), **options))

    def compose(self, file: str, command: str, **options: Any) -> None:
        """`docker compose -f FILE COMMAND`; the files are in compose/."""
        argv = ("-f", str(COMPOSE_FILES / file), "--ansi", "never", "--progress", "quiet", *shlex.split(command))
        self.steps.append(Step("compose", f"docker compose -f {file} {command}", argv, **options))

    def inside(self, container: str, command: str, **options: Any) -> None:
        """A command in a container."""
        argv = ("exec", container, *shlex.split(command))
        self.steps.append(Step("inside", f"in {container}: {command}", argv, **options))

    def host(self, command: str, **options: Any) -> None:
        """A command of the image on the host."""
        self.steps.append(Step("host", f"on the host: {command}", tuple(shlex.split(command)), **options))

    def internet(self, command: str, **options: Any) -> None:
        """A command of the image on the internet."""
        self.steps.append(Step("internet", f"on the internet: {command}", tuple(shlex.split(command)), **options))

    def serve(self, where: Literal["host", "internet"], command: str) -> None:
        """Starts a server of the image on the host or the internet, for this scenario."""
        self.steps.append(Step("serve", f"{where} serves: {command}", (where, *shlex.split(command))))

    def mark(self, symbol: str) -> None:
        """The time, for --since and --until."""
        self.steps.append(Step("mark", f"the time is <{symbol}>", (), capture=symbol))


class Performer:
    """Does steps on one side."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.symbols = engine.symbols()
        self._servers: list[Any] = []

    def perform(self, step: Step) -> Result:
        """Does one step."""
        deadline = time.monotonic() + 30
        while True:
            result = self._once(step)
            if not step.until or result.exit in (0, 200) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if step.capture and step.kind != "mark":
            self.symbols[step.capture] = _captured(result, step.capture_path)
        if step.kind == "cli" and step.argv[:2] == ("network", "create") and result.exit == 0:
            self._learn_pool(step.argv[-1])
        elif step.path.endswith("/networks/create") and result.exit == 201:
            self._learn_pool(self._engine.api("GET", f"/networks/{result.document['Id']}")["Name"])
        return result

    def _learn_pool(self, network: str) -> None:
        answer = self._engine.request("GET", f"/networks/{quote(self.substitute(network), safe='')}")
        if answer.status != 200:
            return
        for config in answer.json()["IPAM"]["Config"] or ():
            subnet = config["Subnet"]
            if _POOL.match(subnet):
                pool = subnet.rpartition(".")[0]
                self.symbols = {symbol: value for symbol, value in self.symbols.items() if value != pool}
                self.symbols[f"pool:{network}"] = pool

    def close(self) -> None:
        """Ends the scenario's servers."""
        for server in self._servers:
            server.kill()
            server.wait()

    def substitute(self, text: str) -> str:
        """The text with this side's values for the symbols."""
        for symbol, value in self.symbols.items():
            text = text.replace(f"<{symbol}>", value).replace(f"<{symbol}:12>", value[:12])
        return text

    def _once(self, step: Step) -> Result:
        argv = [self.substitute(word) for word in step.argv]
        if step.kind == "mark":
            self.symbols[step.capture] = f"{time.time():.6f}"
            return Result(0)
        if step.kind == "serve":
            enter = self._engine.on_host if argv[0] == "host" else self._engine.beyond
            self._servers.append(self._engine.machine.spawn(*enter(*argv[1:]), log="servers.log"))
            return Result(0)
        if step.kind == "api":
            body = None if step.body is None else self.substitute(step.body.decode("latin-1")).encode("latin-1")
            try:
                answer = self._engine.request(step.method, self.substitute(step.path), body, dict(step.headers))
            except (OSError, ValueError) as error:
                return Result(-1, stderr=f"{type(error).__name__}: {error}")
            shown = {name: answer.headers.get(name, "") for name in step.show}
            return Result(answer.status, answer.body.decode(errors="replace"), "", document(answer.body), shown)
        if step.kind in ("host", "internet"):
            enter = self._engine.on_host if step.kind == "host" else self._engine.on_internet
            done = run(enter(*argv), timeout=20)
        elif step.kind == "compose":
            done = run([COMPOSE, *argv], environment=self._engine.environment(), timeout=90)
        else:
            version = {} if step.newest else {"DOCKER_API_VERSION": "1.41"}
            done = self._engine.cli(*argv, input=step.input, **version)
        return Result(done.returncode, done.stdout, done.stderr, document(done.stdout.encode()))


def document(data: bytes) -> Any:
    """The JSON that this is: one value, or a list of one per line; None when it is none."""
    text = data.strip()
    if text[:1] not in (b"{", b"["):
        return None
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines()]
    except ValueError:
        return None


def _captured(result: Result, path: tuple[str | int, ...]) -> str:
    if not path:
        return result.stdout.strip()
    value = result.document
    try:
        for part in path:
            value = value[part]
    except (KeyError, IndexError, TypeError):
        return f"nothing at {path}"
    return str(value)
