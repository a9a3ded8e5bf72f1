"""What a target version may read, against ONNX Runtime's own table of compatibility."""

import pytest

from lightning_compress.conversion.versions import runtime_target

PUBLISHED = {  # version: opset, IR version; docs/reference/compatibility.md of ONNX Runtime
    "1.11": (16, 8),
    "1.12": (17, 8),
    "1.13": (17, 8),
    "1.14": (18, 8),
    "1.15": (19, 8),
    "1.16": (19, 9),
    "1.17": (20, 9),
    "1.18": (21, 10),
    "1.19": (21, 10),
    "1.20": (21, 10),
}


@pytest.mark.parametrize("version", PUBLISHED)
def test_no_file_asks_for_more_than_the_version_reads(version):
    opset, ir = PUBLISHED[version]
    assert runtime_target(version, opset, int8=True).ir == ir
    for int8 in (False, True):
        assert runtime_target(version, None, int8=int8).opset <= opset
    with pytest.raises(ValueError, match=f"up to opset {opset}"):
        runtime_target(version, opset + 1, int8=True)


@pytest.mark.parametrize("opset", ["18", 18.0, True])
def test_an_opset_is_an_integer(opset):
    with pytest.raises(ValueError, match=r"opset=.*an integer"):
        runtime_target(None, opset, int8=False)
