"""What all DataModules share: loaders, seeds, hashes, and how Lightning drives them."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from lightning_compress.lab.data import DigitRows, Digits
from lightning_compress.lab.data.base import (
    EpochSampler,
    SplitIndices,
    TensorSplit,
    fraction_split,
    stratified_split,
)

pytestmark = [
    # the machine decides how many loader processes are worth it, and these runs need none
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning 2.6 asks torch 2.14 for a tree's leaves in the old way
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


class Tiny(pl.LightningModule):
    """One linear layer that keeps what it was fed."""

    def __init__(self, size):
        super().__init__()
        self.layer = torch.nn.Linear(size, 1)
        self.seen = []

    def training_step(self, batch, _):
        x, y = batch
        self.seen.append((self.current_epoch, x.clone(), y.clone()))
        return self.layer(x.flatten(1)).square().mean()

    def validation_step(self, batch, _):
        self.layer(batch[0].flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path, **kwargs):
    return pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **kwargs},
    )


@pytest.mark.parametrize(("cls", "size"), [(Digits, 256), (DigitRows, 64)])
def test_lightning_fits_two_batches(cls, size, tmp_path):
    model, data = Tiny(size), cls(batch_size=16)
    trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(model, data)
    assert [len(y) for _, _, y in model.seen] == [16, 16]


def test_setup_is_idempotent():
    data = Digits()
    data.setup("fit")
    before = data.splits
    data.setup("validate")
    assert data.splits is before


def test_before_setup_the_splits_say_what_to_do():
    for name in ("train_dataset", "val_dataset", "test_dataset", "fingerprint"):
        with pytest.raises(RuntimeError, match=r"Digits holds no data yet: call setup\(\)"):
            getattr(Digits(), name)


def test_batches_equal_those_of_an_ordinary_loader():
    data = Digits(batch_size=64)
    data.setup()
    rows = list(EpochSampler(data.train_dataset, seed=0))
    ordinary = DataLoader(
        TensorDataset(*data.train_dataset.tensors), 64, sampler=rows, drop_last=True
    )
    for got, expected in zip(data.train_dataloader(), ordinary, strict=True):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_the_split_itself_works_in_an_ordinary_loader():
    data = Digits()
    data.setup()
    x, y = next(iter(DataLoader(data.val_dataset, batch_size=7)))
    assert torch.equal(x, data.val_dataset[:7][0])
    assert torch.equal(y, data.val_dataset[:7][1])


@pytest.mark.parametrize(("batch_size", "batches"), [(500, 2), (1200, 1), (1201, 1)])
def test_training_drops_a_partial_batch_only_beside_full_ones(batch_size, batches):
    data = Digits(batch_size=batch_size)
    data.setup()
    sizes = [len(y) for _, y in data.train_dataloader()]
    assert sizes == [min(batch_size, 1200)] * batches
    assert sum(len(y) for _, y in data.val_dataloader()) == 200
    assert sum(len(y) for _, y in data.test_dataloader()) == 397


def test_validation_and_test_keep_their_order():
    data = Digits(batch_size=64)
    data.setup()
    for loader, split in (
        (data.val_dataloader(), data.val_dataset),
        (data.test_dataloader(), data.test_dataset),
    ):
        assert torch.equal(torch.cat([x for x, _ in loader]), split.tensors[0])


def test_worker_processes_give_the_same_batches():
    alone, shared = Digits(batch_size=256), Digits(batch_size=256, num_workers=1)
    for data in (alone, shared):
        data.setup()
    pairs = zip(alone.train_dataloader(), shared.train_dataloader(), strict=True)
    assert all(torch.equal(a[0], b[0]) for a, b in pairs)


def test_reading_leaves_the_global_random_stream_alone():
    data = Digits()
    data.setup()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_lightning_each_pass_has_its_own_order():
    data = Digits(batch_size=100)
    data.setup()
    loader = data.train_dataloader()
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_differ_and_a_resumed_run_repeats_them(workers, tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, resumed = Tiny(256), Tiny(256)
    run = {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 0}
    feed = {"batch_size": 16, "num_workers": workers}
    trainer(tmp_path, callbacks=[Save()], **run).fit(whole, Digits(**feed))
    first, second, third = (
        torch.cat([x for at, x, _ in whole.seen if at == epoch]) for epoch in range(3)
    )
    assert not torch.equal(first, second)
    trainer(tmp_path, **run).fit(resumed, Digits(**feed), ckpt_path=tmp_path / "1.ckpt")
    assert torch.equal(torch.cat([x for _, x, _ in resumed.seen]), third)


def test_several_processes_share_the_rows_that_make_a_full_batch():
    class Stub:  # what a run of two processes looks like to a DataModule
        world_size = 2

    data = Digits(batch_size=700)
    data.setup()
    data.trainer = Stub()
    assert not data.train_dataloader().drop_last  # 600 rows a process hold no full batch
    data.batch_size = 600
    assert data.train_dataloader().drop_last


def test_lightning_can_distribute_the_loader():
    """Two processes see each row once: the sampler is replaceable, the batches stay whole."""
    data = Digits(batch_size=100)
    data.setup()
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)  # how Lightning knows shuffled loaders
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank, shuffle=True)
        # what Trainer does under DDP, with use_distributed_sampler=True
        part = [x for x, _ in _update_dataloader(loader, sampler)]
        assert [len(x) for x in part] == [100] * 6
        seen.append(torch.cat(part))
    rows = sorted(map(tuple, torch.cat(seen).flatten(1).numpy()))
    assert rows == sorted(map(tuple, data.train_dataset.tensors[0].flatten(1).numpy()))


def test_the_fingerprint_follows_the_training_content():
    def fingerprint(cls=Digits, **kwargs):
        data = cls(**kwargs)
        data.setup()
        return data.fingerprint

    same = fingerprint()
    assert same == fingerprint(batch_size=3)
    others = [fingerprint(seed=1), fingerprint(fit="resize"), fingerprint(DigitRows)]
    assert len({same, *others}) == 4


def test_bytes_come_out_as_fractions():
    x = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    split = TensorSplit(x, torch.arange(4))
    torch.testing.assert_close(split.tensors[0], x.float() / 255)
    with pytest.raises(ValueError, match="x has 4 rows, y has 3"):
        TensorSplit(x, torch.arange(3))


@pytest.mark.parametrize("seed", [0, 7])
def test_split_indices_partition_the_rows(seed):
    labels = torch.arange(97) % 3
    for parts in (fraction_split(97, 0.2, 0.1, seed), stratified_split(labels, 60, 20, seed)):
        assert isinstance(parts, SplitIndices)
        assert sorted(torch.cat(parts).tolist()) == list(range(97))


def test_too_few_rows_for_three_splits():
    assert [len(part) for part in fraction_split(3, 0.1, 0.1, 0)] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"2 rows .*1 validation and 1 test"):
        fraction_split(2, 0.1, 0.1, 0)
