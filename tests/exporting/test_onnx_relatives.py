"""MPNet in ONNX Runtime: its bias by position meets heads that are gone. (Its relatives export what BERT does.)"""

import pytest
import torch

import prunekern as pk
from prunekern.exporting.onnx import export_onnx
from tests.helpers.tiny_models import HIDDEN, attached, batch, build, difference, keep_only, logits, names, prune

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
TOLERANCE = 1e-4


def test_onnx_equals_compact(tmp_path):
    model = build("mpnet", "token")
    pruner = attached(model)
    prune(pruner, 0.3)
    kept = {name: (mask.logits.detach() > 0).numpy() for name, mask in pruner.masks.items()}
    first, second = names("mpnet", 0), names("mpnet", 1)
    kept[first["v"]][: HIDDEN // 2] = False  # two heads are gone, another has no query/key channel
    kept[first["q"]][-HIDDEN // 4 :] = False
    kept[second["v"]][:] = False
    small = pk.compact(keep_only(pruner, kept).model)
    path = tmp_path / "m.onnx"
    export_onnx(small, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
    for size, length in ((1, 1), (4, 9), (2, 23)):
        inputs = batch(size, length, padded=length > 2)
        (got,) = session.run(None, {name: t.numpy() for name, t in inputs.items()})
        seen = inputs["attention_mask"].bool()
        assert difference(torch.from_numpy(got)[seen], logits(small, inputs)[seen]) <= TOLERANCE
