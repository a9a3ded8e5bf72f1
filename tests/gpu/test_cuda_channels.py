"""On a CUDA device: removed channels, exported graphs, results beside the CPU's, two devices."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shrinking import FAST, Wide, run
from tiny import TinyAutoencoder, batches

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    QuantizationAwareTraining,
    export_onnx,
    load_compressed,
    onnx_session,
    save_compressed,
    sparsity,
)
from lightning_compress.channels.resize import check_sizes

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
HELPERS = Path(__file__).parents[1] / "helpers"


def trained(tmp_path, *callbacks, accelerator=DEVICE, seed=0, **more):
    torch.manual_seed(seed)
    model = Wide()
    run(tmp_path, model, *callbacks, accelerator=accelerator, devices=1, **more)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_channels_go_in_each_precision_and_come_back_from_a_file(tmp_path, precision):
    model = trained(tmp_path, ChannelPruning(final_sparsity=0.5, **FAST), precision=precision)
    assert model.encoder[0].out_features < 16
    assert check_sizes(model) == []
    assert all(torch.isfinite(one).all() for one in model.parameters())
    save_compressed(model.to(DEVICE), tmp_path / "a.lcz")
    loaded = load_compressed(tmp_path / "a.lcz", Wide().to(DEVICE)).eval()
    x = torch.randn(4, 6, device=DEVICE)
    assert torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize("int8", [False, True])
def test_a_model_on_the_device_is_exported(tmp_path, int8):
    model = trained(tmp_path, QuantizationAwareTraining()).to(DEVICE).eval()
    x = torch.randn(4, 6, device=DEVICE)
    export_onnx(model, tmp_path / "a.onnx", x, int8=int8)
    session = onnx_session(tmp_path / "a.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})[0]
    torch.testing.assert_close(
        torch.from_numpy(found), model(x).detach().cpu(), atol=0.5 if int8 else 1e-3, rtol=0.1
    )
    assert next(model.parameters()).device.type == DEVICE


def loss(model):
    with torch.no_grad():
        x = torch.cat([one[0] for one in batches(count=8)])
        return (model.eval().cpu()(x) - x).square().mean().item()


def test_results_are_those_of_the_cpu_within_the_seed_spread(tmp_path):
    def losses(accelerator):
        return torch.tensor([
            loss(trained(tmp_path, GradualPruning(final_sparsity=0.5), accelerator=accelerator,
                         seed=seed))
            for seed in range(5)
        ])  # fmt: skip

    here, there = losses("cpu"), losses(DEVICE)
    error = (here.var() / 5 + there.var() / 5).sqrt()
    assert (here.mean() - there.mean()).abs() < 4 * error + 0.01 * here.mean()


def test_two_devices_hold_the_same_masks(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: DDP needs two")
    job = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tiny import TinyAutoencoder, batches, quiet_trainer\n"
        "from lightning_compress import GradualPruning\n"
        "torch.manual_seed(1); model = TinyAutoencoder('SGD')\n"
        "trainer = quiet_trainer(Path(sys.argv[2]), GradualPruning(final_sparsity=0.5),\n"
        "    accelerator='cuda', devices=2, strategy='ddp', max_epochs=1)\n"
        "trainer.fit(model, batches(20))\n"
        "torch.save(model.cpu().state_dict(), f'{sys.argv[2]}/{trainer.global_rank}.pt')\n"
    )
    (tmp_path / "job.py").write_text(job)
    subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), str(HELPERS), str(tmp_path)],
        check=True, timeout=300,
    )  # fmt: skip
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    model = TinyAutoencoder("SGD")
    for state in (one, other):
        model.load_state_dict(state)
        assert sparsity(model) == pytest.approx(0.5, abs=0.02)
    assert all(torch.equal(one[name] == 0, other[name] == 0) for name in one if "weight" in name)
