"""Files that another runtime executes: ONNX, checked against the PyTorch module."""
