"""The parts of containers that need no runtime: what create requests say, names, ports, references, times, DNS."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest

from host_bridge.containers import create, ports, references, resolvconf, signals, times
from host_bridge.containers.errors import ContainerError
from host_bridge.containers.names import check_name, random_name
from host_bridge.docker_api import gojson
from host_bridge.docker_api.container_shapes import CONFIG, HOST_CONFIG, arguments
from host_bridge.docker_api.errors import DockerError
from host_bridge.ports import PortBinding
from taploom.contracts.taploom.runtime import v1 as runtime


def config(**fields: Any) -> dict[str, Any]:
    return gojson.zero(gojson.Struct("Config", CONFIG)) | {"Cmd": ["sleep"], "Image": "box"} | fields


def host(**fields: Any) -> dict[str, Any]:
    return gojson.zero(gojson.Struct("HostConfig", HOST_CONFIG)) | {"ConsoleSize": [0, 0]} | fields


def refusal(call: Any, *given: Any, **named: Any) -> tuple[int, str]:
    with pytest.raises(ContainerError) as caught:
        call(*given, **named)
    return caught.value.status, caught.value.message


# As dockerd 20.10 answers.
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"NetworkMode": "container:"}, "Invalid network mode: invalid container format container:<name|id>"),
        (
            {"NetworkMode": "host", "Links": ["a:b"]},
            "conflicting options: host type networking can't be used with links. "
            "This would result in undefined behavior",
        ),
        (
            {"NetworkMode": "container:web", "PortBindings": {"80/tcp": []}},
            "conflicting options: port publishing and the container type network mode",
        ),
        ({"PortBindings": {"80/tcp": [{"HostPort": "99999"}]}}, 'invalid port specification: "99999"'),
        ({"PortBindings": {"80/tcp": [{"HostPort": "90-80"}]}}, 'invalid port specification: "90-80"'),
        ({"PortBindings": {"x/tcp": [{"HostPort": "1"}]}}, 'invalid port specification: "x"'),
        ({"PortBindings": {"80-90/tcp": []}}, 'invalid port specification: "80-90"'),
        ({"RestartPolicy": {"Name": "foo", "MaximumRetryCount": 0}}, "invalid restart policy 'foo'"),
        (
            {"RestartPolicy": {"Name": "always", "MaximumRetryCount": 3}},
            "maximum retry count cannot be used with restart policy 'always'",
        ),
        (
            {"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": -3}},
            "maximum retry count cannot be negative",
        ),
        (
            {"RestartPolicy": {"Name": "always", "MaximumRetryCount": 0}, "AutoRemove": True},
            "can't create 'AutoRemove' container with restart policy",
        ),
        ({"ExtraHosts": ["foo"]}, 'bad format for add-host: "foo"'),
        ({"ExtraHosts": ["foo:bar"]}, 'invalid IP address in add-host: "bar"'),
        ({"Memory": 1000}, "Minimum memory limit allowed is 6MB"),
        ({"ShmSize": -1}, "SHM size can not be less than 0"),
        ({"Tmpfs": {"x": ""}}, "invalid mount path: 'x' mount path must be absolute"),
    ],
)
def test_host_configs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    assert refusal(create.check, config(), host(**fields), (1, 41)) == (400, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Env": ["=x"]}, "invalid environment variable: =x"),
        ({"Env": [""]}, "invalid environment variable: "),
        ({"StopSignal": "FOO"}, "Invalid signal: FOO"),
        ({"WorkingDir": "rel"}, "the working directory 'rel' is invalid, it needs to be an absolute path"),
    ],
)
def test_configs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    assert refusal(create.check, config(**fields), host(), (1, 41)) == (400, message)


def test_defaults_of_a_host_config() -> None:
    given = host(
        CapAdd=["net_admin", "CAP_SYS_TIME"], CapDrop=["all", "CHOWN"], NetworkMode="host", PortBindings={"80/tcp": []}
    )
    warnings = create.prepare_host(given, config())
    assert warnings == ["Published ports are discarded when using host network mode"]
    assert given["CapAdd"] == ["CAP_NET_ADMIN", "CAP_SYS_TIME"]
    assert given["CapDrop"] == ["ALL"]
    assert (given["ShmSize"], given["IpcMode"], given["LogConfig"]["Type"]) == (64 << 20, "private", "json-file")
    assert "/proc/kcore" in given["MaskedPaths"]
    assert refusal(create.prepare_host, host(CapAdd=["FOO"]), config()) == (
        400,
        'invalid CapAdd: unknown capability: "CAP_FOO"',
    )


def test_what_an_image_adds() -> None:
    image = runtime.Image(
        config=runtime.ImageConfig(
            command=["run"],
            entrypoint=["/init"],
            environment=["A=1", "B=2"],
            labels={"x": "image", "y": "image"},
            exposed_ports=["80/tcp"],
            working_directory="/srv",
            stop_signal="SIGINT",
        )
    )
    bare = config(Cmd=None, Env=["A=9"], Labels={"x": "own"})
    create.merge_image(bare, image)
    assert create.command(bare) == ["/init", "run"]
    assert bare["Env"] == ["A=9", "B=2"]
    assert bare["Labels"] == {"x": "own", "y": "image"}
    assert (bare["ExposedPorts"], bare["WorkingDir"], bare["StopSignal"]) == ({"80/tcp": {}}, "/srv", "SIGINT")
    own = config(Cmd=None, Entrypoint=["sh"])
    create.merge_image(own, image)
    # With an entrypoint of one's own, the image's arguments do not count.
    assert create.command(own) == ["sh"]
    cleared = config(Cmd=["x"], Entrypoint=[""])
    create.merge_image(cleared, image)
    assert create.command(cleared) == ["x"]
    assert refusal(create.merge_image, config(Cmd=None), runtime.Image()) == (400, "No command specified")


def test_environment() -> None:
    assert create.environment(config(Env=["A=1", "HOSTNAME=mine"], Tty=True), "h", ["L=1"]) == [
        f"PATH={create.DEFAULT_PATH}",
        "HOSTNAME=mine",
        "TERM=xterm",
        "L=1",
        "A=1",
    ]
    assert create.merged_environment(["A=1", "B=2"], ["A"]) == ["B=2"]


def test_mounts() -> None:
    found = create.mounts(host(Binds=["/tmp:/mnt/:ro"], Tmpfs={"/t": ""}))
    assert [(one["Type"], one["Source"], one["Destination"], one["RW"]) for one in found] == [
        ("bind", "/tmp", "/mnt", False),
        ("tmpfs", "", "/t", True),
    ]
    assert refusal(create.mounts, host(Binds=["/tmp:/x", "/tmp:/x"])) == (400, "Duplicate mount point: /x")
    assert refusal(create.mounts, host(Binds=["/tmp:/x:foo"])) == (500, "invalid mode: foo")
    assert refusal(create.mounts, host(Binds=["/a:b"]))[1].endswith(
        "invalid mount path: 'b' mount path must be absolute"
    )
    assert refusal(create.mounts, host(Binds=["data:/x"]))[0] == 501
    mount = {"Type": "bind", "Source": "/nosuch-source", "Target": "/x", "ReadOnly": False}
    assert refusal(create.mounts, host(Mounts=[mount])) == (
        400,
        'invalid mount config for type "bind": bind source path does not exist: /nosuch-source',
    )


def test_first_networks() -> None:
    names = {"app": "app", "1234": "app", "back": "back"}.get
    endpoint = {"IPAMConfig": None, "Links": None, "Aliases": ["a"], "DriverOpts": None}

    def networks(mode: str, version: tuple[int, ...] = (1, 44), **given: Any) -> list[str]:
        return list(create.initial_networks({"NetworkMode": mode}, {"EndpointsConfig": given or None}, version, names))

    assert networks("default") == ["bridge"]
    assert networks("1234") == ["app"]
    assert networks("gone") == ["gone"]
    assert networks("container:web") == []
    assert networks("back", app=endpoint, back=endpoint) == ["back", "app"]
    assert networks("default", (1, 41), app=endpoint) == ["app"]
    assert networks("default", app=endpoint) == ["bridge", "app"]
    message = "Container cannot be connected to network endpoints: app, back"
    assert refusal(networks, "app", (1, 43), app=endpoint, back=endpoint) == (400, message)


def test_published_ports() -> None:
    exposed = config(ExposedPorts={"80/tcp": {}, "53/udp": {}, "x": {}, "99999/tcp": {}, "81": {}})
    assert ports.exposed(exposed) == ["53/udp", "80/tcp", "81/tcp"]
    bindings = {
        "80/tcp": [{"HostIp": "", "HostPort": "8000-8010"}, {"HostIp": "127.0.0.1", "HostPort": ""}],
        # Not exposed: dockerd publishes no such port.
        "90/tcp": [{"HostIp": "", "HostPort": "90"}],
    }
    assert ports.wanted(exposed, host(PortBindings=bindings), "10.0.0.1") == [
        PortBinding(80, "tcp", "10.0.0.1", 8000, 8010),
        PortBinding(80, "tcp", "127.0.0.1", 0, 0),
    ]
    everything = ports.wanted(exposed, host(PublishAllPorts=True), "")
    assert [(one.container_port, one.protocol, one.host_port) for one in everything] == [
        (53, "udp", 0),
        (80, "tcp", 0),
        (81, "tcp", 0),
    ]


def test_names() -> None:
    assert check_name("/web") == "web"
    for bad in ("x", "a/b", "-a", " ", ""):
        message = f"Invalid container name ({bad}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        assert refusal(check_name, bad) == (400, message)
    tried: list[str] = []

    def taken(name: str) -> bool:
        tried.append(name)
        return len(tried) < 20

    name = random_name(taken)
    assert name == tried[-1]
    assert all(re.fullmatch(r"[a-z]+_[a-z_]+[0-9]*", one) for one in tried)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("box", ("box", "")),
        ("box:1.0", ("box", "1.0")),
        ("docker.io/library/box:1", ("box", "1")),
        ("localhost:5000/a/b", ("localhost:5000/a/b", "")),
    ],
)
def test_references(text: str, parsed: tuple[str, str]) -> None:
    assert references.parse(text) == parsed


def test_references_that_are_none() -> None:
    assert refusal(references.parse, "UPPER:x")[1] == "invalid reference format: repository name must be lowercase"
    for bad in ("", "a b", "x:1@y", "a" * 64, ":x"):
        assert refusal(references.parse, bad)[0] == 400
    assert references.with_tag("box") == "box:latest"
    assert references.with_tag("sha256:12ab") == "sha256:12ab"


def test_signals() -> None:
    assert [signals.parse_signal(text) for text in ("KILL", "SIGKILL", "sigkill", "9", "RTMIN+3")] == [9, 9, 9, 9, 37]
    assert refusal(signals.parse_signal, "FOO") == (400, "Invalid signal: FOO")
    assert refusal(signals.check_supported, 99) == (500, "The linux daemon does not support signal 99")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "About a minute"),
        (150, "2 minutes"),
        (3600, "About an hour"),
        (3 * 3600, "3 hours"),
        (3 * 86400, "3 days"),
        (30 * 86400, "4 weeks"),
        (100 * 86400, "3 months"),
        (800 * 86400, "2 years"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert times.human(seconds) == text


def test_times() -> None:
    assert times.from_ns(1_700_000_000_120_000_000) == "2023-11-14T22:13:20.12Z"
    assert times.to_ns("2023-11-14T22:13:20.12Z") == 1_700_000_000_120_000_000
    assert times.to_ns(times.ZERO) == 0
    moment = datetime.datetime(2023, 11, 14, 22, 13, 20, 120000, datetime.UTC)
    assert times.from_datetime(moment) == "2023-11-14T22:13:20.12Z"
    assert times.fixed(moment) == "2023-11-14T22:13:20.120000000Z"
    assert times.from_datetime(None) == times.ZERO


def test_host_resolver() -> None:
    found = resolvconf.parse(
        "# comment\nnameserver 127.0.0.53\nnameserver 10.0.0.1 # inner\nnameserver fe80::1%eth0\n"
        "nameserver 2001:db8::1\n"
        "domain old.test\nsearch a.test b.test\noptions ndots:2 edns0\noptions rotate\n"
    )
    assert found.servers == ("10.0.0.1", "2001:db8::1")
    assert found.search == ("a.test", "b.test")
    assert found.options == ("ndots:2", "edns0", "rotate")
    assert resolvconf.parse("search .\n").search == ()


def test_links() -> None:
    assert create.parse_link("db") == ("db", "db")
    assert create.parse_link("db:data") == ("db", "data")
    assert create.parse_link("/db:/web/data") == ("/db", "data")
    assert refusal(create.parse_link, "a:b:c") == (500, "bad format for links: a:b:c")
    assert refusal(create.parse_link, "") == (500, "empty string specified for links")


def test_commands() -> None:
    assert arguments("one", "f") == ["one"]
    assert arguments(["a", "b"], "f") == ["a", "b"]
    assert arguments(None, "f") is None
    with pytest.raises(DockerError) as caught:
        arguments(7, "ContainerConfigWrapper.Cmd")
    assert "cannot unmarshal number into Go struct field ContainerConfigWrapper.Cmd of type string" in str(caught.value)
