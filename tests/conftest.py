"""What every test starts from: one thread, a fixed seed. What several start from: a folder."""

import pytest
import torch

# Files of a minute and more, the longest first: begun last, one of them would keep a core busy while the others idle.
LONGEST = (
    "kernels/test_interpreter.py", "structure/test_build.py", "ops/test_instruction_sets.py",
    "pruning/test_compact_files.py", "training/test_data_parallel.py", "training/test_trainer.py",
    "structure/test_examples.py", "demo/test_run.py", "cli/test_commands.py", "pruning/test_peft_out.py",
    "demo/test_models.py", "exporting/test_onnx.py", "ops/test_compact_linear_tracing.py",
    "habits/test_export_alone.py", "habits/test_hooks.py", "training/test_arguments.py", "cli/test_mistakes.py",
    "habits/test_process_wide.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, all else in its order."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))


@pytest.fixture(autouse=True)
def _one_thread_fixed_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tmp_path):
    """A folder with a compact DistilBERT, half of it gone."""
    # Not above: tests of kernels run where transformers is missing (bench/gpu/everything.py).
    import prunekern as pk
    from tests.helpers.compact_folders import small_model

    pk.save(small_model(), tmp_path / "m")
    return tmp_path / "m"
