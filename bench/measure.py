"""The measurements: what runs on a link, and in which order."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as FilePath

from bench.paths import IPERF_PORT, PROBE_PORT, HotConnect, How, Link, Path, Published
from bench.processes import CpuTimes, busy_cpus
from bench.run import BenchError, Netns, Run, wait_for

UDP_PAYLOAD = 64
LOSS_LIMIT = 0.01


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: how often everything is measured, each time on every link before the next time.
        tcp_seconds: seconds of iperf3 that count, after `tcp_omit` seconds of slow start.
        bulk_bytes: the fixed transfer for CPU-seconds per GB.
        probes: round trips per round and protocol, one every 2 ms.
        flood_ms: milliseconds of one UDP trial.
        flood_trials: trials that search the highest rate with less than 1 % loss.
        idle_seconds: seconds for the idle machine's CPU use.
        connects: hot connects per path and way.
        callers: clients that connect to a published port at once, each again and again.
        rate_ms: milliseconds for which they do.
    """

    rounds: int
    tcp_seconds: int
    tcp_omit: int
    bulk_bytes: int
    probes: int
    flood_ms: int
    flood_trials: int
    idle_seconds: float
    connects: int
    callers: int
    rate_ms: int


FULL = Plan(5, 4, 1, 2_000_000_000, 1000, 500, 8, 2.0, 20, 8, 2000)
QUICK = Plan(1, 1, 0, 100_000_000, 200, 150, 4, 0.5, 3, 8, 500)


@dataclass
class LinkResult:
    """A link's figures; a list has one per round.

    Attributes:
        tcp_gbps: Gb/s (10^9 bit) that iperf3's receiver got in one stream.
        cpu_s_per_gb: CPU-seconds of the whole machine, idle use taken off, per 10^9 bytes.
        udp_pps: the highest rate of 64-byte payloads with less than 1 % loss, packets/s.
        udp_flood_pps: packets/s that arrived when the sender sent as fast as it could.
        udp_rtt_ms, icmp_rtt_ms: every round trip of every round.
        rtt_lost: round trips without an answer.
    """

    path: str
    mtu: int
    tcp_gbps: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)
    udp_pps: list[float] = field(default_factory=list)
    udp_flood_pps: list[float] = field(default_factory=list)
    udp_rtt_ms: list[float] = field(default_factory=list)
    icmp_rtt_ms: list[float] = field(default_factory=list)
    rtt_lost: int = 0


@dataclass
class HotResult:
    """Hot connects: milliseconds from the call to the peer's first reply, and to the call's return.

    `unanswered` counts those without any reply within 10 s.
    """

    path: str
    how: How
    unanswered: int = 0
    first_reply_ms: list[float] = field(default_factory=list)
    returned_ms: list[float] = field(default_factory=list)


@dataclass
class PublishedResult:
    """A published port's figures, connected to on the host's loopback; a list has one per round.

    Attributes:
        tcp_gbps: Gb/s into the container that iperf3's receiver got in one stream.
        reverse_gbps: as much out of it.
        connections: connections per second, each with a request and an answer.
        failed: connections that failed, of all rounds.
    """

    path: str
    tcp_gbps: list[float] = field(default_factory=list)
    reverse_gbps: list[float] = field(default_factory=list)
    connections: list[float] = field(default_factory=list)
    failed: int = 0


@dataclass
class MemoryResult:
    """A process's memory after the load, in bytes: VmRSS, its proportional share (PSS) and VmHWM; proc(5)."""

    path: str
    process: str
    pid: int
    rss: int
    pss: int
    peak: int


@dataclass
class Results:
    """What a run measured.

    Attributes:
        failures: what did not work, one line each; its figure is missing.
        stolen: the share of CPU time that the hypervisor gave to others meanwhile.
    """

    links: list[LinkResult] = field(default_factory=list)
    hot: list[HotResult] = field(default_factory=list)
    published: list[PublishedResult] = field(default_factory=list)
    memory: list[MemoryResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    idle_cpus: list[float] = field(default_factory=list)
    stolen: float = 0.0
    seconds: float = 0.0


class Bench:
    """Measures paths that are up."""

    def __init__(self, run: Run, plan: Plan, paths: list[Path], progress: Callable[[str, str], None]) -> None:
        """`progress(step, outcome)` is called before a step with no outcome, and after it with one."""
        self._run, self._plan, self._paths, self._progress = run, plan, paths, progress
        self._links = [link for path in paths for link in path.links]
        self._published = [(path.published, PublishedResult(path.name)) for path in paths if path.published]
        self._results = Results(
            [LinkResult(link.path, link.mtu) for link in self._links],
            published=[result for _, result in self._published],
        )

    @property
    def steps(self) -> int:
        """How many steps `measure` reports."""
        full = [link for link in self._links if _is_first(link, self._paths)]
        per_round = 2 * len(self._links) + 3 * len(full) + 3 * len(self._published)
        return per_round * self._plan.rounds + 2 * len([path for path in self._paths if path.hot])

    def measure(self) -> Results:
        """Measures everything.

        Raises:
            BenchError: a link does not work from the start. What fails later is in `Results.failures`.
        """
        began, times = time.monotonic(), CpuTimes.now()
        servers = [link.server for link in self._links] + [published.server for published, _ in self._published]
        for netns in dict.fromkeys(servers):
            self._run.spawn_ready(*netns.command(*self._run.netprobe("serve", PROBE_PORT)), name="netprobe")
            self._run.spawn(*netns.command("iperf3", "--server", "--port", IPERF_PORT), name="iperf3-server")
            wait_for(lambda netns=netns: self._listens(netns), "iperf3 listens")  # type: ignore[misc]
        for link in self._links:
            self._run.check(*link.client.command("ping", "-n", "-c", "3", "-i", "0.05", "-W", "5", link.address))
        for number in range(self._plan.rounds):
            self._round(number)
        for path in self._paths:
            if path.hot:
                self._hot(path.name, path.hot, "API")
                self._hot(path.name, path.hot, "CLI")
        for path in self._paths:
            self._results.memory += [_memory(path.name, process.label, process.pid) for process in path.processes()]
        self._results.stolen = times.stolen_since()
        self._results.seconds = time.monotonic() - began
        return self._results

    def _listens(self, netns: Netns) -> bool:
        return f":{IPERF_PORT}" in self._run.check(*netns.command("ss", "-Hltn"))

    def _round(self, number: int) -> None:
        """One round: each measurement on every link in turn, so that a noisy moment hits all paths alike."""
        pairs = list(zip(self._links, self._results.links, strict=True))
        turned = pairs[number % len(pairs) :] + pairs[: number % len(pairs)]
        first = [(link, result) for link, result in turned if _is_first(link, self._paths)]
        idle = busy_cpus(self._plan.idle_seconds)
        self._results.idle_cpus.append(idle)
        prefix = f"round {number + 1}/{self._plan.rounds}"
        for link, result in turned:
            self._step(f"{prefix}: TCP {link.name}", lambda: self._tcp(link, result))  # noqa: B023 -- called at once
        for link, result in turned:
            self._step(f"{prefix}: CPU per GB {link.name}", lambda: self._bulk(link, result, idle))  # noqa: B023
        for link, result in first:
            self._step(f"{prefix}: UDP round trip {link.name}", lambda: self._udp_rtt(link, result))  # noqa: B023
        for link, result in first:
            self._step(f"{prefix}: ICMP round trip {link.name}", lambda: self._icmp_rtt(link, result))  # noqa: B023
        for link, result in first:
            self._step(f"{prefix}: UDP packets {link.name}", lambda: self._packets(link, result))  # noqa: B023
        for published, figures in self._published:
            name = f"published by {figures.path}"
            self._step(f"{prefix}: TCP into {name}", lambda: self._into(published, figures))  # noqa: B023
            self._step(f"{prefix}: TCP out of {name}", lambda: self._out_of(published, figures))  # noqa: B023
            self._step(f"{prefix}: connections {name}", lambda: self._rate(published, figures))  # noqa: B023

    def _step(self, name: str, action: Callable[[], str]) -> None:
        self._progress(name, "")
        try:
            outcome = action()
        except (BenchError, OSError) as error:  # click would take a broken pipe for its own, and end without a word
            self._results.failures.append(f"{name}: {error}")
            outcome = f"FAILED: {error}"
        self._progress(name, outcome)

    def _probe(self, netns: Netns, *argv: str) -> dict[str, float]:
        answer: dict[str, float] = json.loads(self._run.check(*netns.command(*self._run.netprobe(*argv))))
        return answer

    def _tcp(self, link: Link, result: LinkResult) -> str:
        result.tcp_gbps.append(self._iperf(link.client, link.address, IPERF_PORT))
        return f"{result.tcp_gbps[-1]:.2f} Gb/s"

    def _iperf(self, netns: Netns, address: str, port: str, *options: str) -> float:
        """Gb/s that iperf3's receiver got."""
        report = json.loads(
            self._run.check(
                *netns.command("iperf3", "--client", address, "--port", port, "--json", *options),
                *("--time", str(self._plan.tcp_seconds), "--omit", str(self._plan.tcp_omit)),
            )
        )
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9

    def _into(self, published: Published, result: PublishedResult) -> str:
        result.tcp_gbps.append(self._iperf(published.client, "127.0.0.1", published.ports[IPERF_PORT]))
        return f"{result.tcp_gbps[-1]:.2f} Gb/s"

    def _out_of(self, published: Published, result: PublishedResult) -> str:
        port = published.ports[IPERF_PORT]
        result.reverse_gbps.append(self._iperf(published.client, "127.0.0.1", port, "--reverse"))
        return f"{result.reverse_gbps[-1]:.2f} Gb/s"

    def _rate(self, published: Published, result: PublishedResult) -> str:
        plan = (str(self._plan.callers), str(self._plan.rate_ms))
        answer = self._probe(published.client, "rate", "127.0.0.1", published.ports[PROBE_PORT], *plan)
        result.connections.append(answer["connections"] / (answer["elapsed_ns"] / 1e9))
        result.failed += int(answer["failed"])
        return f"{result.connections[-1]:.0f} connections/s, {answer['failed']:.0f} failed"

    def _bulk(self, link: Link, result: LinkResult, idle: float) -> str:
        answer = self._probe(link.client, "bulk", link.address, PROBE_PORT, str(self._plan.bulk_bytes))
        seconds = answer["busy_ns"] / 1e9 - idle * answer["elapsed_ns"] / 1e9
        result.cpu_s_per_gb.append(max(seconds, 0.0) / (answer["bytes"] / 1e9))
        return f"{result.cpu_s_per_gb[-1]:.2f} CPU-s/GB"

    def _udp_rtt(self, link: Link, result: LinkResult) -> str:
        count = self._plan.probes
        command = self._run.netprobe("rtt", link.address, PROBE_PORT, str(count), "2000")
        answer = json.loads(self._run.check(*link.client.command(*command)))
        samples = [ns / 1e6 for ns in answer["rtt_ns"]]
        return self._round_trips(result, result.udp_rtt_ms, samples)

    def _icmp_rtt(self, link: Link, result: LinkResult) -> str:
        output = self._run.check(
            *link.client.command("ping", "-n", "-i", "0.002", "-c", str(self._plan.probes), link.address)
        )
        samples = [float(ms) for ms in re.findall(r"time=([\d.]+) ms", output)]
        return self._round_trips(result, result.icmp_rtt_ms, samples)

    def _round_trips(self, result: LinkResult, all_samples: list[float], samples: list[float]) -> str:
        if not samples:
            raise BenchError(f"no answer on {result.path}-{result.mtu}")
        all_samples += samples
        result.rtt_lost += self._plan.probes - len(samples)
        return f"p50 {statistics.median(samples):.3f} ms"

    def _packets(self, link: Link, result: LinkResult) -> str:
        """Searches the highest rate with less than 1 % loss, between nothing and what the sender can send at all."""

        def trial(rate: float) -> tuple[float, float, float]:
            answer = self._probe(
                link.client,
                *("flood", link.address, PROBE_PORT, str(UDP_PAYLOAD), str(int(rate)), str(self._plan.flood_ms)),
            )
            sent, received = answer["sent"], answer["received"]
            seconds = answer["send_ns"] / 1e9
            arriving = max(answer["receive_ns"] / 1e9, seconds)
            return sent / seconds, received / arriving, 1 - received / max(sent, 1)

        offered, delivered, loss = trial(0)
        result.udp_flood_pps.append(delivered)
        best = delivered if loss < LOSS_LIMIT else 0.0
        low, high = best, offered
        rate = delivered * 0.9
        for _ in range(self._plan.flood_trials if not best else 0):
            _, delivered, loss = trial(rate)
            if loss < LOSS_LIMIT:
                low, best = rate, max(best, delivered)
            else:
                high = rate
            rate = (low * high) ** 0.5 if low else high / 2
        result.udp_pps.append(best)
        return f"{best / 1e3:.1f} kpps with < 1 % loss, {result.udp_flood_pps[-1] / 1e3:.1f} flooded"

    def _hot(self, name: str, hot: HotConnect, how: How) -> None:
        result = HotResult(name, how)
        self._results.hot.append(result)

        def connects() -> str:
            for _ in range(self._plan.connects):
                self._hot_once(hot, result)
            replies = f"first reply after {hot_median(result):.0f} ms"
            return f"{replies}, {result.unanswered} without a reply" if result.unanswered else replies

        self._step(f"hot connect {name} by {how}", connects)

    def _hot_once(self, hot: HotConnect, result: HotResult) -> None:
        command = self._run.netprobe("first", hot.address, PROBE_PORT, "10000", "1000")
        probe = self._run.spawn_ready(*hot.client.command(*command), name="netprobe-first")
        start, returned = hot.connect(result.how)
        output, _ = probe.communicate(timeout=60)
        result.returned_ms.append((returned - start) / 1e6)
        if probe.returncode != 0:
            result.unanswered += 1
        else:
            replied = json.loads(output)["first_ns"]
            if replied < start:
                raise BenchError("the peer answered before the call: the last disconnect did not work")
            result.first_reply_ms.append((replied - start) / 1e6)
        hot.disconnect()


def hot_median(result: HotResult) -> float:
    """The median milliseconds to the first reply; infinite when half of the connects or more had none."""
    return statistics.median(result.first_reply_ms + [math.inf] * result.unanswered)


def _is_first(link: Link, paths: list[Path]) -> bool:
    """Small packets do not depend on the MTU: they are measured on each path's first link only."""
    return any(link is path.links[0] for path in paths)


def _memory(path: str, label: str, pid: int) -> MemoryResult:
    def kib(file: str, key: str) -> int:
        found = re.search(rf"^{key}:\s+(\d+) kB", FilePath(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    try:
        return MemoryResult(
            path, label, pid, kib("status", "VmRSS"), kib("smaps_rollup", "Pss"), kib("status", "VmHWM")
        )
    except OSError as error:
        raise BenchError(f"{path}'s {label} (pid {pid}) ended during the run: {error}") from error
