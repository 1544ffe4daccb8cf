"""``quantize_checkpoint``: a checkpoint becomes NVFP4 in ModelOpt's layout, file by file, and a killed run goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from dsv4_compile.checkpoint import durable, modelopt
from dsv4_compile.checkpoint.conversion import SHARES, Plan, Unit, plan_conversion
from dsv4_compile.checkpoint.convert import WeightRecord, checksum, convert
from dsv4_compile.checkpoint.formats import recognise
from dsv4_compile.checkpoint.index import INDEX_SUFFIX, Checkpoint, CheckpointError, open_checkpoint
from dsv4_compile.checkpoint.packing import SEARCHES, Workers
from dsv4_compile.checkpoint.quantization_report import QuantizationReport
from dsv4_compile.quantization import DEFAULT_EXCLUDE

REPORT = "quantization_report.json"
WORK = ".dsv4-quantize"  # in the destination, while it is unfinished: the job, its lock, a record of each finished file
SHARD_BYTES = 1 << 30

_CONFIGS = ("config.json", "hf_quant_config.json", f"model{INDEX_SUFFIX}", REPORT)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_SPARE_BYTES = 16 << 20  # of disk for configs and reports


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    search: str = "none",
    share: str = "experts",
    shard_bytes: int = SHARD_BYTES,
    console: Console | None = None,
) -> QuantizationReport:
    """Writes a checkpoint's weights as NVFP4 in ModelOpt's layout, under HuggingFace's names.

    What is packed is what :func:`quantize_` would pack, and, without a search, to the same codes and scales. Plain and
    FP8 weights are quantised; MXFP4 experts are taken over code by code, exactly, unless their exponents span too much;
    NVFP4 weights are taken over. What is left alone stays as it is, FP8 and MXFP4 as bf16. MTP weights are copied in
    their own form. No static activation scale is written: this package never uses one.

    Memory: two output files, one of which is being written, and one weight while it is converted. Each file is written
    beside its place, synced and renamed. A run that was killed goes on with its next file when it is started again with
    the same arguments, and its result is byte for byte that of an undisturbed one. At the end every tensor is read back
    and its checksum compared.

    Args:
        source: a ``.safetensors`` file, an ``index.json``, or a folder with either; bf16, FP8 or DeepSeek's own.
        destination: folder to write, absent, empty, or left by the same job.
        include: name patterns to pack, or one, held against the name in the result, the stored name and, for an expert,
            the model's stacked parameter; None for every eligible weight.
        exclude: name patterns to leave alone, or one; by default those of :func:`quantize_`.
        search: ``none`` takes the block scale nearest to the block's maximum over 6; ``six_four`` tries the maximum
            over 4 too, ``wide`` eight neighbours, and both take the smallest squared error.
        share: ``experts`` gives gate and up of a routed expert one global scale, as the model's stacked parameter and
            nvidia's checkpoints have it: vLLM reads that of gate for both (its issue 54150). ``merged`` does so for all
            linears that engines merge into one GEMM (gate and up, q_a and kv, q, k and v); ``none`` for none.
        shard_bytes: size at which an output file ends.
        console: shows progress; None shows nothing.

    Returns:
        A :class:`QuantizationReport`; ``quantization_report.json`` holds the same.

    Raises:
        CheckpointError: the source is damaged, holds nothing to quantise or NaN; the destination is in use by another
            job; what was written does not read back.
        ValueError: an argument outside its range, or a destination that is not this job's.
        OSError: not enough disk space.
    """
    source, destination = Path(source), Path(destination)
    include = None if include is None else _patterns(include)
    exclude = _patterns(exclude) if exclude is not None else () if include is not None else DEFAULT_EXCLUDE
    _check_arguments(source, destination, search, share, shard_bytes)
    with open_checkpoint(source) as checkpoint:
        plan = _plan(checkpoint, include, exclude, share, shard_bytes)
        options = {
            "include": include,
            "exclude": exclude,
            "search": search,
            "share": share,
            "shard_bytes": shard_bytes,
        }
        job = _describe_job(checkpoint, options)
        done = _finished(destination, job)
        if done is None:
            with _claim(destination, job, plan):
                report = _run(checkpoint, plan, destination, search, console)
                _finish(checkpoint, plan, destination, report, job)
            return report
    return done


def _patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _check_arguments(source: Path, destination: Path, search: str, share: str, shard_bytes: int) -> None:
    for name, value, allowed in (("search", search, SEARCHES), ("share", share, SHARES)):
        if value not in allowed:
            raise ValueError(f"quantize: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if shard_bytes < 1:
        raise ValueError(f"quantize: shard_bytes must be positive, got {shard_bytes}")
    if not source.exists():
        raise ValueError(f"quantize: source must exist, got {source}")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"quantize: destination must be a folder, got the file {destination}")
    folder = source if source.is_dir() else source.parent
    if destination.resolve() == folder.resolve():
        raise ValueError(f"quantize: destination must differ from the source, got {destination} for both")


def _plan(
    checkpoint: Checkpoint, include: Sequence[str] | None, exclude: Sequence[str], share: str, shard_bytes: int
) -> Plan:
    contents = recognise(checkpoint)
    problems = checkpoint.problems + contents.problems
    if not problems:
        plan = plan_conversion(contents, include, exclude, share, shard_bytes)
        problems = plan.problems
    if problems:
        raise CheckpointError(f"quantize: {checkpoint.path}", problems)
    return plan


def _describe_job(checkpoint: Checkpoint, options: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on: the options, the source's files, and the versions that write the bytes."""
    from dsv4_compile import __version__

    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files}
    job = {"dsv4_compile": __version__, "torch": torch.__version__, **options, "files": files}
    return dict(json.loads(json.dumps(job)))


def _fingerprint(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _finished(destination: Path, job: dict[str, Any]) -> QuantizationReport | None:
    """The report of a destination that this very job has finished; None for one to write.

    Raises:
        ValueError: the destination holds something else.
    """
    work, report = destination / WORK, destination / REPORT
    if (work / "job.json").is_file():
        found = json.loads((work / "job.json").read_text(encoding="utf-8"))
        if found != job:
            different = [key for key in sorted({*found, *job}) if found.get(key) != job.get(key)]
            raise ValueError(
                f"quantize: destination must be absent, empty or left by the same job, got {destination}, whose job "
                f"differs in {', '.join(f'{key} ({found.get(key)!r})' if key != 'files' else key for key in different)}"
            )
    elif destination.is_dir() and any(path.name != WORK for path in destination.iterdir()):
        stored = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        if stored.get("job") != _fingerprint(job):
            raise ValueError(
                f"quantize: destination must be absent, empty or left by the same job, got {destination}, which holds "
                f"{'the result of another job' if stored else 'other files'}"
            )
    if not report.is_file():
        return None
    shutil.rmtree(work, ignore_errors=True)
    return QuantizationReport.from_json(json.loads(report.read_text(encoding="utf-8")))


@contextmanager
def _claim(destination: Path, job: dict[str, Any], plan: Plan) -> Iterator[None]:
    """Makes the destination this process's own, for as long as it runs."""
    work = destination / WORK
    existing = next(path for path in (destination, *destination.resolve().parents) if path.exists())
    written = sum((destination / file).stat().st_size for file in plan.files if (destination / file).is_file())
    needed = sum(unit.bytes_written for unit in plan.units) - written + _SPARE_BYTES
    if (free := shutil.disk_usage(existing).free) < needed:
        raise OSError(
            f"quantize: destination must have {needed / 2**30:.2f} GiB of disk space, got {free / 2**30:.2f} GiB free"
        )
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"quantize: destination must be free, got {destination}, which a process writes") from None
        for part in work.glob("*.part"):
            part.unlink()
        if not (work / "job.json").exists():
            durable.write_json(work / "job.json", job, work)
        yield


def _run(
    checkpoint: Checkpoint, plan: Plan, destination: Path, search: str, console: Console | None
) -> QuantizationReport:
    """Writes what is not written yet, then reads everything back."""
    work = destination / WORK
    shards = dict(zip(plan.files, plan.shards, strict=True))
    records: dict[str, dict[str, Any]] = {}
    for file in plan.files:
        if (work / f"{file}.json").is_file() and (destination / file).is_file():
            records[file] = json.loads((work / f"{file}.json").read_text(encoding="utf-8"))
    resumed = len(records)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=console is None, transient=True)
    with progress, Workers() as workers:
        done = sum(_bytes_read(shards[file]) for file in records)
        task = progress.add_task("quantising", total=_bytes_read(plan.units), completed=done)
        with ThreadPoolExecutor(1) as writer:  # a file is written while the next one is made
            writing: list[tuple[str, Future[dict[str, Any]]]] = []
            for file in plan.files:
                if file in records:
                    continue
                tensors, weights = _make_shard(checkpoint, shards[file], search, workers, progress, task)
                records |= {name: future.result() for name, future in writing}
                writing = [(file, writer.submit(_write_shard, destination / file, tensors, weights))]
                del tensors
            records |= {name: future.result() for name, future in writing}
        task = progress.add_task("verifying", total=sum(unit.bytes_written for unit in plan.units))

        def verify(file: str) -> list[str]:
            found = _verify(destination / file, shards[file], records[file]["checksums"])
            if found:
                (work / f"{file}.json").unlink()  # a new run writes it again
            progress.advance(task, sum(unit.bytes_written for unit in shards[file]))
            return found

        problems = [problem for found in workers.map(verify, plan.files) for problem in found]
    if problems:
        raise CheckpointError(f"quantize: {destination}", problems)
    return QuantizationReport(
        weights=[WeightRecord.from_json(weight) for file in plan.files for weight in records[file]["weights"]],
        search=search,
        bytes_before=checkpoint.num_bytes,
        bytes_after=sum(unit.bytes_written for unit in plan.units),
        dropped_activation_scales=len(plan.dropped),
        mtp=len(plan.mtp),
        resumed=resumed,
    )


def _bytes_read(units: Iterable[Unit]) -> int:
    return sum(unit.bytes_read for unit in units)


def _make_shard(
    checkpoint: Checkpoint, units: Sequence[Unit], search: str, workers: Workers, progress: Progress, task: Any
) -> tuple[dict[str, Tensor], list[WeightRecord]]:
    tensors: dict[str, Tensor] = {}
    weights: list[WeightRecord] = []
    for unit, following in zip(units, [*units[1:], None], strict=True):
        for piece in following.pieces if following is not None else ():
            for entry in piece.entries():
                checkpoint.read_ahead(entry)
        parts, records = convert(checkpoint, unit, search, workers)
        tensors |= parts
        weights.extend(records)
        progress.advance(task, unit.bytes_read)
    return tensors, weights


def _write_shard(file: Path, tensors: dict[str, Tensor], weights: Sequence[WeightRecord]) -> dict[str, Any]:
    """Writes a file and then its record, whose being there says that the file is whole."""
    record = {
        "weights": [weight.as_json() for weight in weights],
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    work = file.parent / WORK
    durable.write_tensors(file, tensors, work)
    durable.write_json(work / f"{file.name}.json", record, work)
    return record


def _verify(file: Path, units: Sequence[Unit], checksums: dict[str, str]) -> list[str]:
    """Reads a file back; returns what is not as planned and as it was in memory."""
    problems: list[str] = []
    with open_checkpoint(file) as written:
        problems.extend(written.problems)
        for unit, name, dtype, shape in ((u, n, d, s) for u in units for n, (d, s) in u.tensors().items()):
            entry = written.entries.get(name)
            if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
                found = "nothing" if entry is None else f"{entry.dtype} {entry.shape}"
                problems.append(f"{file.name}: {name} must be {dtype} {shape}, got {found}")
                continue
            tensor = written.read(name)
            if checksum(tensor) != checksums.get(name):
                problems.append(f"{file.name}: {name} must have the checksum it had in memory")
            elif unit.is_packed and dtype in ("F8_E4M3", "F32") and not _are_scales(tensor):
                problems.append(f"{file.name}: {name} must hold finite scales that are not negative")
    if set(written.entries) - set(checksums):
        problems.append(f"{file.name}: must hold planned tensors only")
    return problems


def _are_scales(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float8_e4m3fn:
        return bool((tensor.view(torch.uint8) < 0x7F).all())  # 0x7F is NaN, what is above negative
    return bool((tensor.isfinite() & (tensor > 0)).all())


def _finish(
    checkpoint: Checkpoint, plan: Plan, destination: Path, report: QuantizationReport, job: dict[str, Any]
) -> None:
    """Writes configs and the other files, the report as the last one, and removes the traces of the run."""
    from dsv4_compile import __version__

    work = destination / WORK
    shards = zip(plan.files, plan.shards, strict=True)
    weight_map = {name: file for file, units in shards for unit in units for name in unit.tensors()}
    index = {"metadata": {"total_size": report.bytes_after}, "weight_map": dict(sorted(weight_map.items()))}
    excluded = modelopt.excluded_modules(plan.units)
    durable.write_json(destination / f"model{INDEX_SUFFIX}", index, work)
    durable.write_json(destination / "hf_quant_config.json", modelopt.quantization_config(excluded, __version__), work)
    if checkpoint.config:
        config = modelopt.model_config(checkpoint.config, excluded, __version__)
        durable.write_json(destination / "config.json", config, work)
    if checkpoint.path.is_dir():
        for file in sorted(checkpoint.path.iterdir()):
            is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
            if file.is_file() and not is_weights and file.name not in _CONFIGS and not file.name.startswith("."):
                durable.copy_file(file, destination / file.name, work)
    durable.write_json(destination / REPORT, {"job": _fingerprint(job), **report.as_json()}, work)
    shutil.rmtree(work)
    durable.sync_folder(destination)
