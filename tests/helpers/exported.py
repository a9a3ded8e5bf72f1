"""What exported files hold and compute."""

import onnx

from lightning_compress import onnx_session


def run(path, inputs):
    """All outputs of a file for a tuple of tensors, on one thread."""
    session = onnx_session(path, threads=1)
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


def taps(path):
    """Rows and columns of each convolution's kernel, in order."""
    graph = onnx.load(path).graph
    made = {name: node for node in graph.node for name in node.output}
    stored = {one.name: tuple(one.dims) for one in graph.initializer}
    return [_kernel(node, made, stored) for node in graph.node if node.op_type == "Conv"]


def _kernel(node, made, stored):
    """What its attribute says, which older exporters leave out, or the shape of its weight."""
    for one in node.attribute:
        if one.name == "kernel_shape":
            return tuple(one.ints)
    weight = node.input[1]
    while weight not in stored:
        assert made[weight].op_type == "DequantizeLinear"
        weight = made[weight].input[0]
    return stored[weight][2:]
