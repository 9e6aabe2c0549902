"""Processes: how a command starts them, and how an error of the user ends them in one line."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.engine import launch as spawn
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from fpn_plugin.errors import UserError

__all__ = ["explained_files", "launch", "quiet_third_parties", "run_tool"]

_USER_ERROR_STATUS = 2
_INTERRUPTED_STATUS = 130  # what a shell reports for SIGINT
# What gloo and torch's store report if another process has ended.
_PEER_LOST = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused", re.I)
_RANK_0_FIRST = 2.0  # seconds
_LAUNCHER_FIRST = 10.0  # seconds in which a launcher ends the processes that are left


def run_tool(main: Callable[[], Any]) -> None:
    """Runs a command's main function; a :class:`UserError` becomes one line and exit status 2.

    Other errors are defects and keep their traceback.
    """
    quiet_third_parties()
    try:
        with explained_files():
            main()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _leave(0)
    except UserError as error:
        # Before torchrun's processes are joined, all of them come here, and one reports the error.
        if os.environ.get("RANK", "0") != "0":
            _leave(_USER_ERROR_STATUS)
        _exit_with(error)
    except ProcessExitedException as error:
        if error.exit_code >= 0:  # the process has reported its error
            sys.exit(error.exit_code)
        why = " (out of memory?)" if -error.exit_code == signal.SIGKILL else ""
        reason = f"process {error.error_index} was ended by {error.signal_name}{why}"
        print(f"error: {reason}; the others were stopped", file=sys.stderr, flush=True)
        sys.exit(128 - error.exit_code)  # as a shell reports signals
    except KeyboardInterrupt:
        message = "interrupted; run the same command to continue (fpn-plugin train: with --resume)"
        print(f"\n{message}", file=sys.stderr)
        sys.exit(_INTERRUPTED_STATUS)


@contextmanager
def explained_files() -> Iterator[None]:
    """Within it, an error that names a file or folder is a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error


def launch(worker: Callable[..., Any], args: Any, device: str, worker_args: tuple) -> None:
    """Runs ``worker(*worker_args)`` in every process that the command line asks for.

    torchrun has started the processes already. Otherwise Detectron2's launcher starts
    ``args.num_gpus`` on this machine. On the CPU they communicate by gloo. If one ends with an
    error or by a signal, either launcher ends the others.

    Args:
        worker: can be pickled, as its arguments.
        args: of Detectron2's argument parser.
        device: the config's MODEL.DEVICE.
        worker_args: arguments of the worker.

    Raises:
        UserError: no machine has that rank, or its address is missing.
    """
    on_cpu = not device.startswith("cuda")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun(on_cpu)
        try:
            _guarded(worker, *worker_args)
        finally:
            dist.destroy_process_group()
        return
    if args.machine_rank >= args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} of --num-machines {args.num_machines}: ranks are "
            f"0 to {args.num_machines - 1}"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(
            "--dist-url auto is for one machine: with --num-machines "
            f"{args.num_machines} give tcp://HOST:PORT of the first"
        )
    processes = args.num_gpus * args.num_machines
    if on_cpu and processes > 1:
        _check_version(f"MODEL.DEVICE {device} with {processes} processes", "train in one process")
        # Detectron2's launcher uses NCCL if it sees a GPU, whatever the model's device.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.num_gpus > 1:
        # A started process imports Detectron2 before its filters are set; see fpn_plugin/__init__.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:`torch.jit:FutureWarning")
    spawn(
        _guarded,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(worker, *worker_args),
    )


def _join_torchrun(on_cpu: bool) -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    if not on_cpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} asks for more GPUs "
                f"than the {torch.cuda.device_count()} found here"
            )
        torch.cuda.set_device(local_rank)
    _check_version("torchrun", "train in one process" if on_cpu else "start with --num-gpus")
    dist.init_process_group(backend="gloo" if on_cpu else "nccl")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def _check_version(what: str, instead: str) -> None:
    """Refuses what release 0.6 cannot do, whose launcher starts processes on GPUs only."""
    if not hasattr(comm, "create_local_process_group"):
        raise UserError(f"{what} needs Detectron2 0.7 or later; {instead} instead")


def _guarded(worker: Callable[..., Any], *worker_args: Any) -> None:
    """Runs a worker, in this process or a started one; a user's error becomes one line.

    If the process is the only one, its caller gets the error.
    """
    quiet_third_parties()
    try:
        with explained_files():
            worker(*worker_args)
        if _is_spawned():
            _leave(0)
    except UserError as error:
        if comm.get_world_size() == 1:
            raise
        if comm.get_rank() > 0:
            time.sleep(_RANK_0_FIRST)  # it reports what all find, and the launcher ends the others
        _exit_with(error)
    except RuntimeError as error:
        if comm.get_world_size() == 1 or not _PEER_LOST.search(str(error)):
            raise
        # Launchers report the process that ends first, which should be the one that failed. They
        # end this one meanwhile, unless the lost process is another machine's.
        time.sleep(_LAUNCHER_FIRST)
        reason = f"process {comm.get_rank()} lost another process, which reports why: {error}"
        _exit_with(UserError(" ".join(reason.split())))


def _exit_with(error: UserError) -> NoReturn:
    # A data loader's worker passes its error on as the text of a traceback.
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1].partition(f"{UserError.__name__}: ")[2] or text
    # The line and its end in one call: other processes may write to the same place.
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()
    _leave(_USER_ERROR_STATUS)


def _leave(status: int) -> NoReturn:
    """Ends the process. If it is one of several, the interpreter does not clean up.

    In that clean-up, gloo's threads sometimes abort a process that has done its work, and the
    launcher reports the signal as the failure.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or _is_spawned():
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        for worker in multiprocessing.active_children():
            worker.terminate()
        os._exit(status)
    sys.exit(status)


def _is_spawned() -> bool:
    """Whether Detectron2's launcher has started this process."""
    return comm.get_world_size() > 1 and multiprocessing.parent_process() is not None


def _is_no_user_error(record: logging.LogRecord) -> bool:
    """False for Detectron2's traceback of an error that another line reports."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, UserError | FloatingPointError)


def _is_not_about_version(record: logging.LogRecord) -> bool:
    """False for Detectron2's warning that a config has no VERSION, which no config needs."""
    return "compatible with latest" not in record.getMessage()


def quiet_third_parties() -> None:
    """Hides what other libraries log for their own developers."""
    for category, module, message in (
        (FutureWarning, r"torch\.jit.*", r"`torch\.jit\.script.*"),
        (DeprecationWarning, r"torch\.jit.*", r"`torch\.jit\.script.*"),
        (UserWarning, r"pkg_resources.*", ""),
        (UserWarning, r"torch\.utils\.data.*", r".*pin_memory.*"),
        (UserWarning, r"detectron2\.data\..*", r"The given NumPy array is not writable.*"),
        (UserWarning, r"torch\.functional", r"torch\.meshgrid.*"),
        (FutureWarning, r"detectron2\..*", ""),
        (DeprecationWarning, r"detectron2\..*", ""),
        (FutureWarning, r"fvcore\..*", ""),
    ):
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
    logging.getLogger("detectron2.config.compat").addFilter(_is_not_about_version)
