"""How many requests a second the server answers, how long each waits, and what bad inputs cost it.
Loopback only; ends by itself.

    python benchmarks/serve.py                       # --data FOLDER: your photos; --seconds 8: a
    round at most; --quick: a short look
"""
import argparse
import contextlib
import http.client
import io
import logging
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from common import machine, table
from PIL import Image

SIZE = (500, 375)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photos(folder: str | None, count: int = 32) -> list[bytes]:
    """JPEG files of 500 by 375: a folder's photos, or clouds of colour that take as many bytes as
    photos do."""
    if folder:
        paths = sorted(o for o in Path(folder).rglob("*")
                       if o.suffix.lower() in (".jpg", ".jpeg"))[:count]
        if not paths: raise SystemExit(f"There is no JPEG file in {folder!r}.")
        return [encoded(Image.open(o).convert("RGB").resize(SIZE), quality=90) for o in paths]
    rng = np.random.default_rng(0)
    def cloud(n: int) -> np.ndarray:
        return np.asarray(Image.fromarray(rng.integers(0, 256, (n * 3 // 4, n, 3),
                                                       dtype=np.uint8)).resize(SIZE, Image.BICUBIC),
                          float)
    made = [(0.5 * cloud(8) + 0.3 * cloud(48) + 0.2 * cloud(250)).clip(0, 255).astype(np.uint8)
            for _ in range(count)]
    return [encoded(Image.fromarray(o), quality=90) for o in made]


def build():
    from autotimm import ImageClassifier
    from autotimm.backbones import BackboneConfig
    return ImageClassifier(BackboneConfig("mobilenetv3_small_100", pretrained=False),
                           1000, seed=0).eval()


def child(batch_size: int) -> None:
    "Serve on a free port, which is printed; end when standard input does."
    import uvicorn

    from autotimm.serve import create_app
    logging.getLogger("autotimm.serve").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    app = create_app(build(), batch_size=batch_size)
    # With the protocol left open asyncio would not turn off Nagle's algorithm, and each answer
    # would wait for 40 ms.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
    def end() -> None:
        sys.stdin.read()
        server.should_exit = True
    threading.Thread(target=end, daemon=True).start()
    print(listening.getsockname()[1], flush=True)
    server.run(sockets=[listening])


@contextlib.contextmanager
def server(batch_size: int):
    "A server in a process of its own: its port and its process id."
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(batch_size)],
                               stdin=subprocess.PIPE,
                               # Libjpeg talks there
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout and process.stdin
        port = int(process.stdout.readline())
        yield port, process.pid
        process.stdin.close()
        process.wait(40)
    finally: process.kill()


def memory(pid: int) -> str:
    "Resident memory of a process."
    try: status = Path(f"/proc/{pid}/status").read_text()
    except OSError: return "not known"
    found = {k: int(v.split()[0]) / 1024 for k, v in (o.split(":", 1) for o in status.splitlines())
             if k in ("VmRSS", "VmHWM")}
    return f"{found['VmRSS']:.0f} MB (at most {found['VmHWM']:.0f})"


def post(client: http.client.HTTPConnection, body: bytes, path: str = "/predict",
         **headers: str) -> int:
    client.request("POST", path, body, {"Content-Type": "image/jpeg", **headers})
    reply = client.getresponse()
    reply.read()
    return reply.status


def load(port: int, files: list[bytes], clients: int, count: int,
         seconds: float) -> tuple[float, list[float]]:
    """Requests a second and the latencies in ms, of clients that each send one request after
    another."""
    left, lock, waits = iter(range(count)), threading.Lock(), []
    begin = time.perf_counter()
    def client() -> None:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.perf_counter() - begin < seconds:
            with lock:
                if (i := next(left, None)) is None: break
            start = time.perf_counter()
            status = post(line, files[i % len(files)])
            waits.append(1000 * (time.perf_counter() - start))
            assert status == 200, status
        line.close()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for o in threads: o.start()
    for o in threads: o.join()
    return len(waits) / (time.perf_counter() - begin), waits


def health(port: int) -> dict:
    import json
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    line.request("GET", "/health")
    return json.loads(line.getresponse().read())


def loads(files: list[bytes], seconds: float, rounds: int) -> None:
    rows = []
    with server(16) as (batched, _), server(1) as (single, _):
        sides = {"up to 16": batched, "off": single}
        for port in sides.values(): load(port, files, 4, 60, seconds)
        for clients in (1, 4, 16):
            found: dict[str, list] = {k: [] for k in sides}
            before = {k: health(o) for k, o in sides.items()}
            for i in range(rounds):
                for name in list(sides)[::1 if i % 2 == 0 else -1]:
                    found[name].append(load(sides[name], files, clients, 80 * clients, seconds))
            for name, port in sides.items():
                after, waits = health(port), [ms for _, o in found[name] for ms in o]
                p50, p95, p99 = np.percentile(waits, (50, 95, 99))
                batch = (after["served"] - before[name]["served"]) / (after["batches"]
                                                                      - before[name]["batches"])
                rates = [o[0] for o in found[name]]
                rows.append([clients, name, f"{statistics.median(rates):.0f} ({min(rates):.0f} to "
                                            f"{max(rates):.0f})", f"{p50:.0f}", f"{p95:.0f}",
                             f"{p99:.0f}", f"{batch:.1f}", len(waits)])
    print(table(rows, ["clients", "batches", "requests a second (lowest, highest round)",
                       "p50 ms", "p95 ms", "p99 ms", "mean batch", "requests"]))


def alone(files: list[bytes]) -> None:
    "The model without a server."
    model = build()
    rows = []
    for size in (1, 16):
        model.predict(files[:size], progress=False)
        start = time.perf_counter()
        for i in range(0, 128, size):
            model.predict([files[j % len(files)] for j in range(i, i + size)], progress=False)
        rows.append([f"`model.predict` on {size} at a time, no server",
                     f"{128 / (time.perf_counter() - start):.0f}"])
    print(table(rows, ["", "photos a second"]))


def png(width: int, height: int, data: bytes) -> bytes:
    "A PNG that says it has so many pixels."
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind
                                                                       + body).to_bytes(4, "big")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data))
            + chunk(b"IEND", b""))


def bad_inputs(photo: bytes) -> dict[str, tuple[bytes, str, dict[str, str]]]:
    wrong_byte = bytearray(encoded(Image.open(io.BytesIO(photo)), "PNG"))
    wrong_byte[len(wrong_byte) // 2] ^= 255
    plain = {
        "a good photo, to compare": photo, "empty body": b"",
        "text named .jpg": b"this is no photo" * 100, "zip named .jpg": b"PK\x03\x04" + bytes(2000),
        "PostScript": encoded(Image.new("RGB", (50, 50)), "EPS"),
        "JPEG cut in the middle": photo[:len(photo) // 2], "JPEG cut in its header": photo[:60],
        "PNG with one wrong byte": bytes(wrong_byte),
        "PNG that unfolds to 10 GB (60000 x 60000)": png(60_000, 60_000, bytes(10_000_000)),
        "PNG of 7100 x 7100, just too many": png(7100, 7100, bytes(100)),
        "11 MB": photo + bytes(11_000_000)}
    named = {k: (v, "/predict", {}) for k, v in plain.items()}
    return {**named, "top_k=0": (photo, "/predict?top_k=0", {}),
            "another path": (photo, "/other", {})}


def bad(photo: bytes, port: int, pid: int, times: int) -> None:
    rows = []
    for name, (body, path, headers) in bad_inputs(photo).items():
        found, waits = Counter(), []
        for _ in range(times):
            line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            start = time.perf_counter()
            found[post(line, body, path, **headers)] += 1
            waits.append(1000 * (time.perf_counter() - start))
            line.close()
        rows.append([name, f"{len(body):,}", ", ".join(map(str, found)),
                     f"{statistics.median(waits):.1f}", f"{max(waits):.1f}"])
    print(table(rows, ["input", "bytes", "status", "median ms", "slowest ms"]))


def damaged(photo: bytes, port: int, count: int) -> None:
    "Photos in seven formats, each damaged at random: cut, or with bytes changed."
    rng, image, rows = (np.random.default_rng(0), Image.open(io.BytesIO(photo)).resize((160, 120)),
                        [])
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        whole, found, waits = encoded(image, kind), Counter(), []
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for i in range(count):
            body = np.frombuffer(whole, np.uint8).copy()
            if i % 3 == 0: body = body[:rng.integers(1, len(body))]
            elif i % 3 == 1: body[rng.integers(0, len(body), 5)] = rng.integers(0, 256, 5)
            else: body[rng.integers(8, 64, 3)] = rng.integers(0, 256, 3)
            start = time.perf_counter()
            found[post(line, body.tobytes())] += 1
            waits.append(1000 * (time.perf_counter() - start))
        line.close()
        rows.append([kind, count, ", ".join(f"{v} times {k}" for k, v in sorted(found.items())),
                     f"{statistics.median(waits):.1f}", f"{max(waits):.1f}"])
    print(table(rows, ["format", "damaged files", "status", "median ms", "slowest ms"]))


def flood(photo: bytes, port: int, clients: int = 200) -> None:
    "More clients at once than the queue holds."
    found, lock, gate = Counter(), threading.Lock(), threading.Barrier(clients)
    def client() -> None:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        gate.wait()
        status = post(line, photo)
        with lock: found[status] += 1
        line.close()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for o in threads: o.start()
    for o in threads: o.join()
    print(f"{clients} clients in the same moment, room for 64: "
          + ", ".join(f"{v} times {k}" for k, v in sorted(found.items())) + ".")


def main() -> None:
    parser = argparse.ArgumentParser(description="Load and bad inputs on the server, on loopback.")
    parser.add_argument("--data", help="folder with JPEG files; made-up photos without it")
    parser.add_argument("--seconds", type=float, default=8, help="a round at most")
    parser.add_argument("--rounds", type=int, default=5, help="rounds a setting")
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve: return child(args.serve)
    warnings.filterwarnings("ignore")
    files = photos(args.data)
    print(f"{machine()}, {os.cpu_count()} processors. mobilenetv3_small_100, {len(files)} photos "
          f"of {SIZE[0]} x {SIZE[1]}, {sum(map(len, files)) // len(files) // 1000} kB each.\n")
    alone(files)
    print()
    loads(files, 2 if args.quick else args.seconds, 1 if args.quick else args.rounds)
    print()
    with server(16) as (port, pid):
        load(port, files, 4, 60, 10)
        steps = [["after 60 good photos", memory(pid)]]
        bad(files[0], port, pid, 3 if args.quick else 15)
        steps.append(["after the bad inputs", memory(pid)])
        print()
        damaged(files[0], port, 30 if args.quick else 300)
        steps.append(["after the damaged files", memory(pid)])
        print()
        flood(files[0], port)
        steps.append(["after the flood", memory(pid)])
        large = encoded(Image.new("RGB", (7000, 7000), "gray"), quality=50)
        load(port, [large], 8, 16, 60)
        steps.append([f"after 16 photos of 49 million pixels by 8 clients ({len(large) // 1000} kB "
                      "each)", memory(pid)])
        load(port, files, 4, 60, 10)
        steps.append(["after 60 good photos more", memory(pid)])
        print()
        print(table(steps, ["memory of the server", "resident"]))
        said = health(port)
        print(f"\nIt goes on: {said['status']}, {said['served']} served in {said['batches']} "
              f"batches, {said['failed']} failed, {said['inside']} inside.")


if __name__ == "__main__": main()
