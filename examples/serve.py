"""Serve an exported detector over HTTP without torch: post an image, get its detections as JSON.

python examples/serve.py runs/detector_export/detector.onnx --port 8000

    curl --data-binary @photo.jpg http://localhost:8000/detect
    curl http://localhost:8000/health

Needs numpy, onnxruntime, Pillow, and `onnx_detector.py`, which the export writes beside the ONNX file. Images that wait while the network runs form
the next batch, if they are padded to one shape, so an answer does not depend on other requests. An upload is refused if it is too large
(413), too slow (408), no image (415), or one too many (503). Encryption and access control belong to a proxy in front.
"""

import argparse
import importlib.util
import io
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class Refused(Exception):
    """A request that is answered with an HTTP status and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Batcher:
    """Detects in the images of many threads, in batches.

    Args:
        detector: an `OnnxDetector`.
        most: images per batch.
        waiting: images that may wait.
    """

    def __init__(self, detector: Any, *, threshold: float, most: int, waiting: int) -> None:
        self.detector, self._threshold, self._most, self._limit = detector, threshold, most, waiting
        self._waiting: deque[tuple[Any, tuple[int, ...], Future[Any]]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self.images = self.batches = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def detect(self, prepared: Any, shape: tuple[int, ...]) -> Any:
        """Return the detections of an image of this shape that the detector's `prepare` has prepared."""
        result: Future[Any] = Future()
        with self._change:
            if self._closed or len(self._waiting) >= self._limit:
                raise Refused(503, "busy: try again later")
            self._waiting.append((prepared, shape, result))
            self._change.notify()
        return result.result()

    def state(self) -> dict[str, int]:
        """Return how many images wait, and how many images and batches are done."""
        return {"waiting": len(self._waiting), "images": self.images, "batches": self.batches}

    def close(self) -> None:
        """Finish the images that wait, then end."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            prepared, shapes, results = zip(*batch, strict=True)
            try:
                for result, found in zip(results, self.detector.run(prepared, shapes, self._threshold), strict=True):
                    result.set_result(found)
            except Exception as error:  # such as memory that is used up: of these images alone
                for result in results:
                    if not result.done():
                        result.set_exception(error)
            self.images += len(batch)
            self.batches += 1

    def _next(self) -> list[Any]:
        """Wait for images; the oldest one and others padded to its shape, or nothing at the end."""
        with self._change:
            while not self._waiting and not self._closed:
                self._change.wait()
            shape = self._waiting[0][0][0].shape if self._waiting else ()
            batch = [one for one in self._waiting if one[0][0].shape == shape][: self._most]
            taken = {id(one) for one in batch}
            self._waiting = deque(one for one in self._waiting if id(one) not in taken)
            return batch


class TimedReader(io.RawIOBase):
    """Bytes of a connection, all of which have to arrive before a deadline; a timeout per read would let a slow sender stay forever."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class DetectionServer(ThreadingHTTPServer):
    """The service on `port` (0: a free one); see the flags of this script for the limits."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, module: Any, batcher: Batcher, limits: argparse.Namespace) -> None:
        self.module, self.batcher, self.limits = module, batcher, limits
        self._connections = threading.BoundedSemaphore(limits.connections)
        self.decoding = threading.BoundedSemaphore(os.cpu_count() or 1)  # memory: few decoded images at once
        super().__init__((host, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse one too many without a thread."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        request.settimeout(1)
        with suppress(OSError):
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that break off."""


class Handler(BaseHTTPRequestHandler):
    """One request: GET /health, or POST /detect with an image as its body."""

    server: DetectionServer
    server_version, sys_version = "detector", ""

    def setup(self) -> None:
        """Limit the time of headers and body together."""
        super().setup()
        self.rfile = io.BufferedReader(TimedReader(self.connection, self.server.limits.upload_seconds))

    def do_GET(self) -> None:
        """Answer /health."""
        if self.path == "/health":
            self._answer(200, {"status": "ok", **self.server.batcher.state()})
        else:
            self._answer(404, {"error": "GET /health or POST /detect"})

    def do_POST(self) -> None:
        """Answer /detect."""
        try:
            if self.path != "/detect":
                raise Refused(404, "GET /health or POST /detect")
            prepared, shape = self._prepare(self._body())
            self._answer(200, as_json(self.server.batcher.detect(prepared, shape), shape))
        except Refused as error:
            self._answer(error.status, {"error": str(error)})
            self._discard()
        except Exception as error:
            self.log_error("%s: %s", type(error).__name__, error)
            self._answer(500, {"error": "internal error"})

    def _body(self) -> bytes:
        length, most = self.headers.get("Content-Length", ""), self.server.limits.max_bytes
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "send the image with a Content-Length")
        if len(length) > 15 or int(length) > most:
            raise Refused(413, f"more than {most} bytes")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, f"not complete after {self.server.limits.upload_seconds:g} s") from None
        if len(body) < int(length):
            raise Refused(400, "the connection ended before the image")
        return body

    def _discard(self) -> None:
        """Read what else arrives within a second: with unread bytes left, closing the connection would drop the answer."""
        end = time.monotonic() + 1
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65_536):
                    return

    def _prepare(self, body: bytes) -> tuple[Any, tuple[int, ...]]:
        most = self.server.limits.max_pixels
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:  # reads the header alone
                size = image.width * image.height
            if size <= most:
                with self.server.decoding:
                    pixels = self.server.module.decode(io.BytesIO(body))
                    return self.server.batcher.detector.prepare(pixels), pixels.shape
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            pass
        except Exception as error:  # decoders raise nearly every type for damaged files
            raise Refused(415, f"not a readable image of {', '.join(FORMATS)} ({type(error).__name__})") from None
        raise Refused(413, f"more than {most} pixels")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.connection.settimeout(self.server.limits.upload_seconds)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Log nothing for each request; errors are logged."""


def as_json(found: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Convert detections to JSON: boxes as x1, y1, x2, y2 in pixels of the upright image; masks as COCO's run lengths."""
    rows: list[dict[str, Any]] = [
        {"name": name, "score": round(float(score), 5), "box": [round(edge, 2) for edge in box]}
        for name, score, box in zip(found.names, found.scores, found.boxes.tolist(), strict=True)
    ]
    for row, mask in zip(rows, () if found.masks is None else found.masks, strict=False):
        flat = np.concatenate(
            [[False], mask.T.ravel(), [not mask[-1, -1]]]
        )  # columns first, beginning with the outside
        row["mask"] = {"size": list(mask.shape), "counts": np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()}
    return {"width": shape[1], "height": shape[0], "detections": rows}


def server_of(argv: Sequence[str] | None = None) -> DetectionServer:
    """Open the service that a command line describes, without answering yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="detector.onnx of an export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--score_threshold", type=float, default=0.5, help="lowest score, 0 to 1")
    parser.add_argument("--batch_size", type=int, default=8, help="most images per batch")
    parser.add_argument("--threads", type=int, default=0, help="threads of the network; 0: all cores")
    parser.add_argument("--connections", type=int, default=100, help="most connections at once")
    parser.add_argument("--waiting", type=int, default=64, help="most decoded images that wait for the network")
    parser.add_argument("--max_bytes", type=int, default=10_000_000, help="largest upload")
    parser.add_argument("--max_pixels", type=int, default=50_000_000, help="largest image")
    parser.add_argument("--upload_seconds", type=float, default=20.0, help="longest upload")
    limits = parser.parse_args(argv)
    file = limits.model.with_name("onnx_detector.py")
    for needed in (limits.model, file):
        if not needed.is_file():
            parser.error(f"{needed}: no such file; both are written by `ssld export`")
    spec = importlib.util.spec_from_file_location("onnx_detector", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    detector = module.OnnxDetector(str(limits.model), threads=limits.threads)
    batcher = Batcher(detector, threshold=limits.score_threshold, most=limits.batch_size, waiting=limits.waiting)
    return DetectionServer(limits.host, limits.port, module, batcher, limits)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    with server_of(argv) as server:
        print(f"http://{server.server_name}:{server.server_port}/detect", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
        server.batcher.close()


if __name__ == "__main__":
    main()
