"""Serving, over real HTTP on loopback: right answers, batches, bad inputs, limits, and the page in
Chromium."""
import base64
import contextlib
import http.client
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autotimm import ImageClassifier, ObjectDetector
from autotimm.backbones import BackboneConfig, FeatureBackboneConfig
from autotimm.masks import rle_decode, rle_encode
from autotimm.data.images import load_image
from autotimm.results import ClassificationResult, DetectionResult, Results, SegmentationResult
from autotimm.testing import make_shapes

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
serving = pytest.importorskip("autotimm.serve")


class Stub:
    """A model that tells the brightness of an image; slow if asked to be, and it fails on black
    images."""
    task_name, class_names = "classification", ["dark", "bright"]

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.sizes, self.may_go = seconds, [], threading.Event()
        self.may_go.set()

    def predict(self, images):
        self.sizes.append(len(images))
        self.may_go.wait(20)
        time.sleep(self.seconds)
        levels = [float(load_image(o).float().mean() / 255) for o in images]
        if 0 in levels: raise ZeroDivisionError("a black image, and a secret: /srv/models/key")
        return Results([ClassificationResult(probabilities=torch.tensor([1 - o, o]),
                                             class_names=self.class_names, size=tuple(i.shape[-2:]))
                        for o, i in zip(levels, images)])


@contextlib.contextmanager
def running(model, **options):
    "The port of a server of a model; it is shut down at the end."
    app = serving.create_app(model, **options)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False,
                                               server_header=False))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
        thread.start()
        until = time.monotonic() + 10
        while not server.started and time.monotonic() < until: time.sleep(0.01)
        try: yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"


def ask(port, method="POST", path="/predict", body=None, timeout=20, **headers):
    "Status, headers and body of an answer; JSON is decoded."
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        client.request(method, path, body, headers, encode_chunked="Transfer-Encoding" in headers)
        reply = client.getresponse()
        data = reply.read()
        return (reply.status, reply.headers, json.loads(data)
                if "json" in (reply.headers["Content-Type"] or "") else data)
    finally: client.close()


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shades(level, size=8): return encoded(Image.new("RGB", (size, size), (level,) * 3), "PNG")


def form(*files, field="file"):
    "The body of a multipart form, and its header."
    parts = [b'--x\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'
             % (field.encode(), n.encode(), d) for n, d in files]
    return dict(body=b"".join(parts) + b"--x--\r\n", Content_Type="multipart/form-data; boundary=x")


def png(width, height, rows=b"\0" * 100):
    "A PNG that says it has so many pixels."
    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR",
                                         width.to_bytes(4) + height.to_bytes(4)
                                         + bytes([8, 2, 0, 0, 0]))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


PHOTO = Image.fromarray(make_shapes(1, image_size=96, seed=1)[0].image)
JPEG = encoded(PHOTO, quality=95)


@pytest.fixture(scope="module")
def stub():
    "One server for the tests that leave it as it was."
    with running(Stub(), title="<b>Dark & bright</b>") as port: yield port


@pytest.fixture(scope="module")
def classifier():
    return ImageClassifier(BackboneConfig("test_resnet", pretrained=False), 3,
                           class_names=["circle", "square", "triangle"], image_size=64,
                           seed=0).eval()


def test_a_classifier_answers_as_predict_does(classifier):
    photos = [encoded(Image.fromarray(o.image), "PNG") for o in make_shapes(6, image_size=80)]
    wanted = classifier.predict(photos)
    with running(classifier) as port:
        for data, result in zip(photos, wanted):
            status, _, said = ask(port, body=data)
            one = said["results"][0]
            assert (status, said["task"], one["label"],
                    one["size"]) == (200, "classification", result.label, [80, 80])
            assert ({o["label"]: o["score"] for o in one["top"]}
                    == pytest.approx(dict(result.top()), abs=1e-5))
        assert len(ask(port, path="/predict?top_k=2", body=photos[0])[2]["results"][0]["top"]) == 2
        status, _, said = ask(port, **form(("a.png", photos[0]), ("b.jpg", JPEG[:500]),
                                           ("c.png", photos[1])))
        assert status == 200 and [o["name"] for o in said["results"]] == ["a.png", "b.jpg", "c.png"]
        assert [o.get("label") for o in said["results"]] == [wanted[0].label, None, wanted[1].label]
        assert said["results"][1]["status"] == 400
        info = ask(port, "GET", "/info")[2]
        assert ((info["task"], info["class_names"], info["input_size"])
                == ("classification", ["circle", "square", "triangle"], [3, 64, 64]))


def test_a_detector_answers_as_predict_does():
    model = ObjectDetector(FeatureBackboneConfig("test_resnet", pretrained=False), 3,
                           class_names=["circle", "square", "triangle"],
                           image_size=64, fpn_channels=16, head_num_convs=1, score_thresh=0.0,
                           seed=0).eval()
    wanted = model.predict([JPEG])[0]
    assert len(wanted.boxes)
    with running(model) as port:
        _, _, said = ask(port, body=JPEG)
        found = said["results"][0]["objects"]
        assert said["task"] == "detection" and [o["label"] for o in found] == wanted.names
        np.testing.assert_allclose([o["box"] for o in found], wanted.boxes.numpy(), atol=1e-3)
        np.testing.assert_allclose([o["score"] for o in found], wanted.scores.numpy(), atol=1e-5)
        middle = float(wanted.scores.median())
        fewer = ask(port, path=f"/predict?score_thresh={middle}",
                    body=JPEG)[2]["results"][0]["objects"]
        assert 0 < len(fewer) < len(found) and all(o["score"] > middle for o in fewer)


def test_requests_that_come_together_are_batched_and_each_gets_its_own_answer():
    stub = Stub(seconds=0.03)
    with running(stub, batch_size=8) as port, ThreadPoolExecutor(16) as pool:
        levels = [5 * i + 1 for i in range(40)]
        replies = list(pool.map(lambda o: ask(port, body=shades(o)), levels))
        for level, (status, _, said) in zip(levels, replies):
            scores = {o["label"]: o["score"] for o in said["results"][0]["top"]}
            assert status == 200 and scores["bright"] == pytest.approx(level / 255, abs=1e-5)
        assert len(stub.sizes) < 20 and max(stub.sizes) <= 8 and sum(stub.sizes) == 40
        health = ask(port, "GET", "/health")[2]
        assert (health["served"], health["batches"],
                health["inside"]) == (40, len(stub.sizes), 0) and health["mean_batch_size"] > 2


def test_a_lone_request_waits_for_nobody():
    with running(Stub(), max_wait_ms=3000) as port:
        start = time.perf_counter()
        for level in (1, 2, 3): assert ask(port, body=shades(level))[0] == 200
        assert time.perf_counter() - start < 2


def test_bad_images_do_not_spoil_their_neighbours(caplog):
    caplog.set_level(logging.CRITICAL, logger="autotimm.serve")
    stub = Stub(seconds=0.05)
    with running(stub) as port, ThreadPoolExecutor(12) as pool:
        bodies = [shades(50), b"hello", shades(0), JPEG[:-200], shades(60), png(60_000, 60_000),
                  shades(70), b"", shades(0), shades(80)]
        replies = list(pool.map(lambda o: ask(port, body=o), bodies))
        assert [o[0] for o in replies] == [200, 415, 500, 400, 200, 413, 200, 400, 500, 200]
        for i in (0, 4, 6, 9):
            assert (replies[i][2]["results"][0]["top"][1]["score"]
                    == pytest.approx((50 + 10 * [0, 4, 6, 9].index(i)) / 255, abs=1e-5))
        assert ("secret" not in str(replies) and "Traceback" not in str(replies)
                and "ZeroDivision" not in str(replies))
        assert ask(port, "GET", "/health")[2]["failed"] == 2


BAD = {
    "empty": (b"", 400), "cut JPEG": (JPEG[:-200], 400), "cut in the header": (JPEG[:60], 400),
    "two bytes": (JPEG[:2], 415),
    "noise after a JPEG's start": (JPEG[:20] + bytes(range(256)) * 4, 400),
    "PNG without pixels": (png(50, 50), 400), "PNG of no size": (png(0, 10), 400),
    "text": (b"hello, I am a photo" * 50, 415), "zip": (b"PK\x03\x04" + bytes(500), 415),
    "PDF": (b"%PDF-1.7\n" + bytes(500), 415),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 415),
    "PostScript": (encoded(PHOTO, "EPS"), 415),
    "JSON": (b'{"image": "x"}', 415), "pickle": (b"\x80\x04\x95cos\nsystem\n", 415),
    "bomb": (png(60_000, 60_000), 413), "a row too many": (png(10_000, 5_001), 413),
    "long and thin": (png(2**31 - 1, 1), 413), "too large": (JPEG + bytes(10_000_000), 413),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_way_out(stub, name):
    data, wanted = BAD[name]
    for how in (dict(body=data, Content_Type="image/jpeg"), form(("photo.jpg", data))):
        status, headers, said = ask(stub, **how)
        assert status == wanted, (name, said)
        assert set(said) == {"error", "way_out"} and all(len(o) > 10 for o in said.values())
        assert (headers["X-Content-Type-Options"] == "nosniff"
                and not headers["Access-Control-Allow-Origin"] and not headers["Server"])
        assert ("Traceback" not in str(said) and ".py" not in str(said)
                and "site-packages" not in str(said))
    assert ask(stub, body=JPEG)[0] == 200


def test_length_is_counted_and_not_believed(stub):
    def parts(n):
        for _ in range(n): yield bytes(100_000)
    status, headers, said = ask(stub, body=parts(150), Transfer_Encoding="chunked")
    assert (status, headers["Connection"]) == (413, "close") and "10,000,000 bytes" in said["error"]
    # A client that asks before it sends is told at once.
    with socket.create_connection(("127.0.0.1", stub), 10) as client:
        client.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99000000000\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    # One that never ends is cut off after twice the limit.
    with pytest.raises((ConnectionError, TimeoutError)), socket.create_connection(
        ("127.0.0.1", stub), 10) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(1000): client.sendall(b"186a0\r\n" + bytes(100_000) + b"\r\n")
    assert ask(stub, body=parts(0), Transfer_Encoding="chunked")[0] == 400
    assert ask(stub, body=JPEG)[0] == 200


def kinds():
    wide = Image.fromarray(np.linspace(0, 255, 40 * 60).reshape(40, 60).astype("uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (60, 40), o) for o in ("red", "blue")]
    return {"GIF": encoded(PHOTO, "GIF"), "moving GIF": encoded(frames[0], "GIF", save_all=True,
                                                                append_images=frames[1:]),
            "WebP": encoded(PHOTO, "WEBP"),
            "grey": encoded(wide, "PNG"),
            "16 bit": encoded(Image.fromarray(np.asarray(wide).astype("uint16") * 257), "PNG"),
            "RGBA": encoded(PHOTO.convert("RGBA"), "PNG"),
            "palette": encoded(PHOTO.convert("P"), "PNG"),
            "1 bit": encoded(PHOTO.convert("1"), "PNG"),
            "CMYK": encoded(PHOTO.convert("CMYK")), "BMP": encoded(PHOTO, "BMP"),
            "TIFF": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
            "turned": encoded(wide.convert("RGB"), exif=exif),
            "one pixel": encoded(PHOTO.resize((1, 1)), "PNG"),
            "progressive": encoded(PHOTO, progressive=True)}


@pytest.mark.parametrize("name", kinds())
def test_every_kind_of_image_is_seen_as_predict_sees_it(stub, name):
    data = kinds()[name]
    wanted = Stub().predict([load_image(data)])[0]
    status, _, said = ask(stub, body=data, Content_Type="application/x-something")
    assert status == 200, said
    one = said["results"][0]
    assert (tuple(one["size"]) == wanted.size and dict((o["label"], o["score"]) for o in one["top"])
            == pytest.approx(dict(wanted.top()), abs=1e-6))
    if name == "turned": assert wanted.size == (60, 40)


def test_wrong_requests(stub):
    cases = [("GET", "/predict", None, 405), ("POST", "/", b"x", 405),
             ("DELETE", "/info", None, 405), ("GET", "/docs", None, 404),
             ("GET", "/redoc", None, 404),
             ("GET", "/../../etc/passwd", None, 404), ("POST", "/predict?top_k=0", JPEG, 422),
             ("POST", "/predict?top_k=many", JPEG, 422),
             ("POST", "/predict?score_thresh=nan", JPEG, 422),
             ("POST", "/predict?score_thresh=2", JPEG, 422), ("POST", "/predict?topk=2", JPEG, 422)]
    for method, path, body, wanted in cases:
        status, headers, said = ask(stub, method, path, body)
        assert status == wanted and set(said) == {"error", "way_out"}, (path, said)
        if status == 405: assert headers["Allow"]
    assert "top_k" in ask(stub, path="/predict?topk=2", body=JPEG)[2]["error"]
    assert ask(stub, **form(("a.jpg", JPEG), field="image"))[0] == 400
    assert (ask(stub, body=b"--x\r\nrubbish", Content_Type="multipart/form-data; boundary=x")[0]
            == 400)
    assert ask(stub, body=b"rubbish", Content_Type="multipart/form-data")[0] == 400
    assert ask(stub, **form(*[("a.jpg", JPEG)] * 17))[0] == 413
    assert ask(stub, "OPTIONS", Origin="http://elsewhere.example",
               Access_Control_Request_Method="POST")[0] == 405
    openapi = ask(stub, "GET", "/openapi.json")[2]
    assert "image/*" in openapi["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert ask(stub, body=JPEG)[0] == 200


def test_answers_that_take_too_long():
    stub = Stub()
    stub.may_go.clear()
    with running(stub, timeout_s=0.3) as port:
        status, _, said = ask(port, body=JPEG)
        assert status == 504 and "0.3 seconds" in said["error"]
        stub.may_go.set()
        assert ask(port, body=JPEG)[0] == 200
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nonly this")
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        assert ask(port, body=JPEG)[0] == 200
        assert ask(port, "GET", "/health")[2]["refused"] == {"408": 1, "504": 1}


def until(check, seconds=10):
    "Wait until something is so."
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def test_a_full_queue_turns_away_and_a_client_that_goes_is_dropped():
    stub = Stub()
    stub.may_go.clear()
    with running(stub, max_queue=3, batch_size=1) as port, ThreadPoolExecutor(2) as pool:
        inside = lambda: ask(port, "GET", "/health")[2]["inside"]
        first = pool.submit(ask, port, body=shades(10))
        until(lambda: len(stub.sizes) == 1)
        leaver = socket.create_connection(("127.0.0.1", port), 10)
        data = shades(20)
        leaver.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                       % (len(data), data))
        until(lambda: inside() == 2)
        second = pool.submit(ask, port, body=shades(30))
        until(lambda: inside() == 3)
        status, headers, said = ask(port, body=JPEG)
        assert (status, headers["Retry-After"]) == (503, "1") and "busy" in said["error"]
        leaver.close()
        time.sleep(0.1)
        stub.may_go.set()
        assert first.result(10)[0] == second.result(10)[0] == 200
        until(lambda: inside() == 0)
        # What the leaver sent never reached the model.
        assert stub.sizes == [1, 1] and ask(port, body=JPEG)[0] == 200


def test_shutdown_answers_what_is_in_flight():
    stub = Stub(seconds=0.3)
    with ThreadPoolExecutor(6) as pool:
        with running(stub, batch_size=2) as port:
            replies = [pool.submit(ask, port, body=shades(10 + i)) for i in range(6)]
            until(lambda: ask(port, "GET", "/health")[2]["inside"] == 6)
        assert [o.result(10)[0] for o in replies] == [200] * 6
    with pytest.raises(OSError): ask(port, body=JPEG)


def test_memory_of_large_images_is_bounded():
    # Each fills half of the room; eight at once come in two by two.
    stub, large = Stub(), encoded(Image.new("RGB", (1000, 1000), "gray"), "PNG")
    with running(stub, max_pixels=1_000_000, batch_size=8) as port, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: ask(port, body=large), range(8)))
        assert [o[0] for o in replies] == [200] * 8 and max(stub.sizes) <= 2


def test_what_cannot_be_served():
    with pytest.raises(TypeError, match="has a method predict"): serving.create_app(object())
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        serving.create_app(Stub(), batch_size=2.5)


def test_a_saved_model_is_served_from_its_folder(classifier, tmp_path):
    hub = pytest.importorskip("autotimm.hub")
    hub.save_pretrained(classifier, tmp_path / "shapes")
    with running(str(tmp_path / "shapes")) as port:
        said = ask(port, body=JPEG)[2]["results"][0]
        assert said["top"][0]["score"] == pytest.approx(classifier.predict(JPEG)[0].score, abs=1e-5)
        assert ask(port, "GET", "/info")[2]["title"] == "shapes"


def test_an_onnx_file_is_served(classifier, tmp_path):
    pytest.importorskip("onnxruntime")
    export = pytest.importorskip("autotimm.export")
    path = export.export_to_onnx(classifier, tmp_path / "shapes.onnx")
    with running(path) as port, ThreadPoolExecutor(4) as pool:
        info = ask(port, "GET", "/info")[2]
        assert ((info["task"], info["class_names"], info["title"])
                == ("classification", ["circle", "square", "triangle"], "shapes.onnx"))
        wanted = dict(classifier.predict(JPEG)[0].top())
        for status, _, said in pool.map(lambda _: ask(port, body=JPEG), range(8)):
            assert (status == 200 and {o["label"]: o["score"] for o in said["results"][0]["top"]}
                    == pytest.approx(wanted, abs=1e-4))


def test_serve_runs_until_it_is_interrupted():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_serve import Stub; from autotimm.serve import serve; serve(Stub(1.0), port=0)"
    # A shell that runs these tests in the background has them ignore Ctrl-C, and what they start
    # would too.
    process = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent)],
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        port = next(int(found[1]) for line in process.stderr
                    if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(ask, port, body=JPEG)
            until(lambda: ask(port, "GET", "/health")[2]["inside"] == 1)
            process.send_signal(signal.SIGINT)
            assert reply.result(10)[0] == 200
        assert process.wait(10) == 0 and "Traceback" not in process.stderr.read()
    finally: process.kill()


CHROMIUM = next((o for o in ("chromium", "chromium-browser", "google-chrome", "chrome")
                 if shutil.which(o)), None)


class Chromium:
    "A headless Chromium without a network, driven through a pipe by its DevTools protocol."
    def __init__(self, folder):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                 "--no-first-run", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", "--disable-default-apps", "--disable-extensions",
                 "--proxy-server=127.0.0.1:9", "--window-size=1100,800",
                 f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        (there, self.to), (self.back, here) = os.pipe(), os.pipe()
        # The protocol is spoken through the descriptors 3 and 4.
        start = ("import fcntl, os, sys; a, b = (fcntl.fcntl(int(o), fcntl.F_DUPFD, 10) for o in "
                 "sys.argv[1:3]); "
                 "os.dup2(a, 3); os.dup2(b, 4); os.execvp(sys.argv[3], sys.argv[3:])")
        self.process = subprocess.Popen([sys.executable, "-c", start, str(there), str(here),
                                         CHROMIUM, *flags], pass_fds=(there, here),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for o in (there, here): os.close(o)
        self.count, self.rest, self.session, self.events = 0, b"", None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"): self(f"{domain}.enable")

    def __call__(self, method, **params):
        "Call a method of the protocol."
        self.count += 1
        message = {"id": self.count, "method": method, "params": params,
                   **({"sessionId": self.session} if self.session else {})}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                read = os.read(self.back, 1 << 20)
                assert read, "Chromium has ended"
                self.rest += read
            text, _, self.rest = self.rest.partition(b"\0")
            said = json.loads(text)
            if said.get("id") == self.count:
                assert "error" not in said, said
                return said["result"]
            self.events.append(said)

    def value(self, code):
        return self("Runtime.evaluate", expression=code, returnByValue=True,
                    awaitPromise=True)["result"].get("value")

    def choose(self, path):
        "Put a file into the page's input, and wait for the answer."
        before = self.value("+(document.body.dataset.done || 0)")
        node = self("DOM.querySelector", nodeId=self("DOM.getDocument")["root"]["nodeId"],
                    selector="#file")["nodeId"]
        self("DOM.setFileInputFiles", files=[str(path)], nodeId=node)
        until(lambda: self.value("+(document.body.dataset.done || 0)") > before, 20)

    def open(self, url):
        self("Page.navigate", url=url)
        until(lambda: self.value("document.readyState") == "complete"
              and self.value("get('limits').textContent.length > 3"))

    def picture(self, path):
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(10)
        for o in (self.to, self.back): os.close(o)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; on Debian: apt-get install chromium")
    made = Chromium(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


class Shown:
    "A model that says what it is told to say."
    def __init__(self, task_name, make):
        self.task_name, self.class_names, self.make = (task_name,
                                                       ["circle", "square",
                                                        "<img src=x onerror=alert(1)>"], make)
    def predict(self, images): return Results([self.make(o) for o in images])


SCENE = make_shapes(1, image_size=240, max_objects=3, seed=7)[0]


def boxes(image):
    n = len(SCENE.labels)
    masks = torch.from_numpy(SCENE.masks)
    return DetectionResult(boxes=torch.from_numpy(SCENE.boxes).float(),
                           scores=torch.linspace(0.95, 0.2, n), labels=torch.arange(n) % 3,
                           masks=masks, class_names=["circle", "square",
                                                     "<img src=x onerror=alert(1)>"],
                           size=(240, 240))


TASKS = {
    "classification": lambda o: ClassificationResult(probabilities=torch.tensor([0.07, 0.9, 0.03]),
                                                     size=(240, 240),
                                                     class_names=["circle", "square",
                                                                  "<img src=x onerror=alert(1)>"]),
    "instance_segmentation": boxes,
    "segmentation": lambda o: SegmentationResult(
        mask=torch.from_numpy(np.asarray(SCENE.mask)).long().clamp(max=2), size=(240, 240),
                                                 class_names=["circle", "square",
                                                              "<img src=x onerror=alert(1)>"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_page_shows_what_was_found(browser, tmp_path, task):
    photo = tmp_path / "photo <b>.png"
    Image.fromarray(SCENE.image).save(photo)
    with running(Shown(task, TASKS[task]), title="Shapes <i>&</i> photos") as port:
        browser.open(f"http://127.0.0.1:{port}/")
        assert browser.value("document.querySelector('h1').textContent") == "Shapes <i>&</i> photos"
        browser.choose(photo)
        rows = browser.value("[...document.querySelectorAll('#list li')].map(o => "
                             "o.innerText.replace(/\\s+/g, ' ').trim())")
        wanted = {"classification": ["square 90%", "circle 7.0%", "<img src=x onerror=alert(1)> "
                                                                  "3.0%"],
                  "instance_segmentation": None, "segmentation": None}[task]
        if wanted: assert rows == wanted
        elif task == "instance_segmentation":
            said = TASKS[task](None)
            assert rows == [f"{n} {s:.0%}" for n, s in zip(said.names, said.scores.tolist())
                            if s >= 0.3]
            browser.value("get('sure').value = 0; get('sure').dispatchEvent(new Event('input'))")
            assert browser.value("document.querySelectorAll('#list li').length") == len(said.names)
        else: assert len(rows) == len(TASKS[task](None).shares) and rows[0].startswith("circle ")
        assert browser.value("document.querySelectorAll('#list img').length") == 0
        assert browser.value("get('canvas').width") == 640
        # What is drawn over the photo lies where it was found: the canvas differs from the photo
        # there, and only there.
        if task == "segmentation":
            pixels = browser.value("[...get('canvas').getContext('2d').getImageData(0, 0, 640, "
                                   "640).data].filter((_, i) => i % 4 < 3).join()")
            drawn = np.array(pixels.split(","), float).reshape(640, 640, 3)
            plain = np.asarray(Image.fromarray(SCENE.image).resize((640, 640)), float)
            mask = np.asarray(Image.fromarray(np.asarray(SCENE.mask).astype("uint8")).resize(
                (640, 640), Image.NEAREST))
            colours = [(drawn - plain * (1 - 150 / 255))[mask.clip(max=2) == i].mean(0)
                       for i in range(3)]
            assert min(np.abs(a - b).max() for i, a in enumerate(colours) for b in colours[:i]) > 30
        # On a phone nothing is wider than the screen.
        browser("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1,
                mobile=True)
        assert browser.value("document.documentElement.scrollWidth") <= 390
        if folder := os.environ.get("SERVE_PICTURES"):
            browser.picture(Path(folder) / f"{task}-phone.png")
        browser("Emulation.clearDeviceMetricsOverride")
        if folder := os.environ.get("SERVE_PICTURES"): browser.picture(Path(folder) / f"{task}.png")
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(JPEG[:-200])
        browser.choose(bad)
        assert ("broken" in browser.value("get('state').textContent")
                and browser.value("document.body.className").split().count("bad") == 1)
        browser.choose(photo)
        assert browser.value("document.body.className").split().count("bad") == 0
        # Nothing was asked of anybody else, and the policy forbade nothing that the page wanted.
        urls = [o["params"]["request"]["url"] for o in browser.events
                if o.get("method") == "Network.requestWillBeSent"]
        assert all(o.startswith(("http://127.0.0.1:", "blob:", "data:", "about:"))
                   for o in urls), urls
        problems = [o["params"] for o in browser.events
                    if o.get("method") in ("Runtime.exceptionThrown",
                                           "Page.javascriptDialogOpening")]
        problems += [o["params"] for o in browser.events if o.get("method") == "Log.entryAdded"
                     and "400" not in o["params"]["entry"]["text"]]
        assert not problems, problems
    browser.events.clear()


def test_the_page_reads_masks_as_coco_does(browser, stub):
    browser.open(f"http://127.0.0.1:{stub}/")
    rng = np.random.default_rng(0)
    for mask in (rng.random((17, 31)) > 0.5, np.zeros((40, 3), bool), np.ones((1, 7), bool),
                 np.arange(300_000).reshape(500, 600) > 123_456):
        rle = rle_encode(mask)
        counts = browser.value(f"runs({json.dumps(rle['counts'])})")
        assert (rle_decode({"size": rle["size"], "counts": counts}) == mask).all()


def test_the_page_refuses_what_it_did_not_bring(browser, stub):
    browser.open(f"http://127.0.0.1:{stub}/")
    assert browser.value("document.querySelector('h1').textContent") == "<b>Dark & bright</b>"
    browser.value("(() => { const s = document.createElement('script'); s.textContent = "
                  "'window.stranger = 1'; document.body.append(s) })()")
    assert browser.value("window.stranger") is None
    assert (browser.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
            == "refused")


def test_no_warning_when_an_app_is_made():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serving.create_app(Stub())
