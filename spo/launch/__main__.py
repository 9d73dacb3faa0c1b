"""Starts a script on all GPUs of the machine, after checking its command line.

python -m spo.launch train_sd15.py [--num_processes N] [--config=FILE] [--config.key=value ...]

Passes signals on and ends with the exit status of the run: 0 done, 1 failed, 2 bad input,
75 stopped by a signal with everything saved, 130 killed by a second Ctrl-C.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from ml_collections import ConfigDict

    from spo.command_line.config_files import BASE, EVAL_BASE, SPM_BASE
    from spo.command_line.flags import define_config, exit_on_user_error, parse_flags
    from spo.errors import UserError
    from spo.launch.batch_plan import UpdatePlan, plan_batches, plan_updates
    from spo.launch.processes import World, run
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
    """A script as the launcher sees it; the defaults are those of a training script."""

    config: str = ""  # default of --config
    base: str = BASE  # of its config files; see load_config
    plan: Callable[[ConfigDict, int], UpdatePlan] | None = plan_batches
    preflight: str = "spo.method.preflight:preflight"  # raises UserError if a run would


# By file name. Any other script is taken for a training script and needs --config=FILE.
SCRIPTS = {
    "train_sd15.py": Script("config/sd15.py"),
    "train_sdxl.py": Script("config/sdxl.py"),
    "train_preference_model.py": Script(
        "config/spm_sd15.py", SPM_BASE, plan_updates, "spo.preference.spm_recipe:check_training"
    ),
    "evaluate.py": Script(EVAL_BASE, EVAL_BASE, None, "spo.evaluation.evaluator:preflight"),
}


def main() -> None:
    """Checks the command line, prints the plan and runs the script; bad input is one line, status 2."""
    options, script_args = parse_options()
    with exit_on_user_error():
        script = SCRIPTS.get(Path(options.script).name, Script())
        config = read_config(options.script, script, script_args)
        world = cpu_world(options) if options.cpu else gpu_world(options)
        if script.plan is not None:
            plan = script.plan(config, world.processes)
            print(plan.describe())
        if world.processes > 1:
            # Sooner than in the processes, which find in the cache what is downloaded here.
            find(script.preflight, {}, "preflight")(config, world.processes)
        if script.plan is plan_batches and config.estimate_costs:
            import torch  # slow

            from spo.costs.count import print_estimate

            device = torch.device("cpu" if options.cpu else "cuda")
            print_estimate(config, plan, device, world.here)
        command = [sys.executable, options.script, *script_args]
        print("$", shlex.join(command), flush=True)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // world.here)))
        status = run(command, world)
    sys.exit(status)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Returns the launcher's own options, and the arguments that go to the script."""
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


def read_config(path: str, script: Script, script_args: list[str]) -> ConfigDict:
    """Returns the config that `script_args` make of the script's default."""
    if not Path(path).is_file():
        raise UserError(f"no such script: {path}")
    if not script.config and not any(a.partition("=")[0] == "--config" for a in script_args):
        raise UserError(f"--config=FILE is missing; a default is known for {', '.join(SCRIPTS)}")
    holder = define_config(script.config, base=script.base)
    parse_flags([path, *script_args])
    return holder.value


def cpu_world(options: argparse.Namespace) -> World:
    """Returns the processes that share the CPU; raises the errors of `make_world`."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return make_world(options, {}, per_machine=1)


def gpu_world(options: argparse.Namespace) -> World:
    """Returns one process for each GPU, or the processes of an accelerate file.

    Raises UserError if GPUs or the file are missing and if the file asks for more than data
    parallel training.
    """
    import torch  # slow, and not needed to find a mistake on the command line
    from accelerate.commands.config import load_config_from_file
    from accelerate.utils import check_cuda_p2p_ib_support

    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise UserError(
            "no GPU found; without one, `bash launch_tiny.sh` trains a tiny model, and --cpu runs this"
        )
    ours = "one_gpu.yaml" if (options.num_processes or num_gpus) == 1 else "four_gpus.yaml"
    file = Path(options.accelerate_config or ACCELERATE_CONFIGS / ours)
    if not file.is_file():
        raise UserError(f"--accelerate_config: no such file: {file}")
    settings = vars(load_config_from_file(str(file)))
    kind = settings["distributed_type"].value
    if kind not in ("NO", "MULTI_GPU"):
        raise UserError(
            f"{file}: distributed_type {kind} is not supported: every process holds the whole model "
            "here; use MULTI_GPU, see docs/distributed.md"
        )
    if not options.accelerate_config:
        del settings["num_processes"]  # our files fit any number of GPUs
    world = make_world(options, settings, per_machine=num_gpus)
    if world.here > num_gpus:
        raise UserError(
            f"{world.processes} processes on {world.machines} machine(s) of {num_gpus} GPU(s): a "
            "process needs a GPU; see --num_processes"
        )
    if settings["gpu_ids"] not in (None, "all"):
        os.environ["CUDA_VISIBLE_DEVICES"] = settings["gpu_ids"]
    if not check_cuda_p2p_ib_support():  # RTX 4000, which accelerate refuses without these
        os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")
    return world


def make_world(options: argparse.Namespace, settings: dict[str, Any], per_machine: int) -> World:
    """Returns the processes that `options` ask for, or else the `settings` of an accelerate file.

    There are `per_machine` on each machine if neither says how many. Raises UserError if machines
    lack an address or cannot share the processes equally.
    """
    given = settings | {key: value for key, value in vars(options).items() if value is not None}
    machines = given.get("num_machines", 1)
    processes = given.get("num_processes", per_machine * machines)
    if processes % machines:
        raise UserError(
            f"--num_processes={processes} counts those of all machines: a multiple of {machines}"
        )
    here, port = processes // machines, given.get("main_process_port")
    if machines == 1:
        return World(processes, here, port=port or 0)
    for name in ("machine_rank", "main_process_ip"):
        if given.get(name) is None:
            raise UserError(f"{machines} machines: --{name} is missing")
    place = given["machine_rank"], given["main_process_ip"], port or PORT
    return World(processes, here, machines, *place)


def num_cores() -> int:
    """Returns the cores that this process may use, if the system tells; else the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    main()
