"""Rewinding: weights of an early step come back, under the masks of now."""

import pytest
import torch
from lightning.pytorch import Callback
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress import GradualPruning, Rewinding, Staircase, sparsity


class Tape(Callback):
    """The state after each step of the owning optimizer, without any projection's help."""

    def __init__(self, pruning):
        self.pruning, self.states = pruning, []

    def on_train_start(self, trainer, pl_module):
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


@pytest.mark.parametrize("to", [0, 3, 0.125])
@pytest.mark.parametrize("make", [TinyAutoencoder, TinyGAN])
def test_each_round_begins_with_the_kept_weights_under_the_new_mask(tmp_path, to, make):
    pruning = GradualPruning(
        schedule=Staircase(final_sparsity=0.75, begin=0, end=24, stairs=4), frequency=1, rewind=to
    )
    tape, model = Tape(pruning), make()
    quiet_trainer(tmp_path, pruning, tape, max_epochs=4).fit(model, batches())
    kept = tape.states[{0: 0, 3: 3, 0.125: 4}[to]]
    part = "generator" if make is TinyGAN else ""
    for step, part_pruned in ((8, 0.25), (16, 0.5), (24, 0.75)):
        state, zeros, total = tape.states[step], 0, 0
        for name, value in state.items():
            if not name.startswith(part):
                # The discriminator learns on (its last bias has no gradient).
                assert value.dim() < 2 or not torch.equal(value, kept[name])
            elif value.dim() == 2:
                mask = value != 0
                assert torch.equal(value, kept[name] * mask)
                zeros, total = zeros + int((~mask).sum()), total + mask.numel()
            else:
                assert torch.equal(value, kept[name]), name
        assert zeros == round(part_pruned * total)
    assert sparsity(model) == pytest.approx(0.75, abs=0.01)
    after = tape.states[-1]
    assert any(not torch.equal(after[k], tape.states[24][k]) for k in after)


@pytest.mark.parametrize("reset", [True, False])
def test_momenta_are_forgotten_or_kept(tmp_path, reset):
    pruning = GradualPruning(
        schedule=Staircase(final_sparsity=0.5, begin=0, end=8, stairs=2),
        rewind=Rewinding(to=1, reset_optimizer=reset),
    )
    trainer = quiet_trainer(tmp_path, pruning, max_epochs=2)
    model = TinyAutoencoder()
    trainer.fit(model, batches())
    steps = trainer.optimizers[0].state[model.decoder.weight]["step"]
    assert int(steps) == (8 if reset else 16)


def test_pruning_before_anything_was_kept_is_told(tmp_path):
    pruning = GradualPruning(begin=0, end=10, frequency=2, rewind=8)
    with pytest.raises(RuntimeError, match="before the weights of step to=8 were kept"):
        quiet_trainer(tmp_path, pruning).fit(TinyAutoencoder(), batches())


@pytest.mark.parametrize("to", [-1, 1.5, "early", True])
def test_positions_out_of_range_are_named(to):
    with pytest.raises(ValueError, match="to="):
        Rewinding(to=to)
