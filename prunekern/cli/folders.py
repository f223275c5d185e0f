"""prunekern compact, store and export: from one folder of a model to another"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import reading
from .options import app, console


@app.command()
def compact(
    base: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    adapter: Annotated[Path, typer.Argument(help="Folder written by train (OUT/adapter) or save_adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder for the compact model.")],
) -> None:
    """Merge a trained adapter into its base model and remove what its masks prune, one linear in memory at a time."""
    from ..demo.models import MODEL_NAMES, demo_model
    from ..pruning.compact_files import compact_files
    from ..storage.tokenizer import copy_tokenizer, load_tokenizer
    from ..training.recipe import refuse_missing

    refuse_missing(base)
    for given in (Path(base), adapter):
        if out.exists() and given.exists() and out.samefile(given):
            raise ValueError(f"{out}: is read from; expected another folder to write to")
    source = Path(demo_model(base) if base in MODEL_NAMES else base)
    if source.is_dir() and not list(source.glob("*.bin")):
        with reading(f"{base} with {adapter}"):
            plan = compact_files(source, adapter, out, console=console)
        copy_tokenizer(source, out)
    else:  # a hub name, or .bin weights: through memory
        from ..compacting.checkpoint import save
        from ..compacting.compact import compact as make_compact
        from ..pruning.adapter import load_adapter, load_base

        with reading(f"{base} with {adapter}"):
            dense = load_base(base, adapter)
            plan = load_adapter(dense, adapter).plan()
        save(make_compact(dense), out)
        if source.is_dir():
            copy_tokenizer(source, out)
        else:
            load_tokenizer(base).save_pretrained(out)
    console.print(f"{out}: {plan.params():,} of {plan.dense_params():,} block parameters kept")


@app.command()
def store(
    model: Annotated[Path, typer.Argument(help="Folder of a compact model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to; MODEL itself is replaced.")],
    weights: Annotated[str, typer.Option(help="What the files hold block weights in: fp32, bf16, int8 or int4.")],
) -> None:
    """Write a compact model's folder in fewer bits; layers that train --quantize chose are stored in more of them."""
    from ..compacting.checkpoint import check_kinds, load, save
    from ..storage.tokenizer import copy_tokenizer

    check_kinds(weights, "auto", "store")
    with reading(model):
        small = load(model)
    before = _bytes(model)
    save(small, out, weights=weights)
    if not out.samefile(model):
        copy_tokenizer(model, out)
    console.print(f"{out}: {_bytes(out) / 2**20:.1f} MiB of weights in {weights}, {before / 2**20:.1f} MiB before")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="Folder of a compact model.")],
    out: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 23.")] = 18,
    with_past: Annotated[bool, typer.Option("--with-past", help="Decoders: caches as inputs and outputs.")] = False,
) -> None:
    """Write a compact model as an ONNX file of plain operators, in fp32."""
    from ..compacting.checkpoint import load
    from ..exporting.onnx import export_onnx

    if not out.absolute().parent.is_dir():  # known before the model is traced
        raise FileNotFoundError(f"{out.parent}: no such folder")
    if out.exists() and not out.is_file():  # a device would be replaced by the file
        raise ValueError(f"{out}: is {'a folder' if out.is_dir() else 'no ordinary file'}; expected a file to write to")
    with reading(model):
        small = load(model)
    try:
        export_onnx(small, out, opset, with_past)
    except ImportError as error:  # onnx is an extra
        raise ValueError(error) from None
    console.print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, opset {opset}")
