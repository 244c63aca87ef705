"""What onnxruntime cannot execute or read is reported with the operator and what to type."""

import re
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from raykd.deploy.onnx import session as onnx_session
from raykd.errors import InfraError, StoreError
from raykd.recipe.quant import ONNXRUNTIME

FLOAT = TensorProto.FLOAT


def file_of(
    folder, operator: str, domain: str = "com.microsoft", opset: int = 21, **attributes: int
):
    """A file of one operator over 32 inputs and the codes and scales of 64 outputs."""
    held = [numpy_helper.from_array(np.zeros((64, 1, 12), np.uint8), "codes")]
    held += [numpy_helper.from_array(np.ones((64, 1), np.float32), "scales")]
    node = helper.make_node(
        operator, ["inputs", "codes", "scales"], ["logits"], domain=domain, **attributes
    )
    inputs = helper.make_tensor_value_info("inputs", FLOAT, [None, 32])
    graph = helper.make_graph(
        [node], "g", [inputs], [helper.make_tensor_value_info("logits", FLOAT, None)], held
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "student.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("operator", "asked"),
    [
        ("MatMulOfTheFuture", {}),
        ("MatMulOfTheFuture", {"domain": ""}),
        ("MatMulNBits", {"K": 32, "N": 64, "bits": 3, "block_size": 32}),
        ("MatMulNBits", {"K": 32, "N": 64, "bits": 4, "block_size": 32, "of_the_future": 1}),
        ("GatherBlockQuantized", {"block_size": 8, "bits": 8}),
    ],
)
def test_an_operator_that_the_runtime_lacks_is_named_with_the_version_that_has_all(
    operator, asked, tmp_path
):
    """No such operator, and known ones with settings that it has not: as of versions to come."""
    path = file_of(tmp_path, operator, **asked)
    said = (
        f"onnxruntime {onnxruntime.__version__} does not execute {operator} as it stands in {path}"
    )
    with pytest.raises(InfraError, match=re.escape(said)) as caught:
        onnx_session.session(path)
    assert f"pip install 'onnxruntime>={ONNXRUNTIME}'" in str(caught.value)


def test_a_later_format_is_refused_with_the_version_that_raykd_writes_for(tmp_path):
    path = file_of(tmp_path, "MatMulNBits", opset=999, K=32, N=64, bits=4, block_size=32)
    with pytest.raises(InfraError, match=rf"refuses {re.escape(str(path))}: .*; pip install"):
        onnx_session.session(path)


@pytest.mark.parametrize("data", [None, b"", b"no ONNX file at all", bytes(64)])
def test_what_is_no_onnx_file_is_said_to_be_none(data, tmp_path):
    path = tmp_path / "student.onnx"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"student.onnx cannot be read as an ONNX file: .*; export it again"
    ):
        onnx_session.session(path)


def test_products_of_large_codes_do_not_overflow():
    """Two products of 255 and 127 exceed 16 bits, in which x86 without VNNI adds them up."""
    codes = np.full((64, 16), 127, np.int8)
    value = [
        helper.make_tensor_value_info("inputs", TensorProto.UINT8, [None, 64]),
        helper.make_tensor_value_info("logits", TensorProto.INT32, None),
    ]
    node = helper.make_node("MatMulInteger", ["inputs", "codes"], ["logits"])
    graph = helper.make_graph(
        [node], "g", value[:1], value[1:], [numpy_helper.from_array(codes, "codes")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnx_session.session(model.SerializeToString())
    inputs = np.full((3, 64), 255, np.uint8)
    np.testing.assert_array_equal(
        session.run(None, {"inputs": inputs})[0], inputs.astype(np.int32) @ codes
    )


def test_the_version_that_is_named_is_the_one_that_is_installed_with_raykd():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    assert f"onnxruntime>={ONNXRUNTIME},<2" in declared
