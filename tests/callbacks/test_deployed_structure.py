"""What ships where no name tells it: read from who receives whose output."""

import io
import itertools
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from rich.console import Console
from tiny import batches, quiet_trainer
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from lightning_compress import (
    ChannelPruning,
    CompressionSummary,
    GradualPruning,
    PostTrainingQuantization,
    ProjectedEMA,
    QuantizationAwareTraining,
    compression_state,
)
from lightning_compress.deployment import deployed_part
from lightning_compress.structure import StructureReader


def net(*sizes):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(one for layer in layers for one in (layer, nn.ReLU())))[:-1]


class Adversarial(LightningModule):
    """A GAN under names that say nothing, in any of a few ways of training it."""

    def __init__(self, how="detached"):
        super().__init__()
        self.automatic_optimization, self.how = False, how
        self.parts_of_it = nn.ModuleList([net(6, 8, 1), net(3, 16, 6)])

    @property
    def nets(self):
        return self.parts_of_it

    def training_step(self, batch, index):
        judge, draw = self.nets
        first, second = self.optimizers()
        real, z = batch[0], torch.randn(len(batch[0]), 3)
        if self.how != "turns" or index % 2:
            fake = draw(z).detach()
            if self.how == "joined":
                scores = judge(torch.cat([real, fake]))
                loss = scores[len(real) :].mean() - scores[: len(real)].mean()
            elif self.how == "changed":
                loss = judge(0.5 * fake[:, [1, 0, 2, 3, 4, 5]] + 1).mean() - judge(real * 2).mean()
            else:
                loss = judge(fake).mean() - judge(real).mean()
            self.step(first, loss)
        if self.how != "turns" or index % 2 == 0:
            self.step(second, -judge(draw(z)).mean())

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(one.parameters(), lr=0.01) for one in self.nets]


class TwoOptimizers(LightningModule):
    """An autoencoder whose halves have an optimizer each: both ship."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = net(6, 8, 3), net(3, 8, 6)

    def training_step(self, batch, _):
        loss = (self.right(self.left(batch[0])) - batch[0]).square().mean()
        both = self.optimizers()
        for one in both:
            one.zero_grad()
        self.manual_backward(loss)
        for one in both:
            one.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(one.parameters(), lr=0.01) for one in (self.left, self.right)]


def zeros(module):
    weights = [one for one in module.parameters() if one.dim() > 1]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


@pytest.mark.parametrize("how", ["detached", "joined", "changed", "turns"])
def test_who_receives_the_others_output_and_data_is_the_judge(tmp_path, how):
    model = Adversarial(how)
    pruning = GradualPruning(final_sparsity=0.5)
    quiet_trainer(tmp_path, pruning).fit(model, batches())
    assert deployed_part(model) == ("parts_of_it.1",)
    assert zeros(model.nets[1]) == 0.5
    assert zeros(model.nets[0]) == 0
    assert not _get_current_function_mode_stack()
    assert all(not one._forward_pre_hooks for one in model.modules())


def test_nothing_is_compressed_before_it_is_known_and_the_table_comes_then(tmp_path):
    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == batch_idx == 0:
                self.early = zeros(pl_module), compression_state(pl_module).grids, table.get()
            elif trainer.current_epoch == 0 and batch_idx == 1:
                self.later = compression_state(pl_module).grids

    class Table:
        def __init__(self):
            self.console = Console(file=io.StringIO(), width=200)

        def get(self):
            return self.console.file.getvalue()

    table, watch = Table(), Watch()
    model = Adversarial()
    quiet_trainer(
        tmp_path,
        CompressionSummary(console=table.console),
        GradualPruning(final_sparsity=0.5, end=0.5),
        QuantizationAwareTraining(weight_bits=4),
        watch,
    ).fit(model, batches())
    assert watch.early == (0, {}, "")
    assert set(watch.later) == {"parts_of_it.1.0.weight", "parts_of_it.1.2.weight"}
    assert table.get().count("Coverage") == 1
    assert "outside the deployed part" in table.get()
    assert zeros(model.nets[1]) >= 0.5
    assert model.nets[1][0].weight.unique().numel() <= 16 * 15
    assert not zeros(model.nets[0])


def test_channels_and_averages_wait_too(tmp_path):
    model = Adversarial()
    pruning = ChannelPruning(final_sparsity=0.5, round_to=2, fade=1, end=0.8)
    quiet_trainer(tmp_path, pruning, max_epochs=4).fit(model, batches())
    assert model.nets[1][0].out_features == 8
    assert model.nets[0][0].out_features == 8
    model = Adversarial()
    average = ProjectedEMA(decay=0.5)
    quiet_trainer(tmp_path, average, GradualPruning(final_sparsity=0.5)).fit(model, batches())
    assert zeros(model.nets[1]) == 0.5


def test_quantization_after_training_knows_it_too(tmp_path):
    model = Adversarial()
    quiet_trainer(tmp_path, PostTrainingQuantization()).fit(model, batches())
    assert all(path.startswith("parts_of_it.1.") for path in compression_state(model).grids)


def test_a_resumed_run_knows_it_from_its_state(tmp_path):
    trainer = quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5), max_epochs=1)
    trainer.fit(Adversarial(), batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            self.known = deployed_part(pl_module), zeros(pl_module.nets[1])

    watch, model = Watch(), Adversarial()
    again = GradualPruning(final_sparsity=0.5)
    trainer = quiet_trainer(tmp_path, again, watch, max_epochs=2)
    trainer.fit(model, batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert watch.known[0] == ("parts_of_it.1",)
    assert watch.known[1] > 0.3
    assert zeros(model.nets[1]) == 0.5


def test_where_structure_tells_nothing_all_is_taken_and_told(tmp_path):
    model = TwoOptimizers()
    with pytest.warns(UserWarning, match=r"\(left, right\).*deployed = \(\.\.\.\)"):
        quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5)).fit(model, batches())
    assert zeros(model) == 0.5
    model = TwoOptimizers()
    model.deployed = ("left", "right")
    quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5)).fit(model, batches())
    assert zeros(model) == 0.5


def test_a_run_that_breaks_while_it_looks_leaves_nothing_behind(tmp_path):
    class Broken(Adversarial):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            raise ConnectionError("preempted")

    for callback in (GradualPruning(), PostTrainingQuantization()):
        model = Broken()
        with pytest.raises(ConnectionError):
            quiet_trainer(tmp_path, callback).fit(model, batches())
        assert not _get_current_function_mode_stack()
        assert all(not one._forward_pre_hooks for one in model.modules())


def test_no_advice_names_a_network_that_another_optimizer_trains(tmp_path):
    class WithJudge(TwoOptimizers):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = self.left, self.right
            del self.left, self.right
            self.realness = net(6, 8, 1)

        def training_step(self, batch, _):
            loss = (self.decoder(self.encoder(batch[0])) - batch[0]).square().mean()
            first, second = self.optimizers()
            first.zero_grad()
            self.manual_backward(loss + self.realness(batch[0]).mean())
            first.step()
            second.step()

        def configure_optimizers(self):
            both = [*self.encoder.parameters(), *self.decoder.parameters()]
            return [torch.optim.Adam(both), torch.optim.Adam(self.realness.parameters())]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = WithJudge()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*workers|.*logging interval")
            quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5)).fit(model, batches())
    assert zeros(model.realness) == 0


def test_two_optimizers_of_one_network_are_no_sides_of_a_game(tmp_path):
    class Split(LightningModule):
        """One optimizer for matrices, one for norms, as Muon is used."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            layers = [(nn.Linear(6, 6, bias=False), nn.LayerNorm(6)) for _ in range(3)]
            self.body = nn.Sequential(*itertools.chain(*layers))

        def training_step(self, batch, _):
            both = self.optimizers()
            for one in both:
                one.zero_grad()
            self.manual_backward((self.body(batch[0]) - batch[0]).square().mean())
            for one in both:
                one.step()

        def configure_optimizers(self):
            sides = [[p for p in self.parameters() if (p.dim() > 1) == side] for side in (1, 0)]
            return [torch.optim.Adam(side, lr=0.01) for side in sides]

    model = Split()
    quiet_trainer(tmp_path, GradualPruning(final_sparsity=0.5)).fit(model, batches())
    assert zeros(model) == 0.5


def deployed_by(networks, train):
    """What a reader finds after `train(data)` with an optimizer a network."""
    module = nn.ModuleList(networks)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in networks]
    reader, data = StructureReader(module, optimizers), torch.randn(4, 6)
    reader.begin(data)
    train(*networks, data)
    assert reader.end()
    return reader.deployed()


def test_cycles_with_an_optimizer_each():
    def train(ab, ba, judge_a, judge_b, data):
        other = data + 1
        fake_b, fake_a = ab(data), ba(other)
        ba(fake_b), ab(fake_a)
        judge_a(fake_a.detach()), judge_a(data), judge_b(fake_b.detach()), judge_b(other)

    nets = [net(6, 6), net(6, 6), net(6, 1), net(6, 1)]
    assert deployed_by(nets, train) == ("0", "1")


def test_halves_of_an_autoencoder_are_no_judges_of_one_another():
    def vae(encoder, decoder, data):
        decoder(encoder(data)), decoder(torch.randn(4, 3))

    assert deployed_by([net(6, 3), net(3, 6)], vae) == ()


def test_a_judge_of_latents_beside_draws_of_the_prior():
    def adversarial(encoder, decoder, judge, data):
        z = encoder(data)
        decoder(z), judge(z.detach()), judge(torch.randn(4, 3))

    assert deployed_by([net(6, 3), net(3, 6), net(3, 1)], adversarial) == ("0", "1")


def test_a_network_used_through_a_method_and_one_output_of_several():
    class Draw(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = net(3, 6)

        def sample(self, z):
            return {"image": self.inside(z), "z": z}

    def train(draw, judge, data):
        judge(draw.sample(torch.randn(4, 3))["image"].flip(1)), judge(data)

    assert deployed_by([Draw(), net(6, 1)], train) == ("0",)
