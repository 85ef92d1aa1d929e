"""A packed network as an ONNX graph of ordinary layers, whose binary weights take a bit each in the file."""

import json
from typing import Any

import numpy as np
import onnx
from flax import nnx
from onnx import TensorProto, helper, numpy_helper

import stam_jax
from experiments.config import SettingsError
from experiments.deployment.packed_network import Stored
from experiments.networks import models

# The first opset with a bitwise "and".
_OPSET = 18
# From height, width, inputs, outputs to ONNX's outputs, inputs, height, width.
_TO_OIHW = (3, 2, 0, 1)
_TO_THE_END = np.iinfo(np.int64).max


class _Graph:
    """Nodes and constants as they come; each node is named as what it puts out."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, values: Any) -> str:
        """An array in the file, by its name."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """A node, by its name."""
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name


def build(network: Stored) -> onnx.ModelProto:
    """The graph that maps "images", uint8 of [batch, height, width, channels], to "logits" in float32.

    Args:
        network: a packed network that computes in float32.

    Returns:
        The model, checked by ONNX's own rules.

    Raises:
        SettingsError: if a kernel is packed otherwise than as binary weights of a layer or its channels, or
            the network is not one of convolutions.
    """
    graph, images = _Graph(), network.images
    module: Any = nnx.merge(network.graph, network.tree["params"], network.tree["stats"], copy=True)
    _add_constants(graph)
    x = _standardised(graph, module)
    match module:
        case models.VGG():
            x = _vgg(graph, module, x, images.shape[:2])
        case models.ResNet():
            x = _resnet(graph, module, x)
        case _:
            raise SettingsError(
                f"--to onnx: this is for networks of convolutions; {network.model} can go --to stablehlo."
            )
    _head(graph, module.head, x)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"{network.model} on {network.dataset}",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *images.shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", images.classes])],
            graph.constants,
        ),
        producer_name="stam_jax",
        producer_version=stam_jax.__version__,
        opset_imports=(opsets := [helper.make_opsetid("", _OPSET)]),
        # What the opset needs and no newer, for older runtimes to read it.
        ir_version=helper.find_min_ir_version_for(opsets),
    )
    said = {"dataset": network.dataset, "method": network.method, "seed": str(network.seed)}
    said |= {"test_accuracy": str(network.accuracy), "labels": json.dumps(images.labels)}
    helper.set_model_props(model, said)
    onnx.checker.check_model(model, full_check=True)
    return model


def _add_constants(graph: _Graph) -> None:
    """What all kernels share for their unpacking."""
    graph.constant("places", np.arange(8, dtype=np.uint8))
    graph.constant("one", np.uint8(1))
    graph.constant("last", np.array([-1]))
    graph.constant("zero", np.array([0]))


def _weights(graph: _Graph, name: str, value: Any, axes: tuple[int, ...]) -> str:
    """Weights with their axes in another order, unpacked in the graph where they are packed.

    The bits lie as in the file of the network, lowest first, but in ONNX's order and without gaps.
    """
    if not isinstance(value, stam_jax.Packed):
        return graph.constant(name, np.transpose(np.asarray(value), axes))
    scales = np.asarray(value.scales, np.float32)
    has_groups = any(count not in (1, n) for count, n in zip(scales.shape, value.shape, strict=True))
    if not isinstance(value.quantizer, stam_jax.Binary) or has_groups:
        raise SettingsError(
            f"--to onnx: {name} is packed by {value.quantizer!r}; only binary weights with a scale per "
            "channel or layer, or none, can be unpacked in ONNX."
        )
    flags = np.unpackbits(np.asarray(value.codes), axis=-1, count=value.shape[-1], bitorder="little")
    flags = np.transpose(flags.reshape(value.shape), axes)
    codes = graph.constant(f"{name}/codes", np.packbits(flags, bitorder="little"))
    positive = graph.constant(f"{name}/scales", np.transpose(scales, axes))
    size = graph.constant(f"{name}/size", np.array([flags.size]))
    shape = graph.constant(f"{name}/shape", np.array(flags.shape))
    x = graph.add("Unsqueeze", codes, "last", name=f"{name}/column")
    x = graph.add("BitShift", x, "places", name=f"{name}/shifted", direction="RIGHT")
    x = graph.add("BitwiseAnd", x, "one", name=f"{name}/bits")
    x = graph.add("Reshape", x, "last", name=f"{name}/row")
    x = graph.add("Slice", x, "zero", size, name=f"{name}/counted")
    x = graph.add("Reshape", x, shape, name=f"{name}/shaped")
    x = graph.add("Cast", x, name=f"{name}/flags", to=TensorProto.BOOL)
    negative = graph.add("Neg", positive, name=f"{name}/negative")
    return graph.add("Where", x, positive, negative, name=name)


def _standardised(graph: _Graph, module: models.Network) -> str:
    """The images in float, standardised, with the channels in front."""
    x = graph.add("Cast", "images", name="float", to=TensorProto.FLOAT)
    x = graph.add("Sub", x, graph.constant("mean_pixel", np.array(module.mean, np.float32)), name="centred")
    deviation = graph.constant("deviation", np.array(module.deviation, np.float32))
    x = graph.add("Div", x, deviation, name="standardised")
    return graph.add("Transpose", x, name="channels_first", perm=[0, 3, 1, 2])


def _head(graph: _Graph, layer: Any, x: str) -> str:
    """The logits, by the features' mean."""
    x = graph.add("ReduceMean", x, graph.constant("sides", np.array([2, 3])), name="features", keepdims=0)
    kernel = _weights(graph, "head/kernel", layer.kernel.get_value(), (0, 1))
    return graph.add("Gemm", x, kernel, graph.constant("head/bias", layer.bias.get_value()), name="logits")


def _conv_norm(graph: _Graph, layer: Any, x: str, name: str) -> str:
    """A convolution and batch normalisation."""
    conv, norm = layer.conv, layer.norm
    kernel = _weights(graph, f"{name}/conv/kernel", conv.kernel.get_value(), _TO_OIHW)
    x = graph.add(
        "Conv",
        x,
        kernel,
        name=f"{name}/conv",
        kernel_shape=list(conv.kernel_size),
        pads=[conv.padding] * 4,
        strides=[conv.strides] * 2,
    )
    parts = {"scale": norm.scale, "bias": norm.bias, "mean": norm.mean, "var": norm.var}
    values = [graph.constant(f"{name}/norm/{part}", each.get_value()) for part, each in parts.items()]
    return graph.add("BatchNormalization", x, *values, name=f"{name}/norm", epsilon=norm.epsilon)


def _zero_padding(graph: _Graph, layer: models.ZeroPadding, x: str, name: str) -> str:
    """Every few pixels, and zeros for the channels that are new."""
    window = {"starts": [0, 0], "ends": [_TO_THE_END] * 2, "axes": [2, 3], "steps": [layer.stride] * 2}
    bounds = [graph.constant(f"{name}/{part}", np.array(values)) for part, values in window.items()]
    x = graph.add("Slice", x, *bounds, name=f"{name}/pixels")
    pads = graph.constant(f"{name}/pads", np.array([0, 0, 0, 0, 0, layer.new, 0, 0]))
    return graph.add("Pad", x, pads, name=name)


def _vgg(graph: _Graph, module: models.VGG, x: str, sides: tuple[int, ...]) -> str:
    """The features of a plain network for images of that height and width."""
    for i, stage in enumerate(module.stages):
        for j, layer in enumerate(stage):
            name = f"stages/{i}/{j}"
            x = graph.add("Relu", _conv_norm(graph, layer, x, name), name=name)
        if min(sides) > 1:
            x = graph.add("MaxPool", x, name=f"stages/{i}", kernel_shape=[2, 2], strides=[2, 2])
            sides = tuple(side // 2 for side in sides)
    return x


def _resnet(graph: _Graph, module: models.ResNet, x: str) -> str:
    """The features of a residual network."""
    x = graph.add("Relu", _conv_norm(graph, module.stem, x, "stem"), name="stem")
    for i, block in enumerate(module.blocks):
        name = f"blocks/{i}"
        match block.shortcut:
            case None:
                carried = x
            case models.ZeroPadding():
                carried = _zero_padding(graph, block.shortcut, x, f"{name}/shortcut")
            case _:
                carried = _conv_norm(graph, block.shortcut, x, f"{name}/shortcut")
        x = graph.add("Relu", _conv_norm(graph, block.first, x, f"{name}/first"), name=f"{name}/first")
        x = _conv_norm(graph, block.second, x, f"{name}/second")
        x = graph.add("Relu", graph.add("Add", x, carried, name=f"{name}/sum"), name=name)
    return x
