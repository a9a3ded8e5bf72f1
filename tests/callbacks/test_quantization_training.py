"""QuantizationAwareTraining under Lightning: grids, zeros, resume, and what ends up where."""

import copy
import io
import math
import pickle
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    CompressionSummary,
    EntropyGrid,
    GradualPruning,
    ProjectedEMA,
    Projector,
    QuantizationAwareTraining,
    TargetError,
    compression_state,
    fake_quantized,
    load_compressed,
    save_compressed,
    sparsity,
)

SCHEMES = ["symmetric", "affine", "learned_step", "codebook", "entropy", "rate_distortion"]


def quantizing(scheme="symmetric", **arguments):
    if scheme == "rate_distortion":
        arguments = {"lmbda": 0.1, **arguments}
    return QuantizationAwareTraining(**{"weight_bits": 4, "scheme": scheme, **arguments})


def on_grid(model):
    grids = compression_state(model).grids
    assert grids
    for path, grid in grids.items():
        weight = model.get_parameter(path)
        assert torch.equal(grid.project(weight), weight), path
        assert (weight != 0).any(), path
    return grids


def equal_models(one, other):
    for (name, value), same in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(value, same), name


class Watch(Callback):
    """Looks at the weights that every forward pass of the targets gets."""

    def __init__(self):
        self.values = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values.append(pl_module.get_parameter("decoder.weight").detach().unique().numel())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "LBFGS"])
def test_weights_train_on_their_grids(tmp_path, scheme, optimizer):
    seed_everything(0, verbose=False)
    model, watch = TinyAutoencoder(optimizer, lr=0.003), Watch()
    start = model.decoder.weight.detach().clone()
    callback = quantizing(scheme, per_channel=False, frequency=3)
    quiet_trainer(tmp_path, callback, watch).fit(model, batches())
    grids = on_grid(model)
    assert set(grids) == {"encoder.0.weight", "decoder.weight"}
    assert max(watch.values) <= 16  # from the first forward pass on
    assert (model.decoder.weight - start).abs().max() > 1e-3
    assert all(grid.bits <= 4 for grid in grids.values())
    assert Projector.find(model) is None
    assert not model.decoder._forward_pre_hooks
    assert not model.decoder._forward_hooks


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("begin", [0.0, 0.4])
def test_pruning_and_quantizing_in_either_order_are_the_same(tmp_path, scheme, begin):
    def run(first):
        seed_everything(3, verbose=False)
        model = TinyAutoencoder()
        both = [GradualPruning(final_sparsity=0.6, end=0.8), quantizing(scheme, begin=begin)]
        both = both if first == "prune" else both[::-1]
        quiet_trainer(tmp_path, *both, max_epochs=4).fit(model, batches())
        return model, both

    model, (pruning, _) = run("prune")
    other, _ = run("quantize")
    equal_models(model, other)
    on_grid(model)
    assert sparsity(model) >= 0.6
    for projected in pruning.projected_weights:
        assert (projected.parameter[projected.pruned] == 0).all()
    save_compressed(model, tmp_path / "model.lcz")
    fresh = load_compressed(tmp_path / "model.lcz", TinyAutoencoder())
    equal_models(fresh, model)


class StopAfter(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise ConnectionError("preempted")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("make", "extra", "averaged"),
    [
        (TinyAutoencoder, {"pact": True}, True),
        (TinyAutoencoder, {"begin": 0.3, "freeze": 0.6, "freeze_batchnorm": True}, False),
        (TinyGAN, {"observer": "mse", "begin": 0.1, "freeze": 0.4}, False),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, scheme, make, extra, averaged):
    def run(folder, *others, ckpt_path=None):
        seed_everything(7, verbose=False)
        model = make()
        callback = quantizing(scheme, **extra)
        pruning = GradualPruning(final_sparsity=0.5, end=0.9)
        saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1)
        average = [ProjectedEMA(decay=0.9)] if averaged else []
        callbacks = [saver, callback, pruning, *average, *others]
        trainer = quiet_trainer(folder, *callbacks, max_epochs=4, enable_checkpointing=True)
        trainer.fit(model, batches(), ckpt_path=ckpt_path)
        return model, callback

    whole, _ = run(tmp_path / "whole")
    with pytest.raises(ConnectionError):
        run(tmp_path / "parts", StopAfter(2))
    resumed, callback = run(tmp_path / "parts", ckpt_path=tmp_path / "parts" / "last.ckpt")
    assert callback.projector.steps[0] == 32
    equal_models(whole, resumed)
    on_grid(resumed)
    one, other = compression_state(whole).activations, compression_state(resumed).activations
    assert one
    assert str(one) == str(other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_loads_into_the_plain_model(tmp_path, scheme):
    model = TinyAutoencoder()
    trainer = quiet_trainer(tmp_path, quantizing(scheme))
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    plain = TinyAutoencoder.load_from_checkpoint(tmp_path / "model.ckpt", strict=True)
    equal_models(plain, model)
    x = torch.randn(3, 6)
    assert torch.equal(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fit_test_fit_goes_on_from_the_latent_weights(tmp_path, scheme):
    model, callback = TinyAutoencoder(), quantizing(scheme)
    quiet_trainer(tmp_path, callback).fit(model, batches())
    latent = callback.projected_weights[0].latent.clone()
    trainer = quiet_trainer(tmp_path, callback)
    trainer.validate(model, batches(), verbose=False)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.values = callback.projected_weights[0].values().clone()

    look = Look()
    quiet_trainer(tmp_path, callback, look).fit(model, batches())
    assert torch.equal(look.values, latent)
    on_grid(model)
    assert not model.encoder[0]._forward_pre_hooks


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("scheme", ["learned_step", "codebook"])
def test_accumulation_precision_and_clipping(tmp_path, accumulate, precision, scheme):
    model = TinyAutoencoder()
    callback = quantizing(scheme, pact=True)
    quiet_trainer(
        tmp_path,
        callback,
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
    ).fit(model, batches())
    on_grid(model)
    assert callback.projector.steps == [16 if accumulate == 1 else 6]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gan_quantizes_its_generator_only(tmp_path, raw, scheme):
    model = TinyGAN(critic_steps=2, raw=raw)
    quiet_trainer(tmp_path, quantizing(scheme)).fit(model, batches())
    assert set(on_grid(model)) == {"generator.0.weight", "generator.2.weight"}
    state = compression_state(model).activations
    assert set(state) == {"generator.0", "generator.2"}
    assert state["generator.0"].output is None
    assert state["generator.2"].output.bits == 8
    assert state["generator.2"].input.zero_point == 0  # after a ReLU


def test_the_critics_pass_sees_the_quantized_generator_without_moving_it(tmp_path):
    model, callback = TinyGAN(critic_steps=1), quantizing(weight_bits=8, activation_bits=2)
    outputs = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            before = callback.activations.outputs["generator.2"].observer.range
            with torch.no_grad():
                outputs.append(pl_module.generator(torch.randn(50, 3)).unique().numel())
            assert callback.activations.outputs["generator.2"].observer.range == before

    quiet_trainer(tmp_path, callback, Look()).fit(model, batches())
    assert max(outputs) <= 4


def test_validation_and_checkpoints_see_what_is_shipped(tmp_path):
    class Model(TinyAutoencoder):
        def validation_step(self, batch, _):
            self.seen.append(self(batch[0]).unique().numel())
            grids = compression_state(self).grids
            assert all(torch.equal(g.project(self.get_parameter(p)), self.get_parameter(p))
                       for p, g in grids.items())  # fmt: skip

    model = Model()
    callback = quantizing(activation_bits=3)
    quiet_trainer(tmp_path, callback, num_sanity_val_steps=0).fit(model, batches(), batches())
    assert max(model.seen) <= 8
    assert model.eval()(torch.randn(40, 6)).unique().numel() > 8
    with fake_quantized(model):
        assert model(torch.randn(40, 6)).unique().numel() <= 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_averages_are_handed_out_on_the_learned_grids(tmp_path, scheme):
    model, callback = TinyAutoencoder(), quantizing(scheme)
    average = ProjectedEMA(decay=0.8)
    quiet_trainer(tmp_path, callback, average).fit(model, batches(), batches(count=1))
    grids = on_grid(model)
    if scheme == "learned_step":
        learned = callback.weights.quantizers["decoder.weight"].learned.value
        assert torch.equal(grids["decoder.weight"].scale, learned)


def test_copies_carry_no_live_hooks(tmp_path):
    model, callback = TinyAutoencoder(), quantizing()
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if pl_module.global_step == 5:
                copies.append(copy.deepcopy(pl_module.encoder))
                copies.append(pickle.loads(pickle.dumps(pl_module.encoder)))
                seen = callback.activations.inputs["encoder.0"].observer.gathered
                for one in copies:
                    one(torch.full((4, 6), 1e6))
                assert callback.activations.inputs["encoder.0"].observer.gathered is seen

    quiet_trainer(tmp_path, callback, Copy()).fit(model, batches())
    assert len(copies) == 2


def test_an_exception_leaves_visible_weights_and_no_hooks(tmp_path):
    model, callback = TinyAutoencoder(), quantizing()
    with pytest.raises(ConnectionError):
        quiet_trainer(tmp_path, callback, StopAfter(1)).fit(model, batches())
    on_grid(model)
    assert Projector.find(model) is None
    assert not model.decoder._forward_pre_hooks


def test_batchnorm_stands_still_from_freeze_on(tmp_path):
    model = TinyAutoencoder()
    means = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            means.append(pl_module.encoder[1].running_mean.clone())

    callback = quantizing(freeze=8, freeze_batchnorm=True)
    quiet_trainer(tmp_path, callback, Look()).fit(model, batches())
    changed = [not torch.equal(a, b) for a, b in pairwise(means)]
    assert changed == [True] * 7 + [False] * 8
    assert model.encoder[1].training


def test_ranges_and_steps_stand_still_from_freeze_on(tmp_path):
    torch.manual_seed(1)  # a model that reaches its clip in every batch: else that does not learn
    model, seen = TinyAutoencoder(), []
    callback = quantizing("learned_step", freeze=8, pact=True)

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            side = callback.activations
            step = callback.weights.quantizers["decoder.weight"].learned.value.tolist()
            seen.append((step, side.inputs["decoder"].clip.value.tolist(),
                         side.inputs["encoder.0"].observer.range))  # fmt: skip

    quiet_trainer(tmp_path, callback, Look()).fit(model, batches())
    assert all(one == seen[8] for one in seen[8:])
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(seen[:8]))


def test_activations_alone_and_weights_alone(tmp_path):
    model = TinyAutoencoder()
    quiet_trainer(tmp_path, quantizing(weight_bits=None, pact=True)).fit(model, batches())
    state = compression_state(model)
    assert not state.grids
    assert set(state.activations) == {"encoder.0", "decoder"}
    model = TinyAutoencoder()
    quiet_trainer(tmp_path, quantizing(activation_bits=None)).fit(model, batches())
    state = compression_state(model)
    assert set(state.grids) == {"encoder.0.weight", "decoder.weight"}
    assert not state.activations


def test_two_callbacks_share_a_model_but_no_weight(tmp_path):
    model = TinyAutoencoder()
    parts = [
        quantizing(include="encoder.*", name="encoder", weight_bits=8),
        quantizing(include="decoder.*", name="decoder", weight_bits=4),
    ]
    quiet_trainer(tmp_path, *parts).fit(model, batches())
    grids = on_grid(model)
    assert [grids[path].bits for path in ("encoder.0.weight", "decoder.weight")] == [8, 4]
    both = [quantizing(name="one"), quantizing(name="two")]
    with pytest.raises(TargetError, match=r"quantized by .*\[one\] and by .*\[two\]"):
        quiet_trainer(tmp_path, *both).fit(TinyAutoencoder(), batches())


def test_recurrent_layers_are_weight_only_and_say_so(tmp_path):
    class Recurrent(TinyAutoencoder):
        def __init__(self):
            super().__init__()
            self.encoder = nn.GRU(6, 8, batch_first=True)

        def forward(self, x):
            return self.decoder(self.encoder(x[:, None])[0][:, 0])

    model, callback = Recurrent(), quantizing()
    quiet_trainer(tmp_path, callback).fit(model, batches())
    assert {"encoder.weight_ih_l0", "encoder.weight_hh_l0"} < set(on_grid(model))
    reasons = {row.path: row.reason for row in callback.activation_coverage}
    assert reasons == {
        "encoder": "weights only, GRU: its gates run inside one fused operation, in float",
        "decoder": "",
    }
    assert set(compression_state(model).activations) == {"decoder"}


def test_the_summary_says_which_activations_stay_float(tmp_path):
    class Recurrent(TinyAutoencoder):
        def __init__(self):
            super().__init__()
            self.encoder = nn.GRU(6, 8, batch_first=True)

        def forward(self, x):
            return self.decoder(self.encoder(x[:, None])[0][:, 0])

    text = io.StringIO()
    summary = CompressionSummary(console=Console(file=text, width=150))
    quiet_trainer(tmp_path, quantizing(), summary).fit(Recurrent(), batches())
    line = next(line for line in text.getvalue().splitlines() if "one fused operation" in line)
    assert "encoder" in line
    assert "no: weights only, GRU" in line


def test_parametrized_and_transposed_layers(tmp_path):
    class Model(TinyAutoencoder):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(
                nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU()
            )
            self.decoder = nn.Sequential(
                nn.Unflatten(1, (8, 1)), nn.ConvTranspose1d(8, 6, 2, groups=2), nn.Flatten(),
                nn.Linear(12, 6),
            )  # fmt: skip

    model = Model()
    quiet_trainer(tmp_path, quantizing()).fit(model, batches())
    grids = compression_state(model).grids
    assert grids["decoder.1.weight"].axis == 1
    activations = compression_state(model).activations
    assert set(activations) == {"encoder.0", "decoder.1", "decoder.3"}
    # encoder and decoder ship as two networks: each has a last layer
    assert [activations[p].output is None for p in activations] == [False, True, False]


# Dynamo itself looks at the gradient of what crosses a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_modules_train_alike(tmp_path):
    def run(compiled):
        seed_everything(1, verbose=False)
        model = TinyAutoencoder()
        if compiled:
            model.encoder = torch.compile(model.encoder, backend="eager")
        quiet_trainer(tmp_path, quantizing(pact=True)).fit(model, batches())
        return model

    plain, compiled = run(False), run(True)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(one, other)


def test_predicted_bytes_are_logged_and_near_the_file(tmp_path):
    model = TinyAutoencoder()
    callback = quantizing("entropy", weight_bits=8, frequency=1, freeze=1.0)
    trainer = quiet_trainer(tmp_path, callback)
    trainer.fit(model, batches())
    assert (
        trainer.callback_metrics["quantize/predicted_bytes"] == callback.weights.predicted_bytes > 0
    )
    info = save_compressed(model, tmp_path / "model.lcz")
    entries = [info.per_tensor[projected.path] for projected in callback.projected_weights]
    scales = 4 * len(entries)
    bound = sum(entry.bound_bytes for entry in entries) - scales
    assert bound == pytest.approx(callback.weights.predicted_bytes, abs=len(entries) + 1)


@pytest.mark.parametrize("target", [{"target_bits": 2.5}, {"target_bytes": 96 * 2.5 / 8}])
def test_the_step_is_steered_to_a_target(tmp_path, target):
    class Wide(TinyAutoencoder):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 128), nn.ReLU())
            self.decoder = nn.Linear(128, 6)

    scaled = {name: value * (16 if name == "target_bytes" else 1) for name, value in target.items()}
    callback = quantizing("entropy", weight_bits=8, entropy=EntropyGrid(**scaled))
    model = Wide()
    quiet_trainer(tmp_path, callback).fit(model, batches())
    assert callback.weights.predicted_bytes * 8 / (2 * 6 * 128) == pytest.approx(2.5, rel=0.05)
    assert callback.weights.relative_step != 0.5


def test_a_range_beyond_its_bits_raises_the_step_and_says_so(tmp_path):
    callback = quantizing(
        "entropy", entropy=EntropyGrid(step=0.01), weight_bits=3, include=["decoder.*"]
    )
    with pytest.warns(UserWarning, match=r"decoder\.weight .*0\.01 rms"):
        quiet_trainer(tmp_path, callback).fit(TinyAutoencoder(), batches())
    assert callback.projected_weights[0].grid.bits == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 9}, "weight_bits=9: valid are integers 2 to 8"),
        ({"weight_bits": 1}, "weight_bits=1"),
        ({"activation_bits": 16}, "activation_bits=16"),
        ({"weight_bits": None, "activation_bits": None}, "nothing is quantized"),
        ({"scheme": "round"}, "scheme='round': valid are"),
        ({"observer": "eye"}, "observer='eye': valid are"),
        ({"begin": 0.9, "freeze": 0.5}, r"begin=0\.9 must be smaller"),
        ({"entropy": EntropyGrid(target_bits=2.0)}, "entropy= belongs to scheme='entropy'"),
        ({"entropy": {"step": 1.0}, "scheme": "entropy"}, r"give an EntropyGrid\(step="),
        ({"scheme": "rate_distortion", "lmbda": None}, "needs lmbda"),
        ({"scheme": "rate_distortion", "lmbda": -1.0}, r"lmbda=-1\.0"),
        ({"scheme": "rate_distortion", "lmbda": math.nan}, "lmbda=nan"),
        ({"lmbda": 1.0}, r"lmbda=1\.0 belongs to scheme='rate_distortion'"),
        ({"pact": True, "activation_bits": None}, "pact=True"),
        ({"lr": 0.0}, r"lr=0\.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantizing(**{"scheme": "symmetric", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0.0}, r"step=0\.0 must be above 0"),
        ({"dead_zone": 1.0}, r"dead_zone=1\.0"),
        ({"rate": -1.0}, r"rate=-1\.0"),
        ({"target_bits": 2.0, "target_bytes": 9}, "give one of them"),
        ({"target_bytes": 0}, "target_bytes=0 must be above 0"),
    ],
)
def test_bad_entropy_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EntropyGrid(**arguments)


def test_what_training_shows_to_be_wrong_is_told(tmp_path):
    class Unused(TinyAutoencoder):
        def __init__(self):
            super().__init__()
            self.decoder = nn.ModuleList([nn.Linear(8, 6), nn.Linear(8, 6)])

        def forward(self, x):
            return self.decoder[0](self.encoder(x))

    spare = Unused()
    callback = quantizing(activation_bits=8)
    with pytest.warns(UserWarning, match=r"decoder\.1 .*never seen"):
        quiet_trainer(tmp_path, callback).fit(spare, batches())
    known = compression_state(spare).activations
    assert set(known) == {"encoder.0", "decoder.0"}
    rows = {row.path: row.reason for row in callback.activation_coverage if not row.selected}
    assert rows == {"decoder.1": "never seen in training mode"}
    with pytest.raises(ValueError, match=r"decoder\.1: never seen"):
        quiet_trainer(tmp_path, quantizing(include="decoder.1", activation_bits=8)).fit(
            Unused(), batches()
        )

    class Dead(TinyAutoencoder):
        def forward(self, x):
            return self.decoder(self.encoder(x) * 0)

    dead = Dead()
    with pytest.warns(UserWarning, match=r"activations.* decoder .*always 0"):
        quiet_trainer(tmp_path, quantizing()).fit(dead, batches())
    known = compression_state(dead).activations
    assert known["decoder"].input is None
    assert known["encoder.0"].input is not None
    poisoned = batches()
    poisoned.dataset.tensors[0][5, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"activations of encoder.0 are NaN or infinite"):
        quiet_trainer(tmp_path, quantizing()).fit(TinyAutoencoder(), poisoned)
    with pytest.warns(UserWarning, match="nothing is quantized"):
        quiet_trainer(tmp_path, quantizing(begin=100, freeze=200)).fit(TinyAutoencoder(), batches())


def test_a_checkpoint_of_other_targets_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, quantizing())
    trainer.fit(TinyAutoencoder(), batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = quantizing(include=["decoder.*"])
    with pytest.raises(ValueError, match="the checkpoint quantizes"):
        quiet_trainer(tmp_path, other, max_epochs=3).fit(
            TinyAutoencoder(), batches(), ckpt_path=tmp_path / "model.ckpt"
        )
