"""Messages say why: each case once named something else, or failed inside torch."""

import copy

import pytest
import torch
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    TargetError,
    compression_state,
    quantize_static,
    sparsity,
)


class Wide(TinyAutoencoder):
    def __init__(self, **options):
        super().__init__(**options)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))


class Diverging(Wide):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss * float("nan") if index == 2 else loss


SCHEMES = ("symmetric", "affine", "learned_step", "codebook", "entropy")


@pytest.mark.parametrize(
    "make",
    [
        GradualPruning,
        *(
            pytest.param(
                lambda scheme=scheme: QuantizationAwareTraining(weight_bits=4, scheme=scheme),
                id=scheme,
            )
            for scheme in SCHEMES
        ),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, make):
    with pytest.raises(FloatingPointError, match=r"encoder.0.weight.* holds? .*NaN.* diverged"):
        quiet_trainer(tmp_path, make()).fit(Diverging(), batches())


@pytest.mark.parametrize("scheme", ["symmetric", "entropy"])
def test_half_precision_is_the_reason_where_it_is(tmp_path, scheme):
    class Half(Wide):
        def training_step(self, batch, _):
            x = batch[0].half()
            return (self(x) - x).float().square().mean()

    callback = QuantizationAwareTraining(weight_bits=8, scheme=scheme)
    trainer = quiet_trainer(tmp_path, callback, precision="16-true")
    with pytest.raises(FloatingPointError, match=r"float16, in which Adam's eps"):
        trainer.fit(Half(), batches())


def test_channels_go_under_an_optimizer_with_one_state_for_all(tmp_path):
    torch.manual_seed(0)
    model = Wide(optimizer="LBFGS")
    pruning = ChannelPruning(final_sparsity=0.5, round_to=2, fade=1)
    with pytest.warns(UserWarning, match="LBFGS begins anew"):
        quiet_trainer(tmp_path, pruning).fit(model, batches())
    assert model.encoder[0].out_features == 8
    assert all(torch.isfinite(one).all() for one in model.parameters())


def test_a_teacher_that_shares_another_part_is_not_the_student(tmp_path):
    model = Wide()
    teacher = nn.ModuleDict({"encoder": copy.deepcopy(model.encoder), "decoder": model.decoder})

    def fit(student, given, *pairs):
        callback = KnowledgeDistillation(teacher=given, pairs=list(pairs))
        quiet_trainer(tmp_path, callback).fit(student, batches())

    with pytest.raises(TargetError, match=r"shares \['decoder.* which trains.*\['encoder'\]"):
        fit(model, teacher, "encoder")
    with pytest.raises(
        TargetError, match=r"is the student in the pair 'decoder': they share \['decoder"
    ):
        fit(model, teacher, "encoder", "decoder")
    with pytest.raises(TargetError, match="the teacher is the student"):
        fit(model, model, "encoder")
    model.decoder.requires_grad_(requires_grad=False)
    fit(model, teacher, "encoder")  # what is frozen on both sides may be one


def test_a_frozen_part_is_quantized_after_training(tmp_path):
    model = Wide()
    model.encoder.requires_grad_(requires_grad=False)
    callback = PostTrainingQuantization()
    quiet_trainer(tmp_path, callback).fit(model, batches())
    assert len(compression_state(model).grids) == 4
    assert all("frozen" not in row.reason for row in callback.coverage)


def test_less_than_half_is_told_when_a_fit_begins(tmp_path):
    model = Wide()
    model.encoder.requires_grad_(requires_grad=False)
    model.encoder[0] = nn.Linear(6, 16).requires_grad_(requires_grad=False)
    model.decoder[0] = nn.Linear(8, 16).requires_grad_(requires_grad=False)
    told = r"only 21 % of the weights.*skipped: encoder.2.weight \(frozen"
    with pytest.warns(UserWarning, match=told):
        quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5)).fit(model, batches())


class Lora(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapted(Wide):
    def __init__(self):
        super().__init__()
        for part in (self.encoder, self.decoder):
            for index in (0, 2):
                part[index] = Lora(part[index])

    def configure_optimizers(self):
        return torch.optim.Adam([one for one in self.parameters() if one.requires_grad], lr=0.01)


def test_the_frozen_base_under_adapters_is_pruned_and_quantized_as_they_train(tmp_path):
    model = Adapted()
    before = copy.deepcopy(model.state_dict())
    callbacks = GradualPruning(final_sparsity=0.75), QuantizationAwareTraining(weight_bits=4)
    quiet_trainer(tmp_path, *callbacks).fit(model, batches())
    bases = [one.base.weight for one in model.modules() if isinstance(one, Lora)]
    zeros = sum(int((one == 0).sum()) for one in bases) / sum(one.numel() for one in bases)
    assert zeros >= 0.75
    assert callbacks[0].sparsity == 0.75
    grids = compression_state(model).grids
    assert len(grids) == 4
    for name, parameter in model.named_parameters():
        if name in grids:
            assert torch.equal(grids[name].project(parameter), parameter)
        elif "down" in name or "up" in name:
            assert not torch.equal(parameter, before[name])
            assert (parameter != 0).all()


def test_a_frozen_part_that_is_named_is_pruned_beside_what_trains(tmp_path):
    model = Wide()
    model.encoder.requires_grad_(requires_grad=False)
    pruning = GradualPruning(final_sparsity=0.5, include=["encoder.*", "decoder.*"])
    quiet_trainer(tmp_path, pruning).fit(model, batches())
    assert sparsity(model) == pytest.approx(0.5, abs=3e-3)
    assert len(pruning.projected_weights) == 4
    model = Wide()
    model.encoder.requires_grad_(requires_grad=False)
    alone = GradualPruning(final_sparsity=0.5, include=["encoder.*"])
    quiet_trainer(tmp_path, alone).fit(model, batches())
    assert sparsity(model.encoder) == pytest.approx(0.5, abs=3e-3)
    assert sparsity(model.decoder) == 0


def test_a_loader_of_pairs_is_named_with_the_way_out():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    pairs = [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long)) for _ in range(2)]
    named = r"\(float32\[5, 3\], int64\[5\]\).*batch_to_args"
    with pytest.raises(ValueError, match=named):
        quantize_static(net, pairs)
    dicts = [{"image": x, "label": y} for x, y in pairs]
    with pytest.raises(ValueError, match=r"'image': float32\[5, 3\].*batch_to_args"):
        quantize_static(net, dicts)
    for data, change in ((pairs, lambda b: b[0]), (dicts, lambda b: {"input": b["image"]})):
        report = quantize_static(copy.deepcopy(net), data, batch_to_args=change)
        assert [row.path for row in report.activations if row.selected] == ["0", "2"]
