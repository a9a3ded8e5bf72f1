"""Run folders as the workflow leaves them, with numbers that a test knows."""

import json
import math
from pathlib import Path

import torch

from lightning_compress.lab.report.sample_grids import save_comparison, save_grid


def make_results(*, place=0, ratio=31.2, within=True, **changes):
    names = ["encoder.0", "encoder.3", "mean", "log_variance", "decoder.0", "decoder.3"]
    layers = [
        {
            "name": f"{name}.{kind}",
            "shape": [64 + i, 256] if kind == "weight" else [64 + i],
            "weights": (64 + i) * (256 if kind == "weight" else 1),
            "sparsity": 0.95 - 0.07 * i if kind == "weight" else 0.0,
            "bits": 6 - i % 3 if kind == "weight" else None,
            "codec": "rle_huffman" if kind == "weight" else "raw",
            "bytes": 7013 - 991 * i if kind == "weight" else 131 + i,
            "bound_bytes": 6788.5 - 953 * i if kind == "weight" else 128.0,
        }
        for i, name in enumerate(names)
        for kind in ("weight", "bias")
    ]
    quality = {
        "neg_elbo": 25.431,
        "reconstruction": 15.872,
        "kl": 9.5591,
        "kid": 0.01234,
        "recall": 0.8123,
    }
    torch_bytes = 1_345_678
    results = {
        "model": "vae",
        "data": "digits",
        "seed": place,
        "created": "2025-03-04T05:06:07+00:00",
        "compression": {
            "distill": {"weight": 1.0},
            "prune": {"final_sparsity": 0.8 + 0.03 * place, "begin": 0.0, "end": 0.7},
            "quantize": {"weight_bits": 8 - place % 3, "scheme": "entropy"},
        },
        "steps": {"dense": 600, "compressed": 610},
        "evaluator": {
            "feature": "digits-cnn-ab12cd",
            "feature_accuracy": 0.9823,
            "samples": 397,
            "floor": {"kid": 0.00217, "recall": 0.9133},
        },
        "dense": {
            "quality": quality,
            "bytes": {
                "torch": torch_bytes,
                "safetensors": 1_340_123,
                "lcz": 1_190_456,
                "onnx": 1_352_789,
                "onnx_int8": None,
            },
            "params": 334_567,
            "nonzero_params": 334_561,
            "macs": 667_890,
            "latency_ms": {
                "torch, 1 thread, batch 1": {"median": 0.2345, "p10": 0.2211, "p90": 0.2789},
                "ONNX Runtime, 1 thread, batch 16": {"median": 1.456, "p10": 1.411, "p90": 1.634},
            },
            "train_seconds": 41.23,
        },
        "compressed": {
            "quality": {key: value * (1 + 0.011 * (place + 1)) for key, value in quality.items()},
            "bytes": {
                "torch": torch_bytes,
                "safetensors": 1_340_123,
                "lcz": round(torch_bytes / ratio),
                "lcz_graph": round(1.02 * torch_bytes / ratio),
                "onnx": 1_352_789,
                "onnx_int8": 356_421,
            },
            "params": 334_567,
            "nonzero_params": 33_457,
            "macs": 667_890,
            "latency_ms": {
                "torch, 1 thread, batch 1": {"median": 0.2312, "p10": 0.2198, "p90": 0.2677},
                "ONNX Runtime, 1 thread, batch 16": {"median": 0.9871, "p10": 0.951, "p90": 1.12},
            },
            "train_seconds": 47.89,
            "int8_ops": {
                "decoder": {
                    "int8_ops": {"QLinearConv": 3, "QGemm": 1},
                    "float_ops": {"Sigmoid": 1},
                    "reasons": {"Sigmoid": "no kernel for integers " + "_" * 60},
                    "parity": {"onnxruntime": {"max_abs_error": 0.0039}},
                }
            },
        },
        "ratio": ratio,
        "entropy_bound_bytes": 0.96 * torch_bytes / ratio,
        "baseline_spread": {
            "neg_elbo": {"mean": 25.512, "std": 0.3134, "n": 3, "min": 25.21, "max": 25.84}
        },
        "verdict": {
            "metric": "neg_elbo",
            "dense": 25.431,
            "compressed": 25.431 * (1 + 0.011 * (place + 1)),
            "difference": 25.431 * 0.011 * (place + 1),
            "allowed": 0.3134,
            "within": within,
            "higher_is_better": False,
        },
        "layers": layers,
        "samples": {"dense": "d.png", "compressed": "c.png", "grid": "samples.png"},
        "metric_info": {
            "neg_elbo": {"label": "−ELBO (nats)", "better": "lower"},
            "kid": {"label": "KID", "better": "lower"},
            "recall": {"label": "Recall", "better": "higher"},
        },
    }
    return {**results, **changes}


def make_run(folder: Path, results=None, *, curves=True, samples=True) -> Path:
    results = make_results() if results is None else results
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    if curves:
        lines = ["run,step,metric,value"]
        for run, floor in (("dense", 25.4), ("compressed", 25.7)):
            for step in range(600):
                noise = math.sin(37 * step)
                lines.append(f"{run},{step},train/loss,{floor + 40 * math.exp(-step / 90) + noise}")
            lines += [f"{run},{s},val/kid,{0.012 + math.exp(-s / 100)}" for s in range(0, 601, 60)]
        lines += [
            f"compressed,{s},compress/sparsity,{0.9 * (1 - max(0, 1 - s / 420) ** 3)}"
            for s in range(0, 600, 6)
        ]
        (folder / "curves.csv").write_text("\n".join(lines), "utf-8")
    if samples:
        ramp = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
        images = (ramp + torch.linspace(0, 1, 16).reshape(16, 1, 1, 1)) % 1.0
        save_grid(images, folder / "d.png")
        save_grid(images.round(), folder / "c.png")
        save_comparison(images, images.round(), folder / "samples.png")
    return folder
