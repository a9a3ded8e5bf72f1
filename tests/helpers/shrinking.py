"""A small autoencoder with channels to remove, and a run that removes them."""

from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

FAST = {"round_to": 2, "fade": 2, "frequency": 2}


class Wide(TinyAutoencoder):
    """Two hidden layers of 16."""

    def __init__(self, **options):
        super().__init__(**options)
        self.encoder = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8)
        )
        self.decoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))

    def validation_step(self, batch, _):
        self.log("val/loss", (self(batch[0]) - batch[0]).square().mean())


def run(tmp_path, model, *callbacks, epochs=5, **more):
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=epochs, **more)
    trainer.fit(model, batches(), batches(count=2))
    return trainer
