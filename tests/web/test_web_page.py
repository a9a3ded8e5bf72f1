"""The page draws what ONNX Runtime draws: headless Chromium over loopback, `make test-web`."""

import importlib.util
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import export_onnx, onnx_session, quantize_static, quantize_weights

WEB = Path(__file__).parents[2] / "experiments" / "web"
BROWSERS = ("chromium", "chromium-browser", "chrome", "google-chrome")
SECONDS = 90

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (WEB / "node_modules" / "onnxruntime-web").is_dir(),
        reason="no onnxruntime-web: make test-web installs it with npm",
    ),
    pytest.mark.skipif(
        not any(map(shutil.which, BROWSERS)), reason="no Chromium: apt install chromium"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("brotli") is None,
        reason="brotli is not installed: pip install 'lightning-compress[web]'",
    ),
]


def page_pixels(model, latents, low, folder):
    """What the page's canvas holds for each row of latents: (N, height, width, 4)."""
    spec = importlib.util.spec_from_file_location("serve", WEB / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    server = serve.make_server(model, low=low, latents=latents.tolist())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    browser = subprocess.Popen(
        [
            next(filter(None, map(shutil.which, BROWSERS))),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            f"--user-data-dir={folder / 'profile'}",
            f"http://127.0.0.1:{server.server_port}/?check",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + SECONDS
        while not server.received and time.monotonic() < end and browser.poll() is None:
            time.sleep(0.1)
    finally:
        browser.terminate()
        browser.wait(20)
        server.shutdown()
        thread.join()
        server.server_close()
    assert server.received, f"the page posted no pixels within {SECONDS} s"
    assert server.sent["/model.onnx"] == "br"
    return np.asarray(server.received[0]).reshape(len(latents), 8, 8, 4)


@pytest.mark.parametrize("kind", ["int8", "weights_only", "fp32"])
@pytest.mark.parametrize(("channels", "low"), [(1, 0.0), (3, -1.0)])
def test_the_canvas_holds_the_pixels_of_onnxruntime(kind, channels, low, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 8 * 16),
        nn.Unflatten(1, (8, 4, 4)),
        nn.ReLU(),
        nn.ConvTranspose2d(8, channels, 4, 2, 1),
        nn.Tanh() if low else nn.Sigmoid(),
    )
    z = torch.randn(5, 6)
    if kind == "int8":
        quantize_static(module, [torch.randn(64, 6)])
    elif kind == "weights_only":
        quantize_weights(module)
    info = export_onnx(module, tmp_path / "m.onnx", z[:2], int8=kind != "fp32")
    assert bool(info.session) == (kind == "weights_only")
    found = page_pixels(info.path, z, low, tmp_path)
    session = onnx_session(info.path, threads=1)
    images = session.run(None, {session.get_inputs()[0].name: z.numpy()})[0]
    expected = 255 * (images - low) / (1 - low)
    assert expected.std() > 5
    colors = found[..., :3].transpose(0, 3, 1, 2)[:, :channels]
    assert np.abs(colors - expected).max() <= 1
    assert (found[..., 3] == 255).all()
