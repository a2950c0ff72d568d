"""An image classifier found by architecture search, as MindSpore code that stands alone.

    python model.py model.safetensors              its size, and what it makes of random pixels
    python model.py model.safetensors a.png b.png  the likeliest classes of images

    from model import load, predict
    network = load("model.safetensors")
    probabilities = predict(network, pixels)       # uint8 (n, CHANNELS, SIZE, SIZE)

BLOCKS is the architecture: change the table, and `Network()` is another network to train.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import nn, ops


class Block(NamedTuple):
    """A row of the table: `layers` alike, but for the stride, which only the first has.

    Operations: `conv` is a k x k convolution; `dconv` a depthwise one, then a linear 1x1; `mbconv`
    the same behind a 1x1 that widens `expansion` times. `se` is the width of the squeeze-and-
    excitation relative to the layer's input, 0 for none. Residual branches: `none`; `identity`,
    where the shapes allow it; `pool`, 3x3 max pooling.
    """

    operation: str
    kernel: int
    stride: int
    expansion: int
    channels: int
    layers: int
    se: float
    skip: str


# ------------------------------------------------------------------------------- architecture

# Network 803f39f196126f96:
#   stem32 | r1_k3_s11_e1_i32_o16_noskip | r2_k3_s22_e6_i16_o24 | r3_k5_s22_e3_i24_o40_se0.25 |
#   r4_k3_s22_e6_i40_o80 | r2_k3_s11_e6_i80_o112_se0.25 | r3_k5_s22_e6_i112_o160_se0.25 |
#   r1_k3_s11_e6_i160_o320_noskip | head1280 | r224 | c1000

SIZE, CHANNELS = 224, 3
#: Of each channel, with pixels in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: An image file's shorter side is scaled to SIZE / CROP_PCT before the centre is cut out.
CROP_PCT, INTERPOLATION = 1.0, "BILINEAR"

#: Where a convolution's border needs an odd number of zeros, `same` puts one more behind, as
#: TensorFlow does; `symmetric` puts kernel // 2 on every side, as PyTorch does.
PADDING = "same"
BATCH_NORM = {"eps": 0.001, "momentum": 0.99}

STEM_CHANNELS, STEM_STRIDE = 32, 2
# fmt: off
BLOCKS = (
    #     operation, kernel, stride, expansion, channels, layers, se, skip
    Block("dconv",  3, 1, 1,  16, 1,  0.0, "none"),
    Block("mbconv", 3, 2, 6,  24, 2,  0.0, "identity"),
    Block("mbconv", 5, 2, 3,  40, 3, 0.25, "identity"),
    Block("mbconv", 3, 2, 6,  80, 4,  0.0, "identity"),
    Block("mbconv", 3, 1, 6, 112, 2, 0.25, "identity"),
    Block("mbconv", 5, 2, 6, 160, 3, 0.25, "identity"),
    Block("mbconv", 3, 1, 6, 320, 1,  0.0, "none"),
)
HEAD_CHANNELS = 1280
CLASSES = tuple(str(number) for number in range(1000))
# fmt: on

# ------------------------------------------------------------------------------- network


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, group: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution whose output is as large as its input, divided by the stride."""
    mode, border = ("same", 0) if PADDING == "same" else ("pad", kernel // 2)
    return nn.Conv2d(
        inputs, outputs, kernel, stride, mode, padding=border, group=group, has_bias=bias
    )


class ConvNorm(nn.Cell):
    """A convolution, its batch norm, and a ReLU unless it is linear."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        group: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = convolution(inputs, outputs, kernel, stride, group)
        self.norm = nn.BatchNorm2d(outputs, **BATCH_NORM)
        self.activation = nn.Identity() if linear else nn.ReLU()

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.activation(self.norm(self.conv(x)))


class SqueezeExcite(nn.Cell):
    """Channels weighted by a gate that sees the mean of each."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = convolution(channels, squeezed, 1, bias=True)
        self.expand = convolution(squeezed, channels, 1, bias=True)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        gate = ops.mean(x, (2, 3), True)
        return x * ops.sigmoid(self.expand(ops.relu(self.reduce(gate))))


class PoolSkip(nn.Cell):
    """3x3 max pooling whose border never wins; channels are cut, or filled up with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        mode, border = ("same", 0) if PADDING == "same" else ("pad", 1)
        self.pool = nn.MaxPool2d(3, stride, mode, padding=border)
        self.kept, self.missing = min(inputs, outputs), max(0, outputs - inputs)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        x = self.pool(x)[:, : self.kept]
        if self.missing:
            n, _, rows, columns = x.shape
            x = ops.cat((x, ops.zeros((n, self.missing, rows, columns), x.dtype)), 1)
        return x


class Layer(nn.Cell):
    """A layer of a block: (n, inputs, h, w) -> (n, block.channels, h / stride, w / stride)."""

    def __init__(self, block: Block, inputs: int, stride: int) -> None:
        super().__init__()
        outputs, middle = block.channels, inputs * block.expansion
        steps = {}
        if block.operation == "conv":
            middle = outputs
            steps["spatial"] = ConvNorm(inputs, outputs, block.kernel, stride)
        if block.operation == "mbconv":
            steps["expand"] = ConvNorm(inputs, middle)
        if block.operation != "conv":
            steps["depthwise"] = ConvNorm(middle, middle, block.kernel, stride, group=middle)
        if block.se:
            steps["se"] = SqueezeExcite(middle, max(1, int(inputs * block.se)))
        if block.operation != "conv":
            steps["project"] = ConvNorm(middle, outputs, linear=True)
        for name, step in steps.items():
            self.insert_child_to_cell(name, step)
        self.steps = list(steps.values())
        self.skip = None
        if block.skip == "identity" and stride == 1 and inputs == outputs:
            self.skip = nn.Identity()
        if block.skip == "pool":
            self.skip = PoolSkip(inputs, outputs, stride)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        y = x
        for step in self.steps:
            y = step(y)
        return y if self.skip is None else y + self.skip(x)


class Network(nn.Cell):
    """Normalised float32 images (n, CHANNELS, SIZE, SIZE) -> logits (n, len(CLASSES))."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(CHANNELS, STEM_CHANNELS, 3, STEM_STRIDE)
        blocks, inputs = [], STEM_CHANNELS
        for block in BLOCKS:
            layers = [Layer(block, inputs, block.stride)]
            layers += [Layer(block, block.channels, 1) for _ in range(1, block.layers)]
            blocks.append(nn.SequentialCell(layers))
            inputs = block.channels
        self.blocks = nn.CellList(blocks)
        self.head = ConvNorm(inputs, HEAD_CHANNELS)
        self.classifier = nn.Dense(HEAD_CHANNELS, len(CLASSES))

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(ops.mean(self.head(x), (2, 3)))


# ------------------------------------------------------------------------------- use


def load(path: str) -> Network:
    """Return the network with the weights of a .safetensors or .ckpt file, ready to predict.

    Raises:
        ValueError: The file is missing, damaged, or holds another network's weights.
    """
    network = Network()
    kind = "safetensors" if path.endswith(".safetensors") else "ckpt"
    # A .ckpt holds texts about the training, too.
    loaded = ms.load_checkpoint(path, format=kind).items()
    weights = {name: value for name, value in loaded if isinstance(value, ms.Parameter)}
    wanted = {parameter.name: parameter.shape for parameter in network.get_parameters()}
    found = {name: parameter.shape for name, parameter in weights.items()}
    if found != wanted:
        names = [x for x in {**wanted, **found} if wanted.get(x) != found.get(x)]
        raise ValueError(
            f"{path} holds another network's weights: {len(names)} parameters are missing,"
            f" unexpected or of another shape, such as {names[0]}."
        )
    ms.load_param_into_net(network, weights, strict_load=True)
    network.set_train(False)
    return network


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 (n, CHANNELS, SIZE, SIZE) -> float32, as the network was trained on."""
    mean, deviation = np.array(MEAN)[:, None, None], np.array(DEVIATION)[:, None, None]
    scale, offset = 1 / (255 * deviation), mean / deviation
    return pixels.astype(np.float32) * scale.astype(np.float32) - offset.astype(np.float32)


def predict(network: Network, pixels: np.ndarray) -> np.ndarray:
    """uint8 (n, CHANNELS, SIZE, SIZE) -> float32 probabilities (n, len(CLASSES))."""
    return ops.softmax(network(ms.Tensor(normalise(pixels))), 1).asnumpy()


def read_image(path: str) -> np.ndarray:
    """An image file -> uint8 (CHANNELS, SIZE, SIZE): scaled, and the centre cut out."""
    from mindspore.dataset import vision
    from PIL import Image

    with Image.open(path) as opened:
        if opened.mode.startswith("I"):  # 16 bits; conversion would clip at 255
            gray = (np.asarray(opened.convert("I")) >> 8).clip(0, 255)
            image = Image.fromarray(gray.astype(np.uint8))
        else:
            image = opened.convert("RGBA") if opened.mode == "P" else opened
        image = image.convert("L" if CHANNELS == 1 else "RGB")
    pixels = np.asarray(image).reshape(image.height, image.width, CHANNELS)
    pixels = vision.Resize(int(SIZE / CROP_PCT), vision.Inter[INTERPOLATION])(pixels)
    pixels = vision.CenterCrop(SIZE)(pixels)
    return pixels.reshape(SIZE, SIZE, CHANNELS).transpose(2, 0, 1)


def main() -> None:
    """Print the network's size and what it makes of images, or of random pixels."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", help="the .safetensors or .ckpt file")
    parser.add_argument("images", nargs="*", help="image files; random pixels without any")
    arguments = parser.parse_args()
    try:
        network = load(arguments.weights)
        pixels = [read_image(path) for path in arguments.images]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not pixels:
        shape = (CHANNELS, SIZE, SIZE)
        pixels.append(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    count = sum(parameter.size for parameter in network.trainable_params())
    print(f"{count:,} trainable parameters, {len(CLASSES)} classes, {SIZE} x {SIZE} pixels")
    names = arguments.images or ["random pixels"]
    for name, probabilities in zip(names, predict(network, np.stack(pixels)), strict=True):
        best = np.argsort(-probabilities)[:3]
        print(f"{name}: " + ", ".join(f"{CLASSES[c]} {probabilities[c]:.1%}" for c in best))


if __name__ == "__main__":
    main()
