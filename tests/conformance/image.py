"""The image that both sides' containers run: busybox with an HTTP server that tells who asked, and socat."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

from machine import check

_BUSYBOX = Path("/bin/busybox")
_WHO = """#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n%s sees %s\\n' "$(hostname)" "$REMOTE_ADDR"
"""
_SCRIPTS = {
    # Serves who: over TCP, both families.
    "serve": 'exec httpd -f -p "${1:-80}" -h /www',
    # Serves the same over UDP.
    "userve": (
        'exec socat -T5 "UDP4-RECVFROM:${1:-53},fork" '
        """'SYSTEM:read -r question; echo "$question $(hostname) sees $SOCAT_PEERADDR"'"""
    ),
    # Asks such a server: get HOST PORT. Says in one line what came, or what failed.
    "get": """
        answer=$(printf 'GET /cgi-bin/who HTTP/1.0\\r\\n\\r\\n' | socat -t10 -T10 - "TCP:$1:$2,connect-timeout=1" 2>&1)
        result=$?
        [ -n "$answer" ] || result=1
        echo "${answer:-nothing}" | tail -n1 | sed 's/.* E .*: //' | tr -d '\\r'
        exit $result""",
    "uget": """
        answer=$(echo ping | socat -t0.3 -T1 - "UDP:$1:$2" 2>&1)
        [ -n "$answer" ] || answer="no answer"
        echo "$answer" | tail -n1 | sed 's/.* E .*: //'
        case $answer in ping*) ;; *) exit 1 ;; esac""",
    # Asks many at once: matrix HOST:PORT...
    "matrix": 'for target; do { echo "$target $(get "${target%:*}" "${target##*:}")" & } done | sort',
    # Answers ping.
    "pings": 'ping -c1 -W1 "$1" >/dev/null 2>&1 && echo answers || { echo "does not answer"; exit 1; }',
    # What the kernel knows, without what may differ between two equal ones.
    "addresses": """
        ip -o addr show | awk '$2 != "lo" && $4 !~ /^fe80:/ {print $2, $3, $4}' | sort""",
    "routes": """
        { ip route; ip -6 route | grep -Ev '^(fe80|ff00|multicast|unreachable)'; } |
            sed -E 's/ (proto|metric|pref|expires|linkdown|hoplimit|error)( [a-z0-9-]+)?//g; s/ +$//; s/ +/ /g' |
            sort""",
    "macs": """
        ip -o link show | grep -v ' lo:' |
            sed -E 's/^[0-9]+: ([a-z0-9]+).* (link.ether [0-9a-f:]+) .*/\\1 \\2/' | sort""",
    "mtus": "ip -o link show | sed -E 's/^[0-9]+: ([a-z0-9]+)[@:].* mtu ([0-9]+).*/\\1 \\2/' | sort",
    "names": """
        for name; do
            nslookup "$name" 2>&1 | awk 'NR > 3 && NF' |
                sed -E 's/^([0-9]+\\.){4}in-addr.arpa/ARPA/; s/ ([0-9]+\\.){4}in-/ ARPA-/' | sort -u
        done""",
    # resolv.conf's settings: the order of different ones means nothing.
    "resolv": "grep -Ev '^ *(#|$)' /etc/resolv.conf | sed 's/ *$//' | sort",
}


def build(root: Path) -> None:
    """Makes the image's tree and, beside it, its tar file."""
    for name in ("bin", "etc", "proc", "sys", "dev", "root", "tmp", "var", "www/cgi-bin"):
        (root / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, root / "bin/busybox")
    for applet in check(str(_BUSYBOX), "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (root / "etc/hosts").write_text(
        "127.0.0.1 localhost\n::1 localhost\n"
    )  # for the host's own; containers have theirs
    who = root / "www/cgi-bin/who"
    who.write_text(_WHO)
    who.chmod(0o755)
    for name, text in _SCRIPTS.items():
        script = root / "bin" / name
        script.write_text(f"#!/bin/sh\n{text.strip()}\n")
        script.chmod(0o755)
    for program in ("/usr/bin/socat", "/usr/bin/getent"):
        _program(root, Path(program))
    with tarfile.open(root.with_suffix(".tar"), "w") as tar:
        tar.add(root, arcname=".")


def _program(root: Path, program: Path) -> None:
    """Copies a program with the libraries that it is linked with."""
    libraries = re.findall(r"(/\S+) \(0x", check("ldd", str(program)))
    for path in [program, *(Path(library) for library in libraries)]:
        target = root / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
