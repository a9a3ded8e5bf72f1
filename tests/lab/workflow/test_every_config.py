"""Every shipped config is composed and instantiated; one of each group runs to results.json.

The others of a group run to the end in `make test-slow`: they differ in what is instantiated, not
in the way.
"""

import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from lightning_compress import compression_recipe, load_compressed, onnx_model
from lightning_compress.callbacks.recipe import GOALS
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.data import DigitRows, Digits
from lightning_compress.lab.workflow.experiment import run_experiment
from lightning_compress.lab.workflow.quality import generate
from lightning_compress.lab.workflow.training import (
    build_model,
    compression_callbacks,
    load_trained,
)
from tests.helpers.fonts import GLYPHS
from tests.helpers.sounds import chirps

QUICK = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "evaluate.latency_repeats=1",
    "evaluate.samples=32",
    "data.batch_size=8",
]
TO_THE_END = "compression.prune.end=1.0"  # else a run of two batches is over too late for it
MODEL_OF = {"distill_gan": "dcgan", "distill_steps": "flow_matching"}
DATA_OF = {
    "recurrent_vae": "digit_rows",
    "vocoder": "audio_folder",
    "pix2pix": "glyph_pairs",
}
MODEL_OF |= {"distill_autoencoder": "autoencoder_kl"}
AUTOENCODERS = ("autoencoder_kl", "vq_vae")


# What runs to the end in `make test`: together an autoencoder, a GAN and a recurrent model.
WHOLE = {
    "model": "wgan_gp",
    "data": "text_lines",
    "compression": "qat_entropy",
    "logger": "tensorboard",
    "experiment": "fashion_vae_fast",
}


def names(group):
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def runs(group):
    """A group's names, all but one of them slow."""
    assert WHOLE[group] in names(group)
    return [
        name if name == WHOLE[group] else pytest.param(name, marks=pytest.mark.slow)
        for name in names(group)
    ]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "features"


def composed(*overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def run(folder, cache, *overrides):
    prunes = "prune" in (composed(*overrides).compression or {})
    words = [*QUICK, *([TO_THE_END] if prunes else []), f"evaluate.cache_dir={cache}"]
    cfg = composed(*words, *overrides)
    return cfg, run_experiment(cfg, folder)


def instantiated(cfg):
    """Model, data, callbacks, loggers and Trainer of a config, as a run makes them."""
    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup()
    model = build_model(cfg, data, seed=0)
    callbacks = compression_callbacks(cfg.compression, model)
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=False, _convert_="all")
    assert all(one in trainer.callbacks for one in callbacks)
    return model, data


def check_one_file(folder, parts):
    """The file that runs holds the int8 files of all parts, to the byte."""
    for part in parts:
        name = part if len(parts) > 1 else None
        data = onnx_model(folder / "model.graph.lcz", name)
        assert data == (folder / f"{part}.int8.onnx").read_bytes()


@pytest.fixture(scope="session")
def sounds(tmp_path_factory):
    return chirps(tmp_path_factory.mktemp("sounds"), 90, seconds=0.5)


def fed(words, sounds):
    """The words, with sounds or fonts where they choose data of that kind."""
    if {"data=audio_folder", "experiment=vocoder"} & set(words):
        return [*words, f"data.folder={sounds}"]
    if {"data=glyph_pairs", "experiment=pix2pix"} & set(words):
        return [*words, *GLYPHS, "data.image_size=16"]
    return words


@pytest.mark.parametrize("model", names("model"))
def test_each_model_is_instantiated(model, sounds):
    words = fed([f"model={model}", f"data={DATA_OF.get(model, 'digits')}"], sounds)
    made, _ = instantiated(composed(*words, "model.width_multiplier=0.25"))
    for part, inputs in made.eval().parts().values():
        part(*inputs)


@pytest.mark.parametrize("data", names("data"))
def test_each_data_set_is_instantiated(folders, known_files, sounds, data):
    words = ["model.width_multiplier=0.25", f"data={data}", "data.batch_size=8"]
    words = fed(words, sounds)
    words += [one.format(folders) for one in OWN_ARGUMENTS[data]]
    model, made = instantiated(composed(*words))
    batch = next(iter(made.train_dataloader()))
    assert len(batch[0]) == 8
    for part, inputs in model.eval().parts().values():
        part(*inputs)


@pytest.mark.parametrize("compression", names("compression"))
def test_each_compression_is_instantiated(compression):
    model = MODEL_OF.get(compression, "vae")
    cfg = composed(f"compression=[{compression}]", f"model={model}", "model.width_multiplier=0.25")
    assert len(cfg.compression) == 1  # each file holds one top key
    instantiated(cfg)


def settings(callback):
    """What a callback was made with, in words."""
    kept = {key: value for key, value in vars(callback).items() if not key.startswith("_")}
    budget = getattr(callback, "channel_budget", None)
    more = [] if budget is None else [budget.kind, budget.fraction, budget.window]
    shown = {
        key: repr(value) for key, value in kept.items() if isinstance(value, (str, float, list))
    }
    shown = {key: re.sub(r" at 0x\w+", "", text) for key, text in shown.items()}
    return type(callback).__name__, shown, more


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("model", ["vae", "dcgan"])
def test_a_recipe_on_the_command_line_is_the_list_of_the_function(goal, model):
    words = [f"compression={goal}", f"model={model}", "model.width_multiplier=0.25"]
    cfg = composed(*words)
    made, _ = instantiated(cfg)
    given = compression_callbacks(cfg.compression, made)
    expected = compression_recipe(goal, teacher="dense", model=made)
    assert [settings(one) for one in given] == [settings(one) for one in expected]
    held = composed(
        *words, "compression.recipe.monitor=val/elbo", "compression.recipe.max_loss=0.1"
    )
    budget = compression_callbacks(held.compression, made, irreducible={"val/elbo": -7.0})[-2]
    assert (budget.monitor, budget.max_degradation) == ("val/elbo", 0.1)
    assert (budget.reference.mode, budget.reference.irreducible) == ("max", -7.0)
    by_class = compression_callbacks(cfg.compression, type(made))
    assert [type(one) for one in by_class] == [type(one) for one in given] or goal == "smallest"


@pytest.mark.parametrize("logger", names("logger"))
def test_each_logger_is_instantiated(tmp_path, logger):
    if logger != "csv":
        pytest.importorskip(logger, reason=f"the extra {logger} is not installed")
    (made,) = composed(f"logger=[{logger}]").logger.values()
    instantiate(made, save_dir=str(tmp_path))


@pytest.mark.parametrize("experiment", names("experiment"))
def test_each_experiment_is_instantiated(folders, sounds, experiment):
    words = fed([f"experiment={experiment}", "model.width_multiplier=0.25"], sounds)
    if experiment.startswith("fashion"):
        words += [f"data.folder={folders}/idx", "data.val_size=20"]
    instantiated(composed(*words))


@pytest.mark.parametrize("model", runs("model"))
def test_each_model(tmp_path, cache, sounds, model):
    # The width of a quarter: what is tested is the way, not the training.
    _, results = run(
        tmp_path,
        cache,
        *fed([f"model={model}", f"data={DATA_OF.get(model, 'digits')}"], sounds),
        "model.width_multiplier=0.25",
        "export.onnx=true",
    )
    assert json.loads((tmp_path / "results.json").read_text())["ratio"] == results["ratio"]
    for side in ("dense", "compressed"):
        sizes = results[side]["bytes"]
        assert all(sizes[key] > 0 for key in ("torch", "safetensors", "lcz", "onnx"))
        assert all(math.isfinite(value) for value in results[side]["quality"].values())
        assert results[side]["macs"] > 0
        assert results[side]["latency_ms"]
        parts = results[side]["int8_ops"].values()
        refused = [part["refused"] for part in parts if "refused" in part]
        if refused:  # rounding adds up over eighteen barely trained layers
            assert model == "resnet18"
            assert sizes["onnx_int8"] is None
            assert sizes["lcz_graph"] is None
            assert "differ from the fake-quantized module" in refused[0]
        else:
            assert sizes["onnx_int8"] < 0.6 * sizes["onnx"]
            assert sizes["lcz_graph"] < sizes["onnx_int8"]
            check_one_file(tmp_path / side, parts=list(results[side]["int8_ops"]))
            assert all(part["int8_ops"] or part["session"] for part in parts)
    assert results["steps"]["dense"] == results["steps"]["compressed"] > 0
    dense, compressed = results["dense"], results["compressed"]
    assert compressed["nonzero_params"] < 0.3 * dense["nonzero_params"]
    assert compressed["bytes"]["lcz"] < 0.3 * dense["bytes"]["lcz"]
    assert results["verdict"]["metric"] in dense["quality"]
    assert (tmp_path / "curves.csv").read_text().startswith("run,step,metric,value\ndense,")
    if results["samples"]:
        with Image.open(tmp_path / "samples.png") as picture:
            assert picture.size[0] > 100


@pytest.fixture
def folders(tmp_path):
    """Small data in the formats of the shipped data configs, from the real digits."""
    data = Digits(image_size=28)
    data.setup()
    images = (data.train_dataset.tensors[0] * 255).byte().numpy()
    labels = data.train_dataset.tensors[1].byte().numpy()
    idx = tmp_path / "idx"
    idx.mkdir()
    for part, rows in (("train", slice(0, 200)), ("t10k", slice(200, 300))):
        pixels = images[rows, 0]
        header = struct.pack(">iiii", 2051, len(pixels), 28, 28)
        (idx / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">ii", 2049, len(pixels))
        (idx / f"{part}-labels-idx1-ubyte").write_bytes(header + labels[rows].tobytes())
    for index in range(60):
        home = tmp_path / "pictures" / str(labels[index])
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index, 0]).save(home / f"{index}.png")
    words = "".join(chr(97 + int(n)) for n in np.random.default_rng(0).integers(0, 9, 4000))
    lines = "\n".join(words[i : i + 5] for i in range(0, 2000, 5))
    (tmp_path / "words.txt").write_text(lines, encoding="utf-8")
    _cifar(tmp_path / "cifar", images)
    return tmp_path


@pytest.fixture
def known_files(monkeypatch):
    """Small files pass for the real ones, whose checksums are known."""
    for home in ("lightning_compress.lab.data.images", "torchvision.datasets.cifar"):
        monkeypatch.setattr(f"{home}.check_integrity", lambda *_: True)


def _cifar(folder, images):
    import pickle

    home = folder / "cifar-10-batches-py"
    home.mkdir(parents=True)
    pixels = np.zeros((40, 3, 32, 32), np.uint8)
    pixels[:, :, 2:30, 2:30] = images[:40]
    batch = {"data": pixels.reshape(40, -1), "labels": [i % 10 for i in range(40)]}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (home / name).write_bytes(pickle.dumps(batch))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))


OWN_ARGUMENTS = {
    "cifar10": ["data.folder={0}/cifar", "data.val_size=20"],
    "fashion_mnist": ["data.folder={0}/idx", "data.val_size=20"],
    "fashion_rows": [
        "data.folder={0}/idx",
        "data.val_size=20",
        "model=recurrent_vae",
        "model.hidden=16",
    ],
    "mnist": ["data.folder={0}/idx", "data.val_size=20"],
    "image_folder": [
        "data.folder={0}/pictures",
        "data.image_size=16",
        "data.grey=true",
        "data.val_fraction=0.2",
        "data.test_fraction=0.2",
        "evaluate.samples=8",
    ],
    "icons": [
        "data.folder={0}/pictures",
        "data.filing.min_size=0",
        "data.val_fraction=0.2",
        "data.test_fraction=0.3",
        "evaluate.samples=8",
    ],
    "text_lines": ["data.file={0}/words.txt", "model=recurrent_vae", "model.hidden=16"],
    "digit_rows": ["model=recurrent_vae", "model.hidden=16"],
    "digits": [],
    "audio_folder": ["model=vocoder"],
    "glyph_pairs": ["model=pix2pix", "data.test_fraction=0.2"],
}
OWN_METRICS = {
    "audio_folder": "mel_distance",
    "glyph_pairs": "l1",
}  # of models that make something of the data's conditions


@pytest.mark.parametrize("data", runs("data"))
def test_each_data_set(folders, cache, known_files, sounds, data):
    overrides = fed([f"data={data}"], sounds)
    overrides += [one.format(folders) for one in OWN_ARGUMENTS[data]]
    _, results = run(
        folders / "run",
        cache,
        "model.width_multiplier=0.25",
        "export.onnx=false",
        *overrides,
    )
    quality = results["compressed"]["quality"]
    if data in OWN_METRICS:
        assert quality[OWN_METRICS[data]] > 0
    else:
        assert quality["neg_elbo"] == pytest.approx(quality["reconstruction"] + quality["kl"])
    assert ("perplexity" in quality) == (data == "text_lines")
    assert ("fid" in quality) == (data != "text_lines")


@pytest.mark.parametrize("compression", runs("compression"))
def test_each_compression_alone(tmp_path, cache, compression):
    steered = "prune,channels," if compression == "budget" else ""  # alone it has nothing to steer
    overrides = [
        f"compression=[{steered}{compression}]",
        "model.width_multiplier=0.25",
        "export.onnx=false",
    ]
    overrides.append(f"model={MODEL_OF.get(compression, 'vae')}")
    cfg = composed(*QUICK, f"evaluate.cache_dir={cache}", *overrides)
    assert len(cfg.compression) == 1 + steered.count(",")  # each file holds one top key
    results = run_experiment(cfg, tmp_path)
    assert results["ratio"] > 1.0


def test_the_dense_run_teaches_a_narrower_student_that_is_pruned_and_quantized(tmp_path, cache):
    _, results = run(
        tmp_path,
        cache,
        "compression=[distill_vae,prune,quantize]",
        "compression.distill.initialize=true",
        "model.width_multiplier=0.5",
        "student.width_multiplier=0.25",
        "export.onnx=false",
    )
    assert results["compressed"]["params"] < 0.6 * results["dense"]["params"]
    assert results["compressed"]["nonzero_params"] < 0.3 * results["compressed"]["params"]
    curves = (tmp_path / "curves.csv").read_text()
    assert "compressed,2,distill/decoder/bernoulli_kl" in curves
    assert results["ratio"] > 10


def test_fewer_channels_masks_and_grids_ship_together(tmp_path, cache):
    """The dense baseline teaches; what comes out is smaller in every file, and in MACs."""
    _, results = run(
        tmp_path,
        cache,
        "model=dcgan",
        "compression=[distill_gan,channels,prune,quantize]",
        "compression.channels.budget={macs: 0.5}",
        "compression.channels.fade=0",
        "model.width=16",
        "model.discriminator_width=8",
        "compression.prune.final_sparsity=0.5",
        "trainer.limit_train_batches=4",
        "export.onnx=true",
    )
    dense, compressed = results["dense"], results["compressed"]
    assert 0.3 * dense["macs"] < compressed["macs"] <= 0.5 * dense["macs"]
    assert compressed["params"] < 0.7 * dense["params"]
    for kind in ("torch", "safetensors", "onnx", "onnx_int8"):
        assert compressed["bytes"][kind] < 0.8 * dense["bytes"][kind]
    assert all(part["int8_ops"] for part in compressed["int8_ops"].values())


@pytest.mark.parametrize("logger", runs("logger"))
def test_each_logger(tmp_path, cache, logger):
    if logger != "csv":
        pytest.importorskip(logger, reason=f"the extra {logger} is not installed")
    small = ["model.width_multiplier=0.25", "export.onnx=false", "trainer.log_every_n_steps=1"]
    run(tmp_path, cache, f"logger=[{logger}]", *small)
    for side in ("dense", "compressed"):
        assert any((tmp_path / side / logger).iterdir())
    metrics, pictures, histograms = READERS[logger](tmp_path / "compressed")
    assert {"train/loss", "val/elbo", "prune/sparsity"} <= set(metrics)
    assert pictures == (logger != "csv")
    assert histograms == (logger in ("tensorboard", "wandb"))


def _read_csv(folder):
    return (folder / "csv" / "metrics.csv").read_text().splitlines()[0].split(","), False, False


def _read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    tags = events.Reload().Tags()
    histograms = [tag for tag in tags["histograms"] if tag.startswith("weights/decoder.")]
    return tags["scalars"], tags["images"] == ["samples"], bool(histograms)


def _read_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "lightning_compress"]
    (found,) = client.search_runs([experiment.experiment_id])
    images = [one.path for one in client.list_artifacts(found.info.run_id, "images")]
    assert found.info.status == "FINISHED"
    return found.data.metrics, any(path.endswith(".png") for path in images), False


def _read_wandb(folder):
    """An offline run's record, whose strings stand in it as they are, and its pictures."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    record = path.read_bytes()
    keys = [key for key in ("train/loss", "val/elbo", "prune/sparsity") if key.encode() in record]
    pictures = list(path.parent.glob("files/media/images/samples_*.png"))
    return keys, bool(pictures), b"weights/decoder." in record


READERS = {
    "csv": _read_csv,
    "tensorboard": _read_tensorboard,
    "mlflow": _read_mlflow,
    "wandb": _read_wandb,
}


# A run of so few steps removes its last channels after pruning has ended.
@pytest.mark.filterwarnings("ignore:.*zeros went with removed channels")
@pytest.mark.parametrize("experiment", runs("experiment"))
def test_each_experiment_composes_and_runs_small(folders, cache, sounds, experiment):
    overrides = fed([f"experiment={experiment}", "trainer.limit_train_batches=12"], sounds)
    overrides = [
        word for word in overrides if not word.startswith("experiment=")
    ]  # criteria look at some gradients first
    if experiment.startswith("fashion"):
        overrides += [f"data.folder={folders}/idx", "data.val_size=20"]
    if experiment in AUTOENCODERS:
        overrides += [one.format(folders) for one in OWN_ARGUMENTS["icons"]]
    if experiment in ("fashion_vae_fast", "pix2pix"):  # of so narrow ones too few channels are free
        overrides += ["compression.channels.round_to=2"]
    if experiment == "autoencoder_kl":  # a student begins with channels that its teacher has
        overrides += ["student.width_multiplier=0.25"]
    if experiment == "vq_vae":  # whose norms keep groups of eight
        overrides += ["compression.channels.budget.macs=0.6"]
    cfg, results = run(
        folders / "run",
        cache,
        f"experiment={experiment}",
        "model.width_multiplier=0.25",
        "export.onnx=false",
        *overrides,
    )
    own = {"vocoder": "mel_distance", "pix2pix": "l1"} | dict.fromkeys(AUTOENCODERS, "psnr")
    usual = own.get(experiment, "neg_elbo")
    assert results["verdict"]["metric"] == ("fid" if "dcgan" in experiment else usual)
    if cfg.baseline_seeds:
        assert results["baseline_spread"]["neg_elbo"]["n"] == 3


def test_an_artifact_loads_into_a_fresh_model_and_a_baseline_skips_the_dense_training(
    tmp_path, cache
):
    small = ["model.width_multiplier=0.25", "export.onnx=false", "logger=[csv]"]
    small.append("compression=[prune]")
    cfg, first = run(tmp_path / "one", cache, *small)
    assert (tmp_path / "one" / "compressed" / "csv" / "metrics.csv").is_file()
    data = Digits()
    data.setup()
    trained = load_trained(cfg, data, tmp_path / "one" / "compressed" / "final.ckpt").model
    fresh = build_model(cfg, data, seed=99)
    load_compressed(tmp_path / "one" / "compressed" / "model.lcz", fresh.deployed_module())
    assert generate(fresh, 5).equal(generate(trained, 5))
    dense = tmp_path / "one" / "dense" / "final.ckpt"
    _, second = run(tmp_path / "two", cache, *small, f"baseline={dense}")
    assert second["dense"]["quality"] == first["dense"]["quality"]
    assert second["compressed"]["quality"] == first["compressed"]["quality"]
    assert not (tmp_path / "two" / "dense" / "final.ckpt").exists()


def test_data_that_cannot_feed_the_model_is_refused(tmp_path, cache):
    with pytest.raises(ValueError, match=r"RecurrentVAE takes data of kind .*'image'"):
        run(tmp_path, cache, "model=recurrent_vae")
    with pytest.raises(ValueError, match=r"VAE takes data of kind \['image'\]"):
        run(tmp_path, cache, "data=digit_rows")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.metric=charm", "evaluate.metric='charm': valid are"),
        ("evaluate.metric=accuracy", "'accuracy' is not measured on a model of kind 'vae'"),
        ("evaluate.feature=stranger", "evaluate.feature='stranger': valid are"),
        ("baseline=nowhere.ckpt", "no checkpoint nowhere.ckpt"),
        ("ckpt_path=nowhere", "nothing to resume from"),
        ("baseline_seeds=[0]", "the run's own seed"),
    ],
)
def test_bad_values_are_named(tmp_path, cache, override, message):
    from hydra.errors import InstantiationException

    with pytest.raises((ValueError, OSError, InstantiationException), match=message):
        run(tmp_path, cache, "model.width_multiplier=0.25", "export.onnx=false", override)


def test_the_rows_of_digits_are_those_of_the_images():
    rows, images = DigitRows(), Digits(image_size=8)
    rows.setup()
    images.setup()
    assert rows.test_dataset.tensors[0].equal(images.test_dataset.tensors[0][:, 0])
    assert Path(config_dir()).is_dir()
