"""Channel pruning beside what else a run may hold."""

import copy

import pytest
import torch
from shrinking import FAST, Wide, run
from tiny import batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ChannelPruning,
    EMATeacher,
    GradualPruning,
    Guard,
    KnowledgeDistillation,
    Pair,
    ProjectedEMA,
    TargetError,
    load_compressed,
    save_compressed,
    sparsity,
)


def hidden(model):
    return model.encoder[0].out_features + model.decoder[0].out_features


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_an_average_as_the_teacher_follows(tmp_path):
    model = Wide()
    distill = KnowledgeDistillation(EMATeacher(0.9), losses="mse")
    sizes = []

    class Watch(ChannelPruning):
        def remove(self, trainer, pl_module):
            super().remove(trainer, pl_module)
            sizes.append(hidden(distill.session.teacher))
            assert sizes[-1] == hidden(pl_module)

    run(tmp_path, model, distill, Watch(**FAST))
    assert sizes[-1] == hidden(model) == 16


def test_features_that_are_compared_keep_their_sizes(tmp_path):
    model = Wide()
    model.example_input_array = torch.zeros(2, 6)
    pair = Pair("decoder", features=[("1", "1")])
    distill = KnowledgeDistillation(copy.deepcopy(model), pairs=[pair])
    run(tmp_path, model, ChannelPruning(**FAST), distill)
    assert (model.encoder[0].out_features, model.decoder[0].out_features) == (8, 16)


def test_the_average_is_cut_and_not_begun_anew(tmp_path):
    model, average = Wide(), ProjectedEMA(decay=0.9)
    seen = []

    class Watch(ChannelPruning):
        def remove(self, trainer, pl_module):
            before = average._average_model.module.encoder[0].weight.clone()
            stays = ~self._leaving[self.plan.graph.axes["encoder.0.weight", 0]]
            super().remove(trainer, pl_module)
            after = average._average_model.module.encoder[0].weight
            assert after.equal(before[torch.from_numpy(stays)])
            assert not after.equal(pl_module.encoder[0].weight)
            seen.append(len(after))

    run(tmp_path, model, average, Watch(**FAST))
    assert seen[-1] < 16


class Rows(torch.optim.SGD):
    """Keeps one number a row, as Adafactor does."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for one in group["params"]:
                self.state[one].setdefault("rows", torch.zeros(len(one), 1))
        return loss


def test_a_state_of_another_shape_begins_anew(tmp_path):
    class Odd(Wide):
        def configure_optimizers(self):
            return Rows(self.parameters(), lr=0.01)

    model = Odd()
    with pytest.warns(UserWarning, match=r"Rows begins anew: \['rows'\] cannot be cut"):
        trainer = run(tmp_path, model, ChannelPruning(**FAST))
    weight = model.encoder[0].weight
    assert len(trainer.optimizers[0].state[weight]["rows"]) == len(weight)


class Closed(Guard):
    """Holds the schedule for some batches."""

    def __init__(self):
        super().__init__(monitor="train/loss")
        self.waited = 0

    def off(self, recent, reference):
        return False

    def allows(self, trainer):
        self.waited += 1
        return self.waited > 10


def test_a_guard_holds_it(tmp_path):
    model, guard = Wide(), Closed()
    steps = []

    class Watch(ChannelPruning):
        def remove(self, trainer, pl_module):
            super().remove(trainer, pl_module)
            steps.append(trainer.global_step)

    run(tmp_path, model, guard, Watch(**FAST, end=0.4), epochs=8)
    assert guard.waited > 10
    assert steps[0] > 10
    assert hidden(model) == 16


@pytest.mark.parametrize("criterion", ["movement", "obs", "fisher"])
def test_statistics_of_masks_begin_anew(tmp_path, criterion):
    model = Wide()
    masks = GradualPruning(final_sparsity=0.5, criterion=criterion, frequency=10, end=0.9)
    run(tmp_path, model, masks, ChannelPruning(**FAST, end=0.4), epochs=8)
    assert hidden(model) == 16
    assert sparsity(model) == pytest.approx(0.5, abs=0.03)


def test_rewinding_is_refused(tmp_path):
    with pytest.raises(TargetError, match="leave rewind out"):
        run(tmp_path, Wide(), ChannelPruning(**FAST), GradualPruning(rewind=0.0))


def test_several_processes_are_refused(tmp_path, monkeypatch):
    from lightning_compress.callbacks import channel_pruning

    class Two:
        world_size = 2
        callbacks = ()

    with pytest.raises(TargetError, match="works in one process"):
        channel_pruning.claim_run(ChannelPruning(), Two())


def test_a_weight_that_two_parts_share_keeps_its_channels(tmp_path):
    class Tied(Wide):
        def __init__(self):
            super().__init__()
            self.decoder[2] = nn.Linear(16, 16)
            self.decoder.extend([nn.Linear(16, 16), nn.Linear(16, 6)])
            self.encoder.insert(3, nn.Linear(16, 16))
            self.encoder[3].weight = self.decoder[2].weight

    model = Tied()
    run(tmp_path, model, ChannelPruning(**FAST, final_sparsity=0.1))
    assert tuple(model.decoder[2].weight.shape) == (16, 16)
    assert model.encoder[0].out_features == 16  # it is read by the shared weight
    assert model.decoder[3].out_features == 14


# Compiling anew for a parameter of another size, torch 2.14 looks at the gradient of a copy.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_part(tmp_path, backend):
    model = Wide()
    model.decoder = torch.compile(model.decoder, backend=backend)
    run(tmp_path, model, ChannelPruning(**FAST))
    assert model.encoder[0].out_features + model.decoder._orig_mod[0].out_features == 16
    x = torch.rand(2, 8)
    torch.testing.assert_close(model.decoder(x), model.decoder._orig_mod(x))


def test_inputs_that_nothing_tells_come_from_the_first_batch(tmp_path):
    model = Wide()
    model.encoder = nn.Sequential(nn.Identity(), *model.encoder)
    channels = ChannelPruning(**FAST)
    run(tmp_path, model, channels)
    assert model.encoder[1].out_features + model.decoder[0].out_features == 16
    assert len(channels.plan.inputs["encoder"][0]) == 2  # two examples are kept of a batch


def test_a_second_fit_goes_on_with_the_small_model(tmp_path):
    model, channels = Wide(), ChannelPruning(**FAST)
    run(tmp_path, model, channels)
    assert hidden(model) == 16
    trainer = quiet_trainer(tmp_path, channels, max_epochs=2)
    trainer.fit(model, batches(), batches(count=2))
    assert hidden(model) == 16


def test_accumulated_gradients_go_with_their_channels():
    from lightning_compress.channels.resize import shrink

    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    net(torch.rand(3, 2)).sum().backward()
    before = net[0].weight.grad.clone()
    stays = torch.tensor([0, 2])
    shrink(net, {"0.weight": {0: stays}, "0.bias": {0: stays}, "1.weight": {1: stays}})
    assert net[0].weight.grad.equal(before[stays])
    net(torch.rand(3, 2)).sum().backward()  # adds to what is left
    assert net[0].weight.grad.shape == (2, 2)


def test_a_file_of_tied_weights_with_removed_channels_loads(tmp_path):
    class Tied(Wide):
        def __init__(self):
            super().__init__()
            self.encoder.insert(2, nn.Linear(16, 16))
            self.encoder.insert(3, nn.Linear(16, 16))
            self.encoder[3].weight = self.encoder[2].weight

    model = Tied()
    run(tmp_path, model, ChannelPruning(**FAST))
    small = model.encoder[2].weight.shape
    assert small[0] < 16
    save_compressed(model.encoder, tmp_path / "m.lcz")
    loaded = load_compressed(tmp_path / "m.lcz", Tied().encoder)
    assert loaded[3].weight is loaded[2].weight
    assert loaded[2].weight.shape == small
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x), model.encoder(x))
