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
    return [
        tuple(one.ints)
        for node in onnx.load(path).graph.node
        if node.op_type == "Conv"
        for one in node.attribute
        if one.name == "kernel_shape"
    ]
