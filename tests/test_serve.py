"""examples/serve.py under many clients and hostile uploads, on a tiny network whose answer depends on the image."""

import importlib
import io
import json
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
serve: Any = importlib.import_module("serve")
sys.path.pop(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file with the inputs, outputs and metadata of an export: one box of the image's size, scored by the mean of its padded pixels."""
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    nodes = [
        helper.make_node("Cast", ["pixels"], ["gray"], to=floats),
        helper.make_node("ReduceMean", ["gray", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "share"], ["level"]),
        helper.make_node("Reshape", ["level", "column"], ["scores"]),
        helper.make_node("Gather", ["sizes", "turned"], ["ends"], axis=1),
        helper.make_node("Sub", ["ends", "ends"], ["starts"]),
        helper.make_node("Concat", ["starts", "ends"], ["edges"], axis=1),
        helper.make_node("Cast", ["edges"], ["float_edges"], to=floats),
        helper.make_node("Reshape", ["float_edges", "flat"], ["boxes"]),
        helper.make_node("Gather", ["starts", "zero"], ["labels"], axis=1),
        helper.make_node("Squeeze", ["labels", "axis"], ["nothing"]),
        helper.make_node("Add", ["nothing", "one"], ["count"]),
    ]  # fmt: skip
    values = {
        "axes": [1, 2, 3],
        "turned": [1, 0],
        "flat": [-1, 1, 4],
        "column": [-1, 1],
        "zero": [0],
        "axis": [1],
        "one": [1],
    }
    initial = [helper.make_tensor(name, integers, [len(value)], value) for name, value in values.items()]
    initial.append(helper.make_tensor("share", floats, [], [1 / 255]))
    inputs: list[Any] = [("pixels", TensorProto.UINT8, ["b", 3, "h", "w"]), ("sizes", integers, ["b", 2])]
    outputs: list[Any] = [
        ("boxes", floats, ["b", 1, 4]),
        ("scores", floats, ["b", 1]),
        ("labels", integers, ["b", 1]),
        ("count", integers, ["b"]),
    ]
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info(*one) for one in inputs], [helper.make_tensor_value_info(*one) for one in outputs], initial
    )  # fmt: skip
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    resize = {"short_side": 32, "long_side": 64, "interpolation": "bilinear", "kernel": "reference"}
    facts = {"class_names": ["thing"], "resize": resize, "pad_multiple": 32, "least_side": 32}
    for key, value in facts.items():
        file.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(file)
    folder = tmp_path_factory.mktemp("served")
    onnx.save(file, folder / "detector.onnx")
    shutil.copy(ROOT / "stage2_detect/deploy/onnx_detector.py", folder)
    return folder / "detector.onnx"


@pytest.fixture
def server(model: Path) -> Iterator[Any]:
    flags = [
        "--port",
        "0",
        "--threads",
        "1",
        "--score_threshold",
        "0",
        "--max_bytes",
        "200000",
        "--max_pixels",
        "40000",
    ]
    with serve.server_of([str(model), *flags, "--upload_seconds", "1", "--connections", "60"]) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.batcher.close()


def request(server: Any, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    host, port = server.server_address
    connection = HTTPConnection(host, port, timeout=30)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content else None


def encoded(level: int, width: int = 48, height: int = 32, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(file, kind, **options)
    return file.getvalue()


def test_fifty_clients_get_their_own_answers(server: Any) -> None:
    gate = threading.Barrier(50)

    def client(number: int) -> None:
        gate.wait()
        for turn in range(4):
            level, width = (number * 5 + turn) % 256, (32, 64)[number % 2]
            status, answer = request(server, "POST", "/detect", encoded(level, width))
            assert status == 200
            (one,) = answer["detections"]
            assert (one["name"], one["box"], answer["width"]) == ("thing", [0, 0, width, 32], width)
            assert one["score"] == pytest.approx(level / 255, abs=1e-4)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(client, range(50)))
    status, health = request(server, "GET", "/health")
    assert (status, health["status"], health["images"], health["waiting"]) == (200, "ok", 200, 0)
    assert health["batches"] <= 200


def test_images_that_wait_become_one_batch(server: Any) -> None:
    batcher, detector = server.batcher, server.batcher.detector
    started, gate, sizes, run = threading.Event(), threading.Event(), [], detector.run

    def slow(batch: Any, *arguments: Any) -> Any:
        sizes.append([one[0].shape[2] for one in batch])
        started.set()
        assert gate.wait(20)
        return run(batch, *arguments)

    detector.run = slow
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(request, server, "POST", "/detect", encoded(1, 64))
        assert started.wait(20)
        others = [pool.submit(request, server, "POST", "/detect", encoded(9, width)) for width in (32, 64, 32, 64, 32)]
        while batcher.state()["waiting"] < 5:
            time.sleep(0.005)
        gate.set()
        answers = [one.result() for one in (first, *others)]
    assert [status for status, _ in answers] == [200] * 6
    assert sorted(map(tuple, sizes[1:])) == [(32, 32, 32), (64, 64)]
    detector.run = run


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_hostile_uploads_are_refused_and_the_service_goes_on(server: Any) -> None:
    post = ("POST", "/detect")
    sound = encoded(70, kind="jpeg")
    for body in (
        b"",
        b"nothing",
        sound[:200],
        b"GIF89a" + bytes(50),
        b"\xff\xd8\xff" + bytes(90),
        encoded(3)[:60],
        b"<svg/>",
    ):
        assert request(server, *post, body)[0] == 415, body[:10]
    for side in (201, 12_000, 60_000):
        status, answer = request(server, *post, bomb(side))
        assert (status, answer) == (413, {"error": "more than 40000 pixels"})
    assert request(server, *post, bytes(200_001)) == (413, {"error": "more than 200000 bytes"})
    for value in ("-5", "1e3", "9" * 40, "٣"):
        status = raw(server, f"POST /detect HTTP/1.0\r\nContent-Length: {value}\r\n\r\n".encode())
        assert status in (411, 413), value
    assert raw(server, b"POST /detect HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n") == 411
    assert raw(server, b"POST /detect HTTP/1.0\r\nContent-Length: 50\r\n\r\nshort", end=True) == 400
    assert raw(server, b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n") == 414
    assert raw(server, b"GET /health HTTP/1.0\r\n" + b"a: b\r\n" * 200 + b"\r\n") == 431
    assert request(server, "GET", "/detect")[0] == request(server, "POST", "/health", b"")[0] == 404
    assert raw(server, b"PUT /detect HTTP/1.0\r\n\r\n") == 501
    status, answer = request(server, *post, sound)
    assert status == 200
    assert answer["detections"][0]["box"] == [0, 0, 48, 32]


def test_an_image_is_turned_upright(server: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _, answer = request(server, "POST", "/detect", encoded(70, 40, 20, kind="jpeg", exif=exif))
    assert (answer["width"], answer["height"]) == (20, 40)


def raw(server: Any, content: bytes, *, end: bool = False) -> int:
    """Status of the answer to these bytes."""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(content)
        if end:
            connection.shutdown(socket.SHUT_WR)
        line = connection.makefile("rb").readline()
    return int(line.split()[1])


def test_slow_uploads_end_and_cost_nobody_else_an_answer(server: Any) -> None:
    stop = threading.Event()

    def drip(content: bytes) -> bytes:
        """Send the beginning at once, and then a byte every 50 ms for as long as the server takes them."""
        with socket.create_connection(server.server_address, timeout=30) as connection:
            connection.sendall(content)
            with suppress(OSError):
                while not stop.wait(0.05):
                    connection.sendall(b"x")
                    connection.setblocking(False)
                    try:
                        if received := connection.recv(1000):
                            return received
                        return b"closed"
                    except BlockingIOError:
                        connection.setblocking(True)
        return b"closed"

    with ThreadPoolExecutor(12) as pool:
        bodies = [pool.submit(drip, b"POST /detect HTTP/1.0\r\nContent-Length: 100000\r\n\r\n") for _ in range(5)]
        heads = [pool.submit(drip, b"POST /detect HTTP/1.0\r\nX: ") for _ in range(5)]
        assert request(server, "POST", "/detect", encoded(9))[0] == 200
        for one in bodies:
            assert b" 408 " in one.result(20)
        for one in heads:
            assert one.result(20) == b"closed"
        stop.set()


def test_connections_above_the_limit_are_refused(server: Any) -> None:
    idle = [socket.create_connection(server.server_address) for _ in range(60)]
    status = 200
    for _ in range(100):  # until the server has accepted all of them
        status = raw(server, b"GET /health HTTP/1.0\r\n\r\n")
        if status == 503:
            break
    assert status == 503
    for one in idle:
        one.close()
    end = time.monotonic() + 20
    while raw(server, b"GET /health HTTP/1.0\r\n\r\n") != 200:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_queue_and_a_failing_network(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.batcher, "_limit", 0)
    assert request(server, "POST", "/detect", encoded(9)) == (503, {"error": "busy: try again later"})
    monkeypatch.undo()
    monkeypatch.setattr(server.batcher.detector, "run", lambda *_: 1 / 0)
    assert request(server, "POST", "/detect", encoded(9)) == (500, {"error": "internal error"})
    monkeypatch.undo()
    assert request(server, "POST", "/detect", encoded(9))[0] == 200


def test_masks_as_run_lengths() -> None:
    draw = np.random.default_rng(0)
    masks = draw.uniform(size=(3, 5, 7)) < 0.5
    masks[0], masks[1] = True, False
    found = type("Found", (), {"names": ["a"] * 3, "scores": np.ones(3), "boxes": np.zeros((3, 4)), "masks": masks})
    for row, mask in zip(serve.as_json(found, (5, 7))["detections"], masks, strict=True):
        counts = row["mask"]["counts"]  # by COCO's definition: columns first, lengths of outside and inside in turn
        np.testing.assert_array_equal(np.repeat(np.arange(len(counts)) % 2, counts).reshape(7, 5).T, mask)
        assert row["mask"]["size"] == [5, 7]
