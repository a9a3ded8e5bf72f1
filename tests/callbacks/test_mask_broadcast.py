"""The first process's mask holds everywhere, whatever another one has made of its own weights."""

from types import SimpleNamespace

import pytest
import torch

from lightning_compress import GradualPruning
from lightning_compress.pruning.masks import pack_mask


class Slot:
    shards = None

    def set_mask(self, mask):
        self.mask = mask


@pytest.mark.parametrize(("processes", "taken"), [(2, "first"), (1, "own")])
def test_masks_are_the_first_processs(processes, taken):
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(3, 7, generator=generator) > 0.5 for name in ("own", "first")}
    sent = []

    def broadcast(packed):
        """What the second process receives of the first one."""
        sent.append(packed)
        return pack_mask(masks["first"])

    trainer = SimpleNamespace(world_size=processes, strategy=SimpleNamespace(broadcast=broadcast))
    projected = Slot()
    GradualPruning(final_sparsity=0.5).set_masks([projected], [masks["own"]], trainer)
    assert torch.equal(projected.mask, masks[taken])
    assert [one.tolist() for one in sent] == [pack_mask(masks["own"]).tolist()] * (processes - 1)
