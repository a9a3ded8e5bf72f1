"""Statistics are gathered in the steps before an event, and no longer."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress import Constant, GradualPruning, Linear, Staircase, sparsity
from lightning_compress.pruning.criteria import Hutchinson
from lightning_compress.pruning.statistics import WHOLE_RUN


class Spy:
    """Counts what it is asked for, step by step."""

    def __init__(self, window):
        self.window, self.active, self.log, self.gathered = window, False, [], 0
        self.pruning = None

    def begin(self, projected_weights):
        assert not self.active
        assert [projected.path for projected in projected_weights] == self.pruning.paths()
        self.active, self.gathered = True, 0
        self.log.append(("begin", self.step()))

    def step(self):
        return self.pruning.projector.steps[0]

    def scores(self, projected):
        assert self.active
        self.log.append(("scores", self.step()))
        return projected.values().abs()

    def end(self):
        if self.active:
            self.log.append(("end", self.step()))
        self.active = False

    def at(self, what):
        return list(dict.fromkeys(step for name, step in self.log if name == what))


def fit(tmp_path, spy, model=None, epochs=4, **arguments):
    pruning = GradualPruning(criterion=spy, **arguments)
    spy.pruning = pruning
    model = TinyAutoencoder() if model is None else model
    quiet_trainer(tmp_path, pruning, max_epochs=epochs).fit(model, batches())
    assert not spy.active
    return model, pruning


@pytest.mark.parametrize("make", [TinyAutoencoder, TinyGAN])
def test_known_events_are_preceded_by_their_window(tmp_path, make):
    spy = Spy(3)
    fit(tmp_path, spy, make(), final_sparsity=0.8, begin=5, end=25, frequency=8)
    assert spy.at("scores") == [13, 21, 25]  # at 5 the schedule still asks for nothing
    assert spy.at("begin") == [10, 18, 22]
    assert spy.at("end") == [13, 21, 25]


def test_a_first_event_without_statistics_waits_for_them(tmp_path):
    spy = Spy(4)
    schedule = Constant(final_sparsity=0.5, begin=0, end=1)
    model, _ = fit(tmp_path, spy, schedule=schedule)
    assert spy.at("begin") == [0]
    assert spy.at("scores") == [4]
    assert spy.at("end") == [4]
    assert sparsity(model) == 0.5


@pytest.mark.parametrize("end", [0.7, 1.0])
def test_fractions_of_the_run_reach_their_end(tmp_path, end):
    spy = Spy(3)
    model, _ = fit(tmp_path, spy, final_sparsity=0.75, end=end, frequency=1)
    assert sparsity(model) == 0.75
    assert spy.at("begin") == [1]  # when the pace is known; events at every step: windows overlap
    assert spy.at("scores")[0] == 4


def test_events_that_would_change_nothing_gather_nothing(tmp_path):
    spy = Spy(2)
    stairs = Staircase(final_sparsity=0.6, begin=0, end=24, stairs=3)
    fit(tmp_path, spy, schedule=stairs)
    assert spy.at("scores") == [12, 24]
    assert spy.at("begin") == [10, 22]
    assert spy.at("end") == [12, 24]


def test_overlapping_windows_go_on(tmp_path):
    spy = Spy(6)
    fit(tmp_path, spy, schedule=Linear(final_sparsity=0.5, begin=0, end=20), frequency=4)
    assert spy.at("scores") == [6, 8, 12, 16, 20]
    assert spy.at("begin") == [0]


@pytest.mark.parametrize("limits", [{"begin": 4, "end": 20, "frequency": 8}, {"end": 0.6}])
def test_a_window_of_the_whole_run_is_always_open_and_ready(tmp_path, limits):
    spy = Spy(WHOLE_RUN)
    model, _ = fit(tmp_path, spy, final_sparsity=0.5, **limits)
    assert spy.at("begin") == [0]
    assert spy.at("scores")[0] == (12 if "begin" in limits else 1)  # the first to ask for any
    assert len(spy.at("end")) == 1
    assert sparsity(model) == 0.5


def test_a_run_too_short_for_its_statistics_is_told(tmp_path):
    with pytest.warns(UserWarning, match="an event still waits for its statistics"):
        fit(tmp_path, Spy(500), final_sparsity=0.5)


def test_a_failing_run_frees_the_statistics(tmp_path):
    class Crash(Callback):
        def on_train_batch_end(self, *_):
            raise ConnectionError

    spy = Spy(5)
    pruning = GradualPruning(criterion=spy, final_sparsity=0.5, begin=0, end=20)
    spy.pruning = pruning
    with pytest.raises(ConnectionError):
        quiet_trainer(tmp_path, pruning, Crash()).fit(TinyAutoencoder(), batches())
    assert spy.log[-1][0] == "end"


def test_without_a_window_a_criterion_begins_and_ends_at_the_event(tmp_path):
    spy = Spy(0)
    fit(tmp_path, spy, final_sparsity=0.5)
    assert spy.at("scores")
    assert spy.at("begin") == spy.at("scores") == spy.at("end")


def test_hutchinson_prunes_where_the_loss_is_flat(tmp_path):
    model = TinyAutoencoder()
    with torch.no_grad():
        model.decoder.weight.fill_(1.0)
    bends = torch.arange(48.0).view(6, 8)  # second derivatives of the loss that it is given

    def loss():
        return (model.decoder.weight.square() * bends).sum() / 2

    schedule = Constant(final_sparsity=0.5, begin=0, end=2)
    pruning = GradualPruning(
        criterion=Hutchinson(loss), schedule=schedule, include=["decoder.weight"], scope="layer"
    )
    quiet_trainer(tmp_path, pruning, max_epochs=3).fit(model, batches(count=1))
    kept = ~pruning.projected_weights[0].pruned
    assert int(kept.sum()) == 24
    assert torch.equal(kept.flatten(), torch.arange(48) >= 24)


class Gradients(Spy):
    """Sums gradients; its state is saved."""

    def __init__(self, window):
        super().__init__(window)
        self.sums, self.taps = {}, []

    def begin(self, projected_weights):
        self.active, self.sums = True, {projected.path: 0.0 for projected in projected_weights}
        for projected in projected_weights:
            tap = self.tap(projected.path)
            projected.taps.append(tap)
            self.taps.append((projected, tap))

    def tap(self, path):
        def add(gradient):
            self.sums[path] = self.sums[path] + gradient.detach().abs()

        return add

    def scores(self, projected):
        return self.sums[projected.path]

    def end(self):
        for projected, tap in self.taps:
            projected.taps.remove(tap)
        self.taps = []

    def state_dict(self):
        return {"sums": dict(self.sums)}

    def load_state_dict(self, state):
        self.sums = dict(state["sums"])


def test_statistics_go_through_a_checkpoint(tmp_path):
    def run(folder, epochs, ckpt_path=None):
        seed_everything(3, verbose=False)
        model = TinyAutoencoder()
        pruning = GradualPruning(
            criterion=Gradients(6), final_sparsity=0.8, begin=0, end=30, frequency=10
        )
        saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1)
        trainer = quiet_trainer(
            folder, pruning, saver, max_epochs=epochs, enable_checkpointing=True
        )
        trainer.fit(model, batches(), ckpt_path=ckpt_path)
        return model

    whole = run(tmp_path / "whole", 4)
    with pytest.warns(UserWarning, match="ended at sparsity"):
        run(tmp_path / "parts", 1)  # stops at step 8: the window of the event at 10 is open
    resumed = run(tmp_path / "parts", 4, tmp_path / "parts" / "last.ckpt")
    assert torch.equal(whole.decoder.weight, resumed.decoder.weight)
    assert torch.equal(whole.encoder[0].weight, resumed.encoder[0].weight)
    assert sparsity(whole) == pytest.approx(round(0.8 * 96) / 96)


def test_a_criterion_may_correct_the_weights_that_stay(tmp_path):
    class Surgeon(Spy):
        def update(self, projected, mask):
            assert int((~mask).sum()) > 0
            return projected.values() + 100.0 if "decoder" in projected.path else None

    spy = Surgeon(0)
    schedule = Constant(final_sparsity=0.5, begin=0, end=1)
    model, _ = fit(tmp_path, spy, schedule=schedule, epochs=1)
    kept = model.decoder.weight[model.decoder.weight != 0]
    assert (kept > 90).all()
    assert (model.encoder[0].weight < 90).all()
    assert sparsity(model) == 0.5
