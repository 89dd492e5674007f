"""What counts as a skipped test: without ../shared some tests cannot run, with it only GPU tests may skip."""

from __future__ import annotations

import functools
import gc
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
_skips: list[str] = []
_source, _known_source = inspect.getsource, functools.cache(inspect.getsource)
# Every parse looks up the help texts in the source of dpo/config.py, which never changes. Of classes and modules alone:
# functions kept here would keep what they close over.
inspect.getsource = lambda found: (_known_source if inspect.isclass(found) or inspect.ismodule(found) else _source)(
    found
)


HEAVY = [
    "test_quickstart.py", "test_real_data.py", "slurm/test_slurm.py", "invariants/test_resume.py",
    "invariants/test_scheduling.py", "invariants/test_objectives.py", "invariants/test_dead_rank.py",
    "parity/test_trl.py", "test_benchmarks.py", "invariants/test_variants.py", "test_readme.py",
    "pretended/test_gpu.py", "runtime/test_heartbeat.py", "invariants/test_elastic.py", "test_bad_input.py",
    "test_notebook.py", "model/test_attention.py", "model/test_half_precision.py", "test_mutations.py",
    "test_disk_full.py", "test_frontier.py", "test_adapters.py", "test_plan.py", "parity/test_trl_objectives.py",
    "test_docs_commands.py", "test_eight_bit.py",
]  # fmt: skip
"""First, so that no worker is left with a long file when the other has nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(HEAVY)}
    folder = Path(__file__).parent
    items.sort(key=lambda item: place.get(item.path.relative_to(folder).as_posix(), len(HEAVY)))


def pytest_collectstart() -> None:
    """Garbage is not looked for while test modules are imported, which makes little of it."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """All but the tests marked gpu are of a CPU: without -m gpu none sees a GPU, nor does a process that it starts."""
    if config.getoption("markexpr").strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in report.keywords:
        _skips.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skips.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skips and SHARED.is_dir() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skips and SHARED.is_dir():
        terminalreporter.section("skipped although ../shared is present", red=True, bold=True)
        for nodeid in _skips:
            terminalreporter.line(f"{nodeid}: only tests marked gpu may skip", red=True)


@pytest.fixture(autouse=True)
def _linear_stays() -> Iterator[None]:
    """ZeRO-3 replaces torch's linear function, which does not compile, for the rest of the process."""
    import torch

    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(autouse=True)
def _no_drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and report take longer than a few steps: runs in tests marked `draws`, and of whole modules, have them."""
    if request.node.get_closest_marker("draws") is None:
        from tests.invariants.jobs import without_drawings

        without_drawings(monkeypatch.setattr)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and tokenizers beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, the real data beside the checkout")
    return SHARED / "data"


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with a byte-level tokenizer."""
    from tests import tiny
    from tests.data.tiny_tokenizers import tokenizer_of

    folder, tokenizer = tmp_path_factory.mktemp("tiny_policy"), tokenizer_of("byte")
    tokenizer.save_pretrained(folder)
    return tiny.saved(folder, "llama", vocab_size=len(tokenizer))
