"""Serves the page of this folder, and a generator's ONNX file with brotli, over loopback.

npm install --prefix experiments/web --no-package-lock
python experiments/web/serve.py model.onnx [--low -1] [--port 8000]

The model may be an `.lcz` file that holds a graph. `--low` is the value of black: -1 behind a Tanh.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lightning_compress import onnx_model
from lightning_compress.conversion.session import session_options
from lightning_compress.errors import require
from lightning_compress.lcz.protobuf import model_options

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web" / "dist"
TYPES = {
    ".html": "text/html",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}


class Server(ThreadingHTTPServer):
    """On loopback alone; pages lie in memory, `encoded` holds some of them behind brotli.

    What pages post is in `received`, and which encoding a path was sent with in `sent`.
    """

    def __init__(self, port: int, pages: dict[str, bytes], encoded: dict[str, bytes]) -> None:
        self.pages, self.encoded = pages, encoded
        self.received: list[Any] = []
        self.sent: dict[str, str] = {}
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's pages, and with files of the runtime from its package."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        path = "/index.html" if path == "/" else path
        accepted = [one.strip() for one in self.headers.get("Accept-Encoding", "").split(",")]
        brotli = path in self.server.encoded and "br" in accepted
        runtime = RUNTIME / Path(path).name
        if brotli:
            body = self.server.encoded[path]
        elif path in self.server.pages:
            body = self.server.pages[path]
        elif path.startswith("/ort/") and runtime.is_file():
            body = runtime.read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(Path(path).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(body)))
        self.server.sent[path] = "br" if brotli else ""
        if brotli:
            self.send_header("Content-Encoding", "br")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        self.server.received.append(json.loads(self.rfile.read(size)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:  # pyright: ignore
        """Stay quiet."""


def make_server(model: Path, *, low: float = 0.0, latents: Any = (), port: int = 0) -> Server:
    """The server, which does not serve yet.

    Args:
        model: an ONNX file, or an `.lcz` file that holds a graph.
        low: the value of black.
        latents: that the page draws from when it is asked for with `?check`.
        port: 0 for any free one.

    Raises:
        MissingExtraError: when brotli is not installed.
    """
    data = onnx_model(model) if model.suffix == ".lcz" else model.read_bytes()
    nested: dict[str, Any] = {}
    for key, value in session_options(model_options(data)).items():
        group, _, name = key.partition(".")
        nested.setdefault(group, {})[name] = value
    settings = {"low": low, "options": nested}
    pages = {
        "/index.html": (HERE / "index.html").read_bytes(),
        "/settings.json": json.dumps(settings).encode(),
        "/latents.json": json.dumps(latents).encode(),
        "/model.onnx": data,
    }
    return Server(port, pages, {"/model.onnx": compressed(data)})


def compressed(data: bytes) -> bytes:
    """The same bytes behind brotli, quality 11."""
    return require("brotli", extra="web").compress(data, quality=11)


def main() -> None:
    """Serve until it is interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--low", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    if not RUNTIME.is_dir():
        parser.error("no onnxruntime-web: npm install --prefix experiments/web --no-package-lock")
    server = make_server(given.model, low=given.low, port=given.port)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
