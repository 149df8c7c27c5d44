"""The libraries that people drive Docker with: aiodocker's own tests, and docker-py's network calls."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from comparison import Pair
from docker.errors import APIError, NotFound
from docker.types import IPAMConfig, IPAMPool
from docker_cli import CACHE
from engines import IMAGE, Engine
from machine import run

pytestmark = pytest.mark.system
_HERE = Path(__file__).parent


def test_aiodocker_network_tests(pair: Pair) -> None:
    version = re.search(r"aiodocker==(\S+)", (_HERE / "aiodocker.lock").read_text())
    assert version
    source = CACHE / f"aiodocker-{version[1]}"
    # The image that its tests name; nothing of it is run.
    pair.ours.must("import", "--change", 'CMD ["python3"]', str(pair.ours.root.with_suffix(".tar")), "python")
    try:
        result = run(
            [
                *(sys.executable, "-m", "pytest", "-o", "addopts=", "-o", "filterwarnings=", "-o", "asyncio_mode=auto"),
                *(
                    "--noconftest",
                    "-p",
                    "aiodocker_fixtures",
                    "-p",
                    "no:trio",
                    "-p",
                    "no:cacheprovider",
                    "--rootdir",
                    str(source),
                ),
                str(source / "tests/test_networks.py"),
            ],
            environment=pair.ours.environment(PYTHONPATH=str(_HERE), PYTHONDONTWRITEBYTECODE="1"),
            timeout=60,
        )
    finally:
        pair.ours.must("rmi", "python")
    assert result.returncode == 0, f"{result.stdout[-4000:]}{result.stderr[-2000:]}{pair.ours.logs()}"
    assert re.search(r"\b6 passed", result.stdout), result.stdout
    assert "skipped" not in result.stdout


@pytest.fixture
def ours(pair: Pair) -> Iterator[Engine]:
    yield pair.ours
    pair.ours.clean()


def test_docker_py_networks(ours: Engine) -> None:
    """Every call for networks that docker-py has."""
    client = docker.DockerClient(base_url=f"unix://{ours.socket}", version="auto", timeout=40)
    try:
        pool = IPAMPool(
            "10.77.0.0/24", iprange="10.77.0.128/25", gateway="10.77.0.1", aux_addresses={"kept": "10.77.0.200"}
        )
        network = client.networks.create(
            "py-net",
            driver="bridge",
            options={"com.docker.network.driver.mtu": "1400"},
            ipam=IPAMConfig(driver="default", pool_configs=[pool], options={"a": "b"}),
            check_duplicate=True,
            internal=False,
            labels={"made": "here"},
            enable_ipv6=False,
            attachable=True,
            scope="local",
        )
        inner = client.networks.create("py-inner", internal=True, labels={"kind": "inner"})
        network.reload()
        assert network.attrs["IPAM"]["Config"] == [
            {
                "Subnet": "10.77.0.0/24",
                "IPRange": "10.77.0.128/25",
                "Gateway": "10.77.0.1",
                "AuxiliaryAddresses": {"kept": "10.77.0.200"},
            }
        ]
        assert network.attrs["IPAM"]["Options"] == {"a": "b"}
        assert network.attrs["Labels"] == {"made": "here"}
        assert network.attrs["Attachable"] is True
        with pytest.raises(APIError, match="already exists"):
            client.networks.create("py-net", check_duplicate=True)

        assert {n.name for n in client.networks.list()} == {"bridge", "host", "none", "py-net", "py-inner"}
        assert [n.name for n in client.networks.list(names=["py-net"])] == ["py-net"]
        assert [n.id for n in client.networks.list(ids=[network.id])] == [network.id]
        assert [n.name for n in client.networks.list(filters={"label": "made=here"})] == ["py-net"]
        assert {n.name for n in client.networks.list(filters={"driver": "bridge", "type": "custom"})} == {
            "py-net",
            "py-inner",
        }
        assert client.networks.get("py-net").id == network.id
        assert client.networks.get(network.short_id).id == network.id
        assert client.networks.get("py-net", verbose=True, scope="local").id == network.id
        with pytest.raises(NotFound):
            client.networks.get("py-nosuch")

        container = client.containers.run(IMAGE, ["sleep", "86400"], detach=True, name="py-one", network="py-inner")
        network.connect(container, aliases=["first"], ipv4_address="10.77.0.130", links=[("py-one", "me")])
        container.reload()
        attached = container.attrs["NetworkSettings"]["Networks"]["py-net"]
        assert attached["IPAddress"] == "10.77.0.130"
        assert "first" in attached["Aliases"]
        network.reload()
        assert [c.name for c in network.containers] == ["py-one"]
        assert [n.name for n in client.networks.list(greedy=True) if n.containers] != []
        assert container.exec_run(["addresses"]).output.count(b"inet ") == 2
        with pytest.raises(APIError, match="active endpoints"):
            network.remove()
        network.disconnect("py-one")
        with pytest.raises(APIError, match="is not connected to"):
            network.disconnect(container)
        low = client.api.create_networking_config({"py-net": client.api.create_endpoint_config(aliases=["low"])})
        second = client.api.create_container(IMAGE, ["sleep", "86400"], name="py-two", networking_config=low)
        client.api.start(second)
        assert (
            client.api.inspect_container(second)["NetworkSettings"]["Networks"]["py-net"]["IPAddress"] == "10.77.0.128"
        )
        client.api.remove_container(second, force=True)
        network.remove()
        with pytest.raises(NotFound):
            network.reload()
        container.remove(force=True)
        assert client.networks.prune(filters={"label": "nosuch"})["NetworksDeleted"] in (None, [])
        assert client.networks.prune()["NetworksDeleted"] == ["py-inner"]
        with pytest.raises(NotFound):
            inner.reload()
    finally:
        client.close()


def test_docker_py_containers(ours: Engine) -> None:
    """Containers from docker-py: run with output, ports, exec streams, logs, wait, kill, rename, events."""
    client = docker.DockerClient(base_url=f"unix://{ours.socket}", version="auto", timeout=40)
    try:
        assert client.containers.run(IMAGE, ["echo", "said"], remove=True) == b"said\n"
        with pytest.raises(docker.errors.ContainerError) as failed:
            client.containers.run(IMAGE, ["sh", "-c", "echo wrong >&2; exit 3"], remove=True)
        assert failed.value.exit_status == 3
        assert b"wrong" in (failed.value.stderr or b"")
        events = client.events(decode=True, filters={"container": "py-web"})
        web = client.containers.run(
            IMAGE,
            ["serve"],
            detach=True,
            name="py-web",
            ports={"80/tcp": None, "81/udp": ("127.0.0.1", 8998)},
            extra_hosts={"a.test": "192.0.2.5"},
            hostname="pyhost",
            environment={"A": "1"},
            labels={"l": "1"},
        )
        assert [next(events)["Action"] for _ in range(2)] == ["create", "start"]
        events.close()
        web.reload()
        assert web.ports["81/udp"] == [{"HostIp": "127.0.0.1", "HostPort": "8998"}]
        assert int(web.ports["80/tcp"][0]["HostPort"]) > 1024
        code, (out, err) = web.exec_run(["sh", "-c", "echo o; echo e >&2; echo $A"], demux=True)
        assert (code, out, err) == (0, b"o\n1\n", b"e\n")
        assert web.exec_run(["false"]).exit_code == 1
        assert b"192.0.2.5\ta.test" in web.exec_run(["cat", "/etc/hosts"]).output
        web.rename("py-web2")
        assert [c.name for c in client.containers.list(filters={"name": "py-web"})] == ["py-web2"]
        web.restart(timeout=0)
        web.kill()
        assert web.wait()["StatusCode"] == 137
        assert web.logs() is not None
        web.remove()
        with pytest.raises(NotFound):
            client.containers.get("py-web2")
    finally:
        client.close()
