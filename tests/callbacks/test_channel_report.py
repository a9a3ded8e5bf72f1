"""What a run says of channels: counts of each layer, whole paths, what holds a budget."""

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import quiet_trainer
from torch import nn

from lightning_compress import ChannelPruning


class Grouped(nn.Module):
    """A layer of groups whose forward pass takes no other number of channels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(8, 16)
        self.second, self.last = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 1, 1)

    def fixed(self, x):
        assert x.shape[1] == 32
        return x

    def forward(self, x):
        return self.last(self.fixed(self.second(self.norm(self.first(x)).relu())))


class Nested(LightningModule):
    """Its only child holds the network deep inside, and is called by the training step."""

    def __init__(self):
        super().__init__()
        inner = nn.ModuleDict({"with_a_path_that_is_long_enough_for_a_table": Grouped()})
        self.network = nn.ModuleDict({"of_somebody_who_likes_long_names": inner})

    @property
    def net(self):
        inner = self.network["of_somebody_who_likes_long_names"]
        return inner["with_a_path_that_is_long_enough_for_a_table"]

    def training_step(self, batch, _):
        return (self.net(batch) - batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.rand(16, 1, 6, 6), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_the_table_counts_channels_and_names_whole_paths(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    pruning = ChannelPruning(final_sparsity=0.5, round_to=2, fade=1, on_miss="raise")
    quiet_trainer(tmp_path, pruning, max_epochs=5).fit(model := Nested())
    assert model.net.first.out_channels == model.net.norm.num_channels == 8
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    names, reasons = "".join(row[0] for row in rows), " ".join(row[3] for row in rows)
    path = "network.of_somebody_who_likes_long_names.with_a_path_that_is_long_enough_for_a_table"
    for layer in ("first", "second", "last"):
        assert f"{path}.{layer}" in names
    assert ["16", "8"] in [row[1:3] for row in rows]
    assert ["32", "32"] in [row[1:3] for row in rows]
    assert "assert x.shape[1] == 32" in reasons


def test_a_budget_that_cannot_be_met_names_what_holds(tmp_path):
    pruning = ChannelPruning(budget={"macs": 0.05}, round_to=2)
    with pytest.raises(ValueError, match="cannot be met") as caught:
        quiet_trainer(tmp_path, pruning, max_epochs=2).fit(Nested())
    said = str(caught.value)
    assert "What holds it: " in said
    first = said.partition("What holds it: ")[2].partition(";")[0]
    assert ".second (" in first
    assert "of the macs" in first
    assert "assert x.shape[1] == 32" in first
