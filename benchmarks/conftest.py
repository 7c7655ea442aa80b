"""The protocol of all op benchmarks: `make bench` on the CPU, `make bench-gpu` on a GPU.

    pytest benchmarks -k layer_norm      some of them
    --gpu                                on the first GPU; --fake-gpu NAME takes this path on the CPU
    --quick                              tiny sizes, to check that everything runs
    --results FILE                       the results file; by default benchmarks/results/<..>.json for a whole run

The results file is written after every case, so that Ctrl-C keeps what was measured; `fused-megatron report` reads it.

On the CPU: two threads, and malloc keeps its pages for every provider (glibc: the run restarts itself with the settings
in its environment). Times with malloc's default settings are measured afterwards, in a separate process, and shown
beside it.
"""

import contextlib
import dataclasses
import gc
import inspect
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_megatron as fm
from fused_megatron.benchmarking.call_overhead import measure_call_overhead
from fused_megatron.benchmarking.comparison_table import one_line, overhead_table
from fused_megatron.benchmarking.peers import PEERS
from fused_megatron.benchmarking.recorded_durations import RecordedDurations
from fused_megatron.benchmarking.report.describe_run import describe_run
from fused_megatron.benchmarking.report.plots import plot_results
from fused_megatron.benchmarking.report.results_file import Results, write_results
from fused_megatron.benchmarking.report.tables import results_lines
from fused_megatron.benchmarking.side_by_side import BOUND, OURS, Bars, Case, Comparison, Rounds, compare, side_by_side
from fused_megatron.benchmarking.timing_devices import CpuDevice, TimingDevice, copy_step, find_gpus, measure_ceilings
from fused_megatron.checks import InputError
from fused_megatron.kept_pages import KEPT_PAGES_ENVIRONMENT, release_free_pages, uses_glibc
from fused_megatron.observe.processor import processor_name

_THREADS = 2
_BOUND_BAR_16_BIT = 2.0
_MALLOC = "FUSED_MEGATRON_BENCH_MALLOC"  # kept or default: the setting of this process
_RESULTS = "FUSED_MEGATRON_BENCH_RESULTS"  # the file for the figures of the process with default settings

# Approximate time of a case on two cores, as a multiple of the time of other cases.
_WEIGHTS = {"linear_cross_entropy": 6.0, "overhead": 0.05, "cross_entropy[many": 3.0, "softmax": 2.0}

_session: dict[str, Any] = {}
_durations = RecordedDurations()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-megatron")
    group.addoption("--gpu", action="store_true", help="on the first GPU, against other libraries too")
    group.addoption("--fake-gpu", action="append", default=[], metavar="NAME", help="take the path of a GPU on the CPU")
    group.addoption("--results", type=Path, metavar="FILE", help="where the results go; see fused-megatron report")
    group.addoption("--quick", action="store_true", help="tiny sizes, two rounds, no code generation")


def pytest_configure(config: pytest.Config) -> None:
    on_gpu = config.option.gpu or bool(config.option.fake_gpu)
    if on_gpu:
        gpus = find_gpus(config.option.fake_gpu)
        if not gpus:
            raise pytest.UsageError(f"no GPU: torch {torch.__version__} sees none (--fake-gpu NAME tries it without)")
        device = gpus[0]
    else:
        _start_again_with_kept_pages(config)
        device = CpuDevice(processor_name() or platform.machine())
        torch.set_num_threads(1 if config.option.quick else _THREADS)
    _session.update(device=device, comparisons={}, overheads={}, quick=config.option.quick, root=config.rootpath)
    _session["plugins"] = config.pluginmanager
    _session["results"], _session["results_path"] = _results_of(config, device)
    _check_writable(_session["results_path"])
    config.option.benchmark_quiet = True  # our tables have the figures
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")  # from torch.compile itself
    config.addinivalue_line("filterwarnings", "ignore:.*KeyboardInterrupt:pytest.PytestUnraisableExceptionWarning")
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> None:
    """Remember Ctrl-C: Python drops the exception if it comes within a finalizer."""
    _session["interrupted"] = True
    raise KeyboardInterrupt


def _results_of(config: pytest.Config, device: TimingDevice) -> tuple[Results, Path | None]:
    """Return this run's results and their file; a run of some cases has a file only with --results."""
    kept = "keeps its pages for all" if os.environ.get(_MALLOC) == "kept" else "as the system has it"
    results = describe_run("ops", device, malloc=kept)
    path: Path | None = config.option.results
    part = config.option.quick or config.option.keyword or any(".py" in Path(word).name for word in config.args)
    if path is None and not part and _RESULTS not in os.environ:
        path = config.rootpath / "benchmarks" / "results" / results.file_name
    return results, path


def _check_writable(path: Path | None) -> None:
    """Check now, and not after ten minutes of measurements, that the file can be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(1 << 16))
    except OSError as error:
        raise pytest.UsageError(f"results={path}: {error.strerror} (--results FILE puts them elsewhere)") from None


def _save_results(complete: bool = False) -> None:
    path, results = _session["results_path"], _session["results"]
    results.comparisons, results.complete = list(_session["comparisons"].values()), complete
    if path is None or not results.comparisons:
        return
    try:
        write_results(results, path)
    except OSError as error:  # the tables at the end still have everything
        _session["results_path"] = None
        _report(f"results={path}: {error.strerror}; what comes now is not kept in a file")


def _start_again_with_kept_pages(config: pytest.Config) -> None:
    """Restart this process with malloc's settings, since malloc reads its environment only at the start."""
    if _MALLOC in os.environ or not uses_glibc() or list(config.invocation_params.args) != sys.argv[1:]:
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()  # else the new process would print into hidden files of this one
    environment = {**os.environ, **KEPT_PAGES_ENVIRONMENT, _MALLOC: "kept", "OMP_NUM_THREADS": str(_THREADS)}
    os.execve(sys.executable, sys.orig_argv, environment)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_durations.clock))


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Print no dots between our lines."""
    return (report.outcome, "", "PASSED") if report.passed and report.when == "call" else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Measure the limits of the machine before the first case."""
    if session.items and not session.config.option.collectonly:
        _measure_ceilings()
    _session.update(begun=time.monotonic(), total=sum(map(_weight, session.items)), done=0.0)


def _measure_ceilings() -> None:
    """Measure the limits and keep the best times: other load makes the machine slower, never faster."""
    ceilings = _session["results"].ceilings
    if _RESULTS not in os.environ:
        for name, value in measure_ceilings(_session["device"], quick=_session["quick"]).items():
            ceilings[name] = max(value, ceilings.get(name, 0.0))


def _weight(item: pytest.Item) -> float:
    """Return the relative time of a case."""
    return next((weight for part, weight in _WEIGHTS.items() if part in item.nodeid), 1.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Print the name of the case and about how long the rest will take."""
    if _RESULTS not in os.environ:
        done, spent = _session["done"], time.monotonic() - _session["begun"]
        left_s = (_session["total"] - done) * spent / done if done >= 2 else 0.0
        about = f", about {left_s / 60:.0f} min left" if left_s >= 60 else ""
        number, count = item.session.items.index(item) + 1, len(item.session.items)
        _report(f"[{number}/{count}{about}] {item.name.removeprefix('test_')}")
    result = yield
    _session["done"] += _weight(item)
    if _session.get("interrupted"):
        raise KeyboardInterrupt
    return result


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Bench:
    """The fixture of a benchmark file: shapes, inputs, and the call that measures and records."""

    def __init__(self, request: pytest.FixtureRequest, benchmark: Any) -> None:
        self._request = request
        self._benchmark = benchmark
        self.quick = bool(request.config.option.quick)
        self.device: TimingDevice = _session["device"]

    def shape(self, *, cpu: tuple[int, ...], gpu: tuple[int, ...], quick: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes for this device."""
        return quick if self.quick else gpu if self.device.is_gpu else cpu

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, *, grad: bool = True) -> torch.Tensor:
        """Return a tensor with values of the normal distribution."""
        return torch.randn(shape, device=self.device.device).to(dtype).requires_grad_(grad)

    def op(self, name: str, *, needs: str | None = None) -> Callable[..., Any]:
        """Return fm.ops.<name>; skip if there is none, or if it does not take the argument `needs`."""
        op = getattr(fm.ops, name, None)
        if op is None or (needs is not None and needs not in inspect.signature(op).parameters):
            pytest.skip(f"fm.ops has no {name}" + (f" with {needs}" if op else ""))
        return op

    def __call__(self, case: Case) -> Comparison:
        """Measure a case, print one line, and keep the result for the tables and for pytest-benchmark."""
        default = os.environ.get(_MALLOC) == "default"
        rounds, bars = Rounds(), case.bars
        if self.quick or self.device.is_gpu:
            bars = Bars()  # bars are promised only for the sizes on the CPU
        elif bars.bound is not None and self._request.getfixturevalue("dtype") != torch.float32:
            bars = dataclasses.replace(bars, bound=_BOUND_BAR_16_BIT)
        peers = PEERS.get(case.op, {}) if self.device.is_gpu else {}
        if case.compute_bound:
            rounds = Rounds(warm_up=False)  # seconds a step
        case = dataclasses.replace(case, bars=bars, peers=peers)
        if self.quick or default:
            rounds = Rounds(budget_s=0 if self.quick else 1, fewest=2, most=5)
        result = compare(
            case,
            self.device,
            rounds=rounds,
            check=not default,
            compile_backend="eager" if self.quick else "inductor",
            release=release_free_pages,
        )
        self._record(result)
        if OURS in result.faults:
            pytest.fail(f"{result.name}: {result.faults[OURS]}", pytrace=False)
        return result

    def in_place(self, result: Comparison, steps: Mapping[str, Callable[[], object]]) -> Comparison:
        """Measure functions that write over their tensors, whose results the caller has checked, beside the bound.

        Args:
            result: names, bytes and bars of the case, without figures.
            steps: by provider; each works on tensors of its own.
        """
        small = self.quick or os.environ.get(_MALLOC) == "default"
        if self.quick or self.device.is_gpu:
            result.bars = Bars()
        rounds = Rounds(budget_s=0 if self.quick else 1, fewest=2, most=5) if small else Rounds()
        bound = {} if result.num_bytes is None else {BOUND: copy_step(result.num_bytes, self.device.device)}
        result.seconds = side_by_side({**steps, **bound}, self.device, rounds)
        self._record(result)
        return result

    def _record(self, result: Comparison) -> None:
        _session["comparisons"][self._request.node.nodeid] = result
        _report(one_line(result, verdicts=not self.quick))
        _save_results()
        if result.seconds.get(OURS):
            self._store(result)

    def overhead(self, name: str, call: Callable[[], object], bar_us: float) -> None:
        """Measure the Python overhead of a call on the CPU, where the library's op can be called directly."""
        if self.device.is_gpu:
            pytest.skip("measured on the CPU")
        if os.environ.get(_MALLOC) == "default":
            return
        result = measure_call_overhead(call, rounds=2 if self.quick else 30)
        _session["overheads"][name] = (result, bar_us)
        _report(f"{name}: {result.overhead_us:.1f} us of Python a call (bar {bar_us:g})")
        self._benchmark.group = "call overhead"
        self._benchmark.extra_info.update(library_us=result.library_us, overhead_us=result.overhead_us, bar_us=bar_us)
        self._replay([us / 1e6 for us in result.call_us])

    def _replay(self, seconds: list[float]) -> None:
        _durations.load(seconds)
        self._benchmark.pedantic(_durations.advance, rounds=len(seconds))

    def _store(self, result: Comparison) -> None:
        self._benchmark.group = f"{result.op} {result.dtype}"
        info = self._benchmark.extra_info
        info.update(label=result.label, num_bytes=result.num_bytes, gb_per_s=result.gb_per_s())
        info.update(seconds=result.seconds, faults=result.faults, notes=result.notes, peak_bytes=result.peak_bytes)
        info.update(model_flops=result.model_flops, forward_seconds=result.forward_seconds)
        info["traffic"] = {name: dataclasses.asdict(traffic) for name, traffic in result.traffic.items()}
        info["bars"] = [{"bar": bar, "figure": figure, "verdict": said} for bar, figure, said in result.verdicts()]
        info["default_malloc_ms"] = result.default_malloc_ms  # filled at the end of the session
        self._replay(result.seconds[OURS])


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Bench]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield Bench(request, benchmark)
    torch._dynamo.reset()
    gc.collect()
    release_free_pages()  # free the memory of this case: the next cannot use it


def _report(line: str) -> None:
    reporter, capture = (_session["plugins"].getplugin(name) for name in ("terminalreporter", "capturemanager"))
    if reporter is not None:
        with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
            reporter.ensure_newline()
            reporter.write_line(line)
            reporter.flush()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-benchmark, also a wrapper, writes its file
def pytest_sessionfinish(exitstatus: int) -> Iterator[None]:
    comparisons: dict[str, Comparison] = _session["comparisons"]
    if path := os.environ.get(_RESULTS):
        medians = {node: {p: c.ms(p).median for p in c.seconds} for node, c in comparisons.items()}  # type: ignore
        Path(path).write_text(json.dumps(medians))
    elif exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # and not interrupted
        try:
            if comparisons and os.environ.get(_MALLOC) == "kept":
                _measure_with_default_malloc(comparisons)
            if comparisons:
                _measure_ceilings()
            _save_results(complete=True)
        except KeyboardInterrupt:
            _report("interrupted: what was measured is kept")
    yield


def _measure_with_default_malloc(comparisons: dict[str, Comparison]) -> None:
    """Run the same tests in a process with malloc's default settings, and add its medians to ours."""
    _report("\nthe same in float32 with malloc's default settings ...")
    environment = {k: v for k, v in os.environ.items() if k not in KEPT_PAGES_ENVIRONMENT}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "medians.json"
        environment |= {_MALLOC: "default", _RESULTS: str(results)}
        # Only float32, and no matrix products, which take long and allocate little in that time.
        tests = [node for node, c in comparisons.items() if c.dtype == "float32" and BOUND in c.seconds]
        if _session["quick"]:
            tests = ["--quick", *tests[:1]]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, env=environment, cwd=_session["root"], capture_output=True, text=True)
        if not results.exists():
            _report(f"  failed: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")
            return
        for node, medians in json.loads(results.read_text()).items():
            if node in comparisons:
                comparisons[node].default_malloc_ms.update(medians)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    results, path = _session["results"], _session["results_path"]
    if not (results.comparisons or _session["overheads"]) or _RESULTS in os.environ:
        return
    lines = [""]
    if results.comparisons:
        lines += results_lines(results, brief=path is not None, verdicts=not _session["quick"])
    if _session["overheads"]:
        lines += ["", *overhead_table(_session["overheads"], verdicts=not _session["quick"])]
    if path is not None and results.comparisons:
        shown = os.path.relpath(path)
        lines += ["", f"fused-megatron report {shown}   shows milliseconds, memory and limits too"]
        try:
            lines += [f"  {os.path.relpath(one)}" for one in plot_results(results, path.parent / "plots")]
        except InputError as error:
            lines.append(str(error))
    for line in lines:
        terminalreporter.write_line(line)
