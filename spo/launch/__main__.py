"""Starts a training script on all GPUs of the machine, after checking its command line.

python -m spo.launch train_sd15.py [--num_processes N] [--config=FILE] [--config.key=value ...]

Stays until the end, passes signals on, and ends with the status of spo.launch.exit_status.
"""

import argparse
import os
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from ml_collections import ConfigDict

    from spo.command_line.flags import exit_on_user_error, parse_flags
    from spo.errors import UserError
    from spo.launch.batch_plan import plan_batches
    from spo.launch.supervise import run_to_end
    from spo.plugins import find
except ModuleNotFoundError as error:  # a machine where nothing is installed yet
    print(
        f"error: {sys.executable} has no {error.name}: run `bash scripts/setup_env.sh` first, or, "
        "without a GPU, `bash launch_tiny.sh`, which trains a tiny model on the CPU",
        file=sys.stderr,
    )
    sys.exit(2)

PORT = 29500  # of the first machine, as everywhere in torch
ACCELERATE_CONFIGS = Path(__file__).resolve().parents[2] / "config" / "accelerate"


@dataclass(frozen=True)
class Script:
    """What the launcher needs to know of a training script."""

    config: ConfigDict
    # For so many processes; describe() is one line. None where there is nothing to plan.
    plan: Callable[[ConfigDict, int], Any] | None
    preflight: Callable[[ConfigDict, int], Any]  # raises UserError where a run would


@dataclass(frozen=True)
class Launcher:
    """What starts the processes."""

    processes: int  # on all machines
    here: int  # on this one
    arguments: list[str]  # of Python, before the script


def main() -> None:
    """Checks, prints and runs the command that trains; bad input is one line and status 2."""
    options, script_args = parse_options()
    with exit_on_user_error():
        script = read_script(options.script, script_args)
        launcher = cpu_launcher(options) if options.cpu else gpu_launcher(options)
        if script.plan is not None:
            plan = script.plan(script.config, launcher.processes)
            print(plan.describe())
        if launcher.processes > 1:
            # Sooner than in the processes; and what is downloaded here, they find in the cache.
            script.preflight(script.config, launcher.processes)
        if script.plan is plan_batches and script.config.estimate_costs:
            import torch  # slow

            from spo.costs.startup import print_estimate

            device = torch.device("cpu" if options.cpu else "cuda")
            print_estimate(script.config, plan, device, launcher.here)
    command = [sys.executable, *launcher.arguments, options.script, *script_args]
    print("$", shlex.join(command), flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // launcher.here)))
    sys.exit(run_to_end(command, options.script))


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and the arguments that go to the script."""
    parser = argparse.ArgumentParser(
        prog="python -m spo.launch",
        description="Starts a training script on all GPUs of this machine.",
        epilog="All other arguments go to the script: --config=FILE, --config.train.beta=5, ...",
        allow_abbrev=False,
    )
    parser.add_argument("script", help="training script, e.g. train_sd15.py")
    parser.add_argument("--num_processes", type=int, help="GPUs to use over all machines")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, in one process or more")
    parser.add_argument("--num_machines", type=int, help="machines that train (default: 1)")
    parser.add_argument("--accelerate_config", help="accelerate YAML file to use instead of ours")
    parser.add_argument("--machine_rank", type=int, help="several machines: number of this one")
    parser.add_argument("--main_process_ip", help="several machines: address of the first")
    parser.add_argument("--main_process_port", type=int, help="several machines: port of the first")
    options, script_args = parser.parse_known_args()
    for name in ("num_processes", "num_machines"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    return options, script_args


def read_script(script: str, script_args: list[str]) -> Script:
    """Reads the script's CONFIG, by its own flags and defaults, and its PLAN and PREFLIGHT."""
    if not Path(script).is_file():
        raise UserError(f"no such script: {script}")
    found = runpy.run_path(script)
    parse_flags([script, *script_args])

    def preflight(config: ConfigDict, num_processes: int) -> None:
        name = found.get("PREFLIGHT", "spo.method.preflight:preflight")
        find(name, {}, "PREFLIGHT")(config, num_processes)  # imports torch

    return Script(found["CONFIG"].value, found.get("PLAN", plan_batches), preflight)


def cpu_launcher(options: argparse.Namespace) -> Launcher:
    """Python itself for one process, torchrun for more: `accelerate launch --cpu` would need MPI.

    Raises UserError where several machines lack an address or cannot share the processes.
    """
    os.environ["ACCELERATE_USE_CPU"] = "true"
    machines = options.num_machines or 1
    processes = options.num_processes or machines
    here = share_of_machine(processes, machines)
    if processes == 1:
        return Launcher(1, 1, [])
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={here}"]
    if machines == 1:
        return Launcher(processes, here, [*torchrun, "--standalone"])
    for name in ("machine_rank", "main_process_ip"):
        if getattr(options, name) is None:
            raise UserError(f"--num_machines={machines}: --{name} is missing")
    torchrun += [f"--nnodes={machines}", f"--node_rank={options.machine_rank}"]
    torchrun += [f"--master_addr={options.main_process_ip}"]
    torchrun += [f"--master_port={options.main_process_port or PORT}"]
    return Launcher(processes, here, torchrun)


def gpu_launcher(options: argparse.Namespace) -> Launcher:
    """accelerate, with one of our config files or the one that was given.

    Raises UserError where GPUs, the accelerate file or the first machine's address are missing, and
    where the file asks for more than data parallel training.
    """
    import torch  # slow, and not needed to find a mistake on the command line
    from accelerate.commands.config import load_config_from_file

    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise UserError(
            "no GPU found; without one, `bash launch_tiny.sh` trains a tiny model, and --cpu runs this"
        )

    ours = "one_gpu.yaml" if (options.num_processes or num_gpus) == 1 else "four_gpus.yaml"
    file = Path(options.accelerate_config or ACCELERATE_CONFIGS / ours)
    if not file.is_file():
        raise UserError(f"--accelerate_config: no such file: {file}")
    settings = load_config_from_file(str(file))
    check_distributed_type(file, settings.distributed_type.value)
    machines = options.num_machines or settings.num_machines
    default = settings.num_processes if options.accelerate_config else num_gpus * machines
    processes = options.num_processes or default
    here = share_of_machine(processes, machines)
    if here > num_gpus:
        raise UserError(
            f"{processes} processes on {machines} machine(s) of {num_gpus} GPU(s): a process needs "
            "a GPU; see --num_processes"
        )
    if machines > 1 and not (options.main_process_ip or settings.main_process_ip):
        raise UserError(f"{machines} machines: --main_process_ip is missing")

    launcher = ["-m", "accelerate.commands.launch", "--quiet", f"--config_file={file}"]
    launcher.append(f"--num_processes={processes}")
    if machines > 1 and not settings.main_process_port and options.main_process_port is None:
        launcher.append(f"--main_process_port={PORT}")
    for name in ("num_machines", "machine_rank", "main_process_ip", "main_process_port"):
        if getattr(options, name) is not None:
            launcher.append(f"--{name}={getattr(options, name)}")
    return Launcher(processes, here, launcher)


def check_distributed_type(file: Path, distributed_type: str) -> None:
    """Raises UserError for what splits the model over the processes."""
    if distributed_type not in ("NO", "MULTI_GPU"):
        raise UserError(
            f"{file}: distributed_type {distributed_type} is not supported: every process holds the "
            "whole model here; use MULTI_GPU, see docs/distributed.md"
        )


def share_of_machine(processes: int, machines: int) -> int:
    """Processes of one machine; raises UserError unless all machines have as many."""
    if processes % machines:
        raise UserError(
            f"--num_processes={processes} counts those of all machines: a multiple of {machines}"
        )
    return processes // machines


def num_cores() -> int:
    """Cores that this process may use, where the system tells; else those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    main()
