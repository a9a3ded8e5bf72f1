import inspect
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

FOLDER = Path(__file__).parents[3] / "conf" / "model"
DIMS = {"image_size": 16, "channels": 1, "num_classes": 10, "steps": 16, "features": 16}
DIMS |= {"sample_rate": 8000, "n_fft": 256, "hop_length": 64, "num_mels": 40, "segment": 4096}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_spells_out_the_constructor(path):
    config = OmegaConf.load(path)
    parameters = inspect.signature(get_class(config["_target_"])).parameters
    assert set(config) - {"_target_"} == set(parameters)
    for name, parameter in parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        if parameter.default is not parameter.empty and config[name] is not None:
            default = parameter.default
            assert config[name] == (list(default) if isinstance(default, tuple) else default), name
    missing = [name for name in DIMS if name in config and config[name] is None]
    model = instantiate(config, **{name: DIMS[name] for name in missing})
    assert type(model) is get_class(config["_target_"])


def test_all_models_have_a_config():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    generative = {"flow_matching", "dcgan", "wgan_gp", "vae", "recurrent_vae", "vocoder", "pix2pix"}
    generative |= {"autoencoder_kl", "vq_vae"}
    assert names == generative | {"simple_net", "resnet18"}
