import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress.lab.models.networks import (
    ConvEncoder,
    ResNet18Network,
    conv_discriminator,
    conv_generator,
    initialize_dcgan,
    split_image_size,
)
from lightning_compress.lab.models.recurrent_vae import PAD, TokenDecoder, TokenEncoder

SIZES = [(size, channels) for size in (16, 28, 32, 64) for channels in (1, 3)]


@given(base=st.integers(4, 7), stages=st.integers(1, 8))
def test_every_valid_size_is_split(base, stages):
    assert split_image_size(base * 2**stages) == (base, stages)


@given(size=st.integers(-3, 3000))
def test_other_sizes_name_valid_neighbours(size):
    valid = {base << k for base in range(4, 8) for k in range(1, 12)}
    if size in valid:
        return
    with pytest.raises(ValueError, match=f"image_size={size} is not") as error:
        split_image_size(size)
    named = [int(word) for word in str(error.value).split("sizes: ")[1].split(", ")]
    below, above = [v for v in valid if v < size], [v for v in valid if v > size]
    assert named == ([max(below)] if below else []) + [min(above)]


@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_shapes(size, channels):
    pictures = torch.rand(2, channels, size, size)
    generator = conv_generator(size, channels, latent_dim=5, width=8, final=nn.Tanh())
    assert generator(torch.randn(2, 5)).shape == pictures.shape
    assert conv_discriminator(size, channels, width=8)(pictures).shape == (2,)
    encoder = ConvEncoder(size, channels, latent_dim=5, width=8)
    assert [tuple(out.shape) for out in encoder(pictures)] == [(2, 5), (2, 5)]


def test_generator_is_the_standard_one():
    generator = conv_generator(64, 3, latent_dim=5, width=8, final=nn.Tanh())
    ups = [layer for layer in generator if isinstance(layer, nn.ConvTranspose2d)]
    assert [(up.in_channels, up.out_channels) for up in ups] == [
        (64, 64),
        (64, 32),
        (32, 16),
        (16, 3),
    ]
    assert all(up.kernel_size == (4, 4) and up.stride == (2, 2) for up in ups)
    assert isinstance(generator[-1], nn.Tanh)


def test_discriminator_judges_each_picture_alone():
    network = conv_discriminator(16, 1, width=8)
    pictures = torch.randn(6, 1, 16, 16)
    alone = torch.cat([network(picture[None]) for picture in pictures])
    torch.testing.assert_close(network(pictures), alone)


def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    network = conv_discriminator(16, 1, width=8, spectral_norm=True)
    for _ in range(50):  # the power iteration runs in the forward pass
        network(torch.randn(2, 1, 16, 16))
    layers = [layer for layer in network if hasattr(layer, "weight")]
    assert len(layers) == 3
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=0.02)


def test_initialize_dcgan():
    torch.manual_seed(0)
    network = conv_generator(16, 1, latent_dim=64, width=64, final=nn.Tanh())
    initialize_dcgan(network)
    for name in ("project", "up1", "up2"):
        assert network.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.05)
    normalized = conv_discriminator(16, 1, width=8, spectral_norm=True)
    before = normalized.state_dict()["down1.parametrizations.weight.original"].clone()
    initialize_dcgan(normalized)
    after = normalized.state_dict()["down1.parametrizations.weight.original"]
    assert torch.equal(before, after)


def test_resnet_is_torchvisions():
    reference = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    ours = ResNet18Network(3, 7, width=64, small=False).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), reference(x))


def test_token_encoder_equals_a_packed_sequence():
    torch.manual_seed(0)
    encoder = TokenEncoder(9, embedding=8, latent_dim=3, hidden=8)
    tokens = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 4, 5, 6, 7, 2]])
    packed = nn.utils.rnn.pack_padded_sequence(
        encoder.embedding(tokens), (tokens != PAD).sum(1), batch_first=True, enforce_sorted=False
    )
    _, last = encoder.gru(packed)
    torch.testing.assert_close(encoder(tokens), (encoder.mu(last[0]), encoder.logvar(last[0])))


def test_token_decoder_steps_equal_one_pass():
    torch.manual_seed(0)
    decoder = TokenDecoder(9, embedding=8, latent_dim=3, hidden=8)
    tokens, z = torch.randint(1, 9, (4, 6)), torch.randn(4, 3)
    whole, last = decoder(tokens, decoder.initial_state(z), z)
    state, steps = decoder.initial_state(z), []
    for column in tokens.split(1, dim=1):
        logits, state = decoder(column, state, z)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    torch.testing.assert_close(state, last)
