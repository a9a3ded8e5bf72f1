"""What every model promises, asked of all of them; see `lightning_compress.lab.models.base`."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.lab.models import (
    DCGAN,
    VAE,
    WGANGP,
    CompressibleModel,
    RecurrentVAE,
    ResNet18,
    SimpleNet,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
PICTURE = {"image_size": 16, "width": 8}
MODELS = {
    "dcgan": lambda: DCGAN(**PICTURE, channels=3, discriminator_width=8),
    "wgan_gp": lambda: WGANGP(**PICTURE, critic_steps=2, discriminator_width=8),
    "vae": lambda: VAE(**PICTURE),
    "vae_gaussian": lambda: VAE(**PICTURE, channels=3, likelihood="gaussian"),
    "sequence": lambda: RecurrentVAE(features=4, steps=6, hidden=8),
    "tokens": lambda: RecurrentVAE(vocab_size=9, steps=6, hidden=8, embedding=8),
    "simple_net": lambda: SimpleNet(**PICTURE, num_classes=5),
    "resnet18": lambda: ResNet18(**PICTURE, channels=1, num_classes=5),
    "resnet18_large": lambda: ResNet18(image_size=64, width=8, channels=3, num_classes=5),
}
GENERATIVE = ["dcgan", "wgan_gp", "vae", "vae_gaussian", "sequence", "tokens"]
DEPLOYED = {
    "gan": ("generator",),
    "vae": ("encoder", "decoder"),
    "recurrent_vae": ("encoder", "decoder"),
    "classifier": ("net",),
}


@pytest.fixture(params=MODELS)
def model(request):
    seed_everything(0, verbose=False)
    return MODELS[request.param]()


def batches(model, n=8):
    """Two batches of the kind of x that the model reads."""
    torch.manual_seed(0)
    if isinstance(model, RecurrentVAE) and model.discrete:
        x = torch.randint(4, 9, (n, model.steps))
        x[:, 0], x[:, -1] = 1, 2
    elif isinstance(model, RecurrentVAE):
        x = torch.rand(n, model.steps, model.hparams["features"])
    else:
        size = model.hparams["image_size"]
        x = torch.rand(n, model.hparams["channels"], size, size)
    return DataLoader(TensorDataset(x, torch.randint(0, 5, (n,))), n // 2)


def trainer(**arguments):
    return Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip


def test_deployed_module_is_shared_not_copied(model):
    assert isinstance(model, CompressibleModel)
    assert model.deployed == DEPLOYED[model.kind]
    shipped = model.deployed_module()
    if len(model.deployed) == 1:
        assert shipped is model.get_submodule(model.deployed[0])
    else:
        assert [name for name, _ in shipped.named_children()] == list(model.deployed)
    own = {id(p) for path in model.deployed for p in model.get_submodule(path).parameters()}
    assert {id(p) for p in shipped.parameters()} == own
    assert shipped.load_state_dict(shipped.state_dict(), strict=True)
    model.eval()
    assert not any(module.training for module in model.deployed_module().modules())


def test_shipped_networks_are_export_friendly(model):
    for module in model.deployed_module().modules():
        assert not getattr(module, "inplace", False)
    buffers = {name.split(".")[-1] for name, _ in model.deployed_module().named_buffers()}
    assert buffers <= {"running_mean", "running_var", "num_batches_tracked"}
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", GENERATIVE)
def test_latents_are_repeatable(name):
    model = MODELS[name]()
    before = torch.get_rng_state()
    z = model.latents(5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert z.shape == (5, model.latent_dim)
    assert torch.equal(z, model.latents(5, seed=3))
    assert not torch.equal(z, model.latents(5, seed=4))


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("cls", "extra"), [(DCGAN, {}), (WGANGP, {}), (VAE, {}), (VAE, {"likelihood": "gaussian"})]
)
def test_images_lie_in_the_unit_range(cls, extra, size, channels):
    model = cls(image_size=size, channels=channels, width=8, **extra).eval()
    z = 5 * model.latents(3, seed=0)
    pictures = model.images(z)
    assert pictures.shape == (3, channels, size, size)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert not pictures.requires_grad
    assert torch.equal(pictures, model.images(z))
    model.train()
    model.images(z)
    assert model.training


def test_sampler_comes_first_and_samples_are_on_the_cpu(model):
    parts = model.parts()
    assert set(parts) <= set(model.deployed)
    assert next(iter(parts)) in ("generator", "decoder", "net")
    for module, inputs in parts.values():
        assert all(x.shape[0] == 2 and x.device.type == "cpu" for x in inputs)
        module.eval()(*inputs)


def test_checkpoint_round_trip(model, tmp_path):
    fit = trainer()
    fit.fit(model, batches(model))
    fit.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)  # hyperparameters are plain
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")
    assert dict(loaded.hparams) == dict(model.hparams)
    theirs, ours = loaded.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_hyperparameters_from_a_config_are_plain(tmp_path):
    config = OmegaConf.create({"betas": [0.1, 0.9]})
    model = DCGAN(**PICTURE, betas=config.betas)
    assert model.hparams["betas"] == (0.1, 0.9)
    assert type(model.hparams["betas"]) is tuple


def test_bf16_mixed_keeps_losses_in_float32(model):
    fit = trainer(precision="bf16-mixed")
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    fit.fit(model, batches(model), batches(model))
    assert fit.callback_metrics
    for name, value in fit.callback_metrics.items():
        assert value.dtype == torch.float32, name
        assert value.isfinite(), name
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(before, after)


# torch 2.14 warns of its own calls while it exports nn.GRU, and of inputs that share "batch".
@pytest.mark.filterwarnings("ignore:.*shares the same shape constraints.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*attribute of a Tensor that is not a leaf.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*_flat_weights.*:UserWarning")
def test_onnx_runtime_gives_the_same(model, tmp_path):
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    warm_up(model)
    for name, (module, inputs) in model.eval().parts().items():
        path = tmp_path / f"{name}.onnx"
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} for _ in inputs)
        torch.onnx.export(module, inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        five = [resized(x) for x in inputs]
        names = [node.name for node in session.get_inputs()]
        found = session.run(None, {n: x.numpy() for n, x in zip(names, five, strict=True)})
        with torch.no_grad():
            expected = module(*five)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-5)


def warm_up(model):
    """BatchNorm statistics and weights that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)


def resized(x):
    if x.is_floating_point():
        return torch.rand(5, *x.shape[1:])
    tokens = torch.randint(3, 9, (5, *x.shape[1:]))
    lengths = torch.arange(1, 6).view(5, 1)  # rows of different lengths
    return tokens.masked_fill(torch.arange(x.shape[1]) >= lengths, 0)


TEXT = {"vocab_size": 9, "steps": 6}


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (DCGAN, {"image_size": 20 + 1}, "nearest valid sizes: 20, 24"),
        (VAE, {"image_size": 15}, "nearest valid sizes: 14, 16"),
        (VAE, {"image_size": None}, "image_size is None"),
        (VAE, {**PICTURE, "channels": 0}, "channels=0"),
        (VAE, {**PICTURE, "latent_dim": 2.5}, "latent_dim=2.5"),
        (VAE, {**PICTURE, "likelihood": "beta"}, "likelihood='beta'"),
        (VAE, {**PICTURE, "observation_std": 0}, "observation_std=0"),
        (VAE, {**PICTURE, "kl_weight": -1}, "kl_weight=-1"),
        (VAE, {**PICTURE, "lr": "fast"}, "lr='fast'"),
        (VAE, {**PICTURE, "width_multiplier": 0}, "width_multiplier=0"),
        (VAE, {"image_size": 16, "width": True}, "width=True"),
        (DCGAN, {**PICTURE, "loss": "lsgan"}, "'non_saturating', 'hinge'"),
        (DCGAN, {**PICTURE, "discriminator_width": 0}, "discriminator_width=0"),
        (WGANGP, {**PICTURE, "critic_steps": 0}, "critic_steps=0"),
        (WGANGP, {**PICTURE, "gradient_penalty": -1}, "gradient_penalty=-1"),
        (RecurrentVAE, {"steps": 6}, "exactly one"),
        (RecurrentVAE, {**TEXT, "features": 4}, "exactly one"),
        (RecurrentVAE, {"features": 4, "steps": None}, "steps is None"),
        (RecurrentVAE, {"features": 4, "steps": 6, "word_dropout": 0.5}, "needs vocab_size"),
        (RecurrentVAE, {**TEXT, "word_dropout": 1.5}, "word_dropout=1.5"),
        (RecurrentVAE, {**TEXT, "likelihood": "gaussian"}, "likelihood='gaussian'"),
        (RecurrentVAE, {"vocab_size": 4, "steps": 6}, "vocab_size=4"),
        (RecurrentVAE, {**TEXT, "hidden": 0}, "hidden=0"),
        (SimpleNet, {**PICTURE, "num_classes": 1}, "num_classes=1"),
        (ResNet18, {"image_size": 2, "num_classes": 10}, "image_size=2"),
    ],
)
def test_bad_arguments_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)
