"""Every scheme of QuantizationAwareTraining, pruned in the same run, through to the int8 file."""

import numpy as np
import onnx
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from onnx import numpy_helper
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    EntropyGrid,
    GradualPruning,
    QuantizationAwareTraining,
    compression_state,
    export_onnx,
    fake_quantized,
    onnx_session,
)
from lightning_compress.lab.models import DCGAN, VAE, RecurrentVAE

MODELS = {
    "dcgan": lambda: DCGAN(image_size=16, width=8),
    "vae": lambda: VAE(image_size=16, width=8),
    "recurrent_vae": lambda: RecurrentVAE(steps=4, features=8, hidden=16),
}
SCHEMES = {  # options, and whether whole numbers are computed with
    "symmetric": ({}, True),
    "affine": ({}, True),
    "learned_step": ({}, True),
    "codebook": ({"weight_bits": 4}, False),
    "entropy": ({"entropy": EntropyGrid(step=0.3), "weight_bits": 8}, True),
}


def trained(name, scheme):
    seed_everything(0, verbose=False)
    model = MODELS[name]()
    shape = (4, 8) if name == "recurrent_vae" else (1, 16, 16)
    data = TensorDataset(torch.rand(32, *shape), torch.zeros(32))
    callbacks = [
        GradualPruning(final_sparsity=0.5, end=0.5),
        QuantizationAwareTraining(scheme=scheme, **SCHEMES[scheme][0]),
    ]
    trainer = Trainer(
        max_epochs=4,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model, DataLoader(data, batch_size=8))
    return model.eval()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_the_file_computes_what_training_saw(name, scheme, tmp_path):
    model = trained(name, scheme)
    for part, (module, sample) in model.parts().items():
        info = export_onnx(module, tmp_path / f"{part}.onnx", sample, int8=True)
        state = compression_state(module)
        kept = {
            path
            for path, source in info.weights.items()
            if "trained" in source or "codebook" in source
        }
        assert kept == set(state.grids), (part, info.weights)
        parity = info.parity["onnxruntime"]
        # Biases too are what an int8 kernel holds, so that no rounding falls the other way.
        assert parity.equal > 0.999 or scheme == "codebook", (part, parity)
        if name != "recurrent_vae":  # its few layers with int8 inputs stand beside the recurrence
            assert bool(info.int8_ops) == SCHEMES[scheme][1], (part, info.int8_ops)
        # Independent of the check that export made: the module itself, on its grids.
        with torch.no_grad(), fake_quantized(module):
            expected = module(*sample)
        expected = expected if isinstance(expected, tuple) else (expected,)
        session = onnx_session(tmp_path / f"{part}.onnx", threads=1)
        names = [one.name for one in session.get_inputs()]
        found = session.run(None, {n: x.numpy() for n, x in zip(names, sample, strict=True)})
        for got, want in zip(found, expected, strict=True):
            spread = float(want.max() - want.min())
            assert np.abs(got - want.numpy()).mean() <= 0.01 * spread


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "codebook"])
def test_zeros_are_zeros_in_the_file(scheme, tmp_path):
    module, sample = trained("dcgan", scheme).parts()["generator"]
    path = tmp_path / "m.onnx"
    export_onnx(module, path, sample, int8=True)
    stored = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    for weight in compression_state(module).masks:
        names = [n for n in stored if n.startswith(f"{weight}.") and stored[n].ndim > 1]
        assert len(names) == 1, (weight, list(stored))
        whole = stored[names[0]].astype(np.int64)
        point = stored.get(f"{weight}.zero_point", np.zeros((), np.uint8)).astype(np.int64)
        point = point.reshape(-1, *[1] * (whole.ndim - 1)) if point.ndim else point
        pruned = float((module.get_parameter(weight) == 0).float().mean())
        assert pruned > 0.3
        assert (whole == point).mean() >= pruned - 1e-9, weight
