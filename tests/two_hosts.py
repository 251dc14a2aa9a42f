"""Two hosts on one machine: network namespaces with a cable between them, each with addresses and a
loopback of its own."""
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


def _ip(*arguments: str) -> None:
    "Run `ip`; what it says against it is in the error."
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode: raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Host:
    "A network namespace with its end of the cable."
    name: str
    address: str
    interface: str

    def start(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None,
              **kwargs) -> subprocess.Popen:
        "Start a program on this host; it writes into `log`."
        sees = {**os.environ, "GLOO_SOCKET_IFNAME": self.interface, "PET_LOCAL_ADDR": self.address,
                "OMP_NUM_THREADS": "1", **(env or {})}
        with log.open("w") as file:
            return subprocess.Popen(["ip", "netns", "exec", self.name, *command], stdout=file,
                                    stderr=subprocess.STDOUT, env=sees,
                                    start_new_session=True, **kwargs)

    def cut(self) -> None:
        "Pull the cable: nothing arrives any more, and nobody is told."
        _ip("-n", self.name, "link", "set", self.interface, "down")


def why_not() -> str | None:
    "Why there can be no network namespaces here; None where there can."
    if sys.platform != "linux": return "network namespaces are Linux'"
    if shutil.which("ip") is None: return "the command ip (iproute2) is not there"
    try:
        with two_hosts(): return None
    except OSError as e: return f"network namespaces are not permitted: {e}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    "Two hosts that reach each other and nobody else."
    pid = os.getpid()
    hosts = (Host(f"one{pid}", "10.99.0.1", f"a{pid}"), Host(f"two{pid}", "10.99.0.2", f"b{pid}"))
    with contextlib.ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "del", host.name)
        _ip("link", "add", hosts[0].interface, "netns", hosts[0].name, "type", "veth",
            "peer", "name", hosts[1].interface, "netns", hosts[1].name)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for link in ("lo", host.interface): _ip("-n", host.name, "link", "set", link, "up")
        yield hosts
