"""What the evaluator measures a model on, and how: the breaks that a whole suite once let pass."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats

from lightning_compress import quantize_static
from lightning_compress.lab.data import Digits, ImageFolder
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.models import DCGAN, VAE, RecurrentVAE
from lightning_compress.lab.workflow.costs import write_files
from lightning_compress.lab.workflow.quality import Evaluator
from lightning_compress.quantization.fake_quantize import fake_quantized


class Splits:
    """Data of three splits that a test can tell apart; no features are measured."""

    kind, labelled, paired = "images", False, False
    dims, fingerprint = {"num_classes": 2}, "0"

    def __init__(self, **splits):
        for name, x in splits.items():
            dataset = SimpleNamespace(tensors=(x, torch.zeros(len(x), dtype=torch.long)))
            setattr(self, f"{name}_dataset", dataset)


def evaluator(kind="vae", metric=None, **splits):
    settings = {"metric": metric, "feature": "own", "samples": None, "importance_samples": 0}
    return Evaluator(OmegaConf.create(settings), Splits(**splits), kind, "toy")


def pixels(count, level):
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return level + 0.1 * noise


def test_irreducible_nats_are_those_of_the_test_images():
    x = pixels(6, 0.3)
    found = evaluator(test=x).irreducible(VAE(image_size=8, width=8))
    entropy = stats.bernoulli(x.double().numpy()).entropy().reshape(6, -1).sum(1).mean()
    assert found["neg_elbo"] == found["neg_iwae"] == pytest.approx(entropy, rel=1e-6)
    assert "nats_per_step" not in found
    steps = evaluator("recurrent_vae", test=x[:, 0])
    found = steps.irreducible(RecurrentVAE(steps=8, features=8, hidden=8))
    assert found["nats_per_step"] == pytest.approx(entropy / 8, rel=1e-6)
    tokens = torch.ones(4, 5).long()
    found = evaluator(test=tokens).irreducible(RecurrentVAE(steps=5, vocab_size=9, hidden=8))
    assert (found["neg_elbo"], found["perplexity"]) == (0.0, 1.0)


def test_the_verdict_pairs_the_runs_own_seed_and_takes_the_others_for_mean_and_spread():
    made = evaluator(test=pixels(6, 0.3))
    rows = [{"neg_elbo": value, "kl": 9.0} for value in (60.0, 70.0, 80.0)]
    model = VAE(image_size=8, width=8)
    found = made.verdict(model, rows, [{"neg_elbo": 60.5, "kl": 9.0}])
    least = made.irreducible(model)["neg_elbo"]
    assert (found.n, found.difference, found.dense_mean) == (1, 0.5, 70.0)
    assert found.irreducible == least
    assert found.margin == pytest.approx(0.02 * (70.0 - least))


def test_quality_is_measured_on_the_test_split_and_with_quantized_activations():
    """Both against `likelihood` itself: on the rows that it should be, in the mode that it should.

    Two bits leave no doubt which of the two computed; the splits differ in their brightness.
    """
    torch.manual_seed(0)
    splits = {"train": pixels(8, 0.1), "val": pixels(8, 0.8), "test": pixels(8, 0.4)}
    model = VAE(image_size=8, width=8, latent_dim=4).eval()
    plain = likelihood(model, splits["test"])
    for part, (module, _) in model.parts().items():
        x = model.latents(16, seed=0) if part == "decoder" else splits["train"]
        quantize_static(module, [(x,)], activation_bits=2)
    with fake_quantized(model):
        expected = {name: likelihood(model, x)["neg_elbo"] for name, x in splits.items()}
    assert len({round(value, 2) for value in (*expected.values(), plain["neg_elbo"])}) == 4
    found = evaluator(**splits).quality(model)["neg_elbo"]
    assert found == pytest.approx(expected["test"], rel=1e-6)
    rounded = likelihood(model, splits["test"])["neg_elbo"]  # weights alone are on grids
    assert found != pytest.approx(rounded, rel=1e-4)


def test_images_without_labels_have_a_frechet_distance(tmp_path):
    """In a folder of loose files, as unlabelled data lie: the extractor's check is told."""
    digits = Digits(image_size=16)
    digits.setup()
    for index, image in enumerate(digits.train_dataset.tensors[0][:200, 0]):
        Image.fromarray((image * 255).byte().numpy()).save(tmp_path / f"{index}.png")
    data = ImageFolder(tmp_path, image_size=16, grey=True, test_fraction=0.2)
    data.setup()
    assert not data.labelled
    settings = {"metric": None, "feature": "own", "samples": None, "cache_dir": tmp_path / "cache"}
    made = Evaluator(OmegaConf.create(settings), data, "gan", "loose")
    described = made.describe()
    assert described["feature"].startswith("loose-rotation-")
    assert described["feature_task"] == "rotation"
    assert 0.3 < described["feature_accuracy"] <= 1  # 0.25 by chance
    assert f"{described['feature_accuracy']:.1%} of the test examples" in described["notes"][0]
    torch.manual_seed(0)
    model = DCGAN(image_size=16, width=8, discriminator_width=8).eval()
    assert made.quality(model)["fid"] > 2 * described["floor"]["fid"]
    assert made.monitor(model)["val/kid"] > 0


def test_the_sizes_of_a_gan_are_those_of_its_generator(tmp_path):
    model = DCGAN(image_size=8, width=8, discriminator_width=8)
    export = OmegaConf.create({"codec": "auto", "onnx": False})
    sizes, artifact = write_files(model, tmp_path, export)
    torch.save(model.generator.state_dict(), tmp_path / "model.pt")
    assert sizes["torch"] == (tmp_path / "model.pt").stat().st_size
    assert artifact.bytes == (tmp_path / "model.lcz").stat().st_size < sizes["torch"]
