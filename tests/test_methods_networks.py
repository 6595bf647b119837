"""Networks: shapes, unit features, the 13-layer network's layers, weights that come back from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.common import networks
from methods.common.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 16), (28, 28), (32, 24)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_size_gives_unit_features_and_logits(size: tuple[int, int], channels: int) -> None:
    network = networks.build("cnn-small", n_channels=channels, image_size=size, n_outputs=7, weight_norm=True)
    images = torch.rand(5, channels, *size)
    assert network(images).shape == (5, 7)
    torch.testing.assert_close(network.features(images).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 16), (28, 28), (20, 32)])
def test_the_flat_network_keeps_positions_apart(size: tuple[int, int]) -> None:
    network = networks.build("cnn-flat", n_channels=1, image_size=size, n_outputs=7, weight_norm=False).eval()
    images = torch.rand(3, 1, *size)
    assert network(images).shape == (3, 7)
    assert min(network.body[:-4](images).shape[2:]) <= 4
    assert not torch.allclose(network(images), network(images.roll(2, dims=3)))


def test_the_13_layer_network_is_the_papers() -> None:
    network = networks.build("cnn13", n_channels=3, image_size=(32, 32), n_outputs=100, weight_norm=True)
    convs = [layer for layer in network.body if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [128, 128, 128, 256, 256, 256, 512, 256, 128]
    assert [conv.kernel_size[0] for conv in convs] == [3] * 7 + [1] * 2
    assert [conv.padding[0] for conv in convs] == [1] * 6 + [0] * 3
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in network.body) == 2
    assert all(hasattr(layer, "parametrizations") for layer in (*convs, network.head))
    assert not any(isinstance(layer, nn.Dropout) for layer in network.modules())
    before_the_mean = network.body[:-2](torch.zeros(1, 3, 32, 32))
    assert before_the_mean.shape == (1, 128, 6, 6)


def test_standardisation_is_of_the_data_and_travels_with_the_weights() -> None:
    architecture = {"n_channels": 3, "image_size": (8, 8), "n_outputs": 4, "weight_norm": False}
    network = networks.build("cnn-small", **architecture)
    images = torch.rand(200, 3, 8, 8) * torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    network.standardise.set(images.mean((0, 2, 3)), images.std((0, 2, 3)))
    standardised = network.standardise(images)
    torch.testing.assert_close(standardised.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(standardised.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    again = networks.build("cnn-small", **architecture)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(images), network.eval()(images))


def test_unknown_network() -> None:
    with pytest.raises(UserError, match="--network vgg is unknown"):
        networks.build("vgg", n_channels=1, image_size=(8, 8), n_outputs=2, weight_norm=False)


@pytest.mark.parametrize(("size", "side"), [(32, 32), (84, 21)])
def test_resnet18_keeps_small_images_whole_in_its_stem(size: int, side: int) -> None:
    network = networks.build("resnet18", n_channels=1, image_size=(size, size), n_outputs=9, weight_norm=True)
    shapes: list[torch.Size] = []
    network.body.layer1.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    images = torch.rand(2, 1, size, size)
    assert network(images).shape == (2, 9)
    assert shapes == [(2, 64, side, side)]
    assert network.features(images).shape == (2, 512)
    torch.testing.assert_close(network.features(images).norm(dim=1), torch.ones(2))
    convs = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convs) == 20  # 17 of the 18 layers and 3 shortcuts; the 18th is the head
    assert all(hasattr(layer, "parametrizations") for layer in (*convs, network.head))
