"""The `.lcz` artifact: an entropy-coded, checksummed file that holds a module's tensors."""
