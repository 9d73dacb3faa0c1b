"""Starts a script on all GPUs of the machine, after checking its command line.

python -m spo.launch train_sd15.py [--num_processes N] [--config=FILE] [--config.key=value ...]

Passes signals on and ends with the exit status of the run: 0 done, 1 failed, 2 bad input,
75 stopped by a signal with everything saved, 130 killed by a second Ctrl-C.
"""

import argparse
import contextlib
import os
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
from ml_collections import ConfigDict

from spo.command_line.config_files import BASE, EVAL_BASE, SPM_BASE
from spo.command_line.flags import NUMBERS, define_config, exit_on_user_error, parse_flags
from spo.errors import UserError
from spo.launch.batch_plan import UpdatePlan, plan_batches, plan_updates
from spo.launch.processes import World, run_processes
from spo.plugins import find

PORT = 29500  # of the first machine, as everywhere in torch


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
        "config/spm_sd15.py", SPM_BASE, plan_updates, "spo.preference.pair_recipe:check_training"
    ),
    "evaluate.py": Script(EVAL_BASE, EVAL_BASE, None, "spo.evaluation.evaluator:plan_evaluation"),
}


def main() -> None:
    """Checks the command line, prints the plan and runs the script; bad input is one line, status 2."""
    for name in NUMBERS:  # a cluster's; the processes that this starts get their own
        os.environ.pop(name, None)
    with exit_on_user_error():
        options, script_args = parse_options(sys.argv[1:])
        script = SCRIPTS.get(Path(options.script).name, Script())
        config = load_script_config(options.script, script, script_args)
        world = plan_world(options)
        if script.plan is not None:
            plan = script.plan(config, world.processes)
            print(plan.describe(), flush=True)
        if world.processes > 1:
            print("checking config, models and data; what is missing is downloaded", flush=True)
            # Downloads may take longer than processes wait for each other: they find them in the cache.
            find(script.preflight, {}, "preflight")(config, world.processes)
        if script.plan is plan_batches and config.estimate_costs:
            from spo.costs.forecast import print_estimate  # slow
            from spo.method.build import read_recipe

            print_estimate(read_recipe(config), plan, "cpu" if options.cpu else "cuda", world.here)
        command = [sys.executable, options.script, *script_args]
        print("$", shlex.join(command), flush=True)
        sys.exit(run_processes(command, world))


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the launcher's own options, and the arguments that go to the script.

    An accelerate file gives the defaults of the options. Raises UserError if it is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m spo.launch",
        description="Starts a training script on all GPUs of this machine.",
        epilog="All other arguments go to the script: --config=FILE, --config.train.beta=5, ...",
        allow_abbrev=False,
    )
    parser.add_argument("script", help="training script, e.g. train_sd15.py")
    parser.add_argument("--num_processes", type=int, help="GPUs to use over all machines")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, in one process or more")
    parser.add_argument("--num_machines", type=int, default=1, help="machines that train")
    parser.add_argument("--accelerate_config", help="accelerate YAML file with such options")
    parser.add_argument("--machine_rank", type=int, help="several machines: number of this one")
    parser.add_argument("--main_process_ip", help="several machines: address of the first")
    parser.add_argument("--main_process_port", type=int, help="several machines: port of the first")
    file = parser.parse_known_args(argv)[0].accelerate_config
    if file:
        parser.set_defaults(**read_accelerate_file(file))
    return parser.parse_known_args(argv)


def read_accelerate_file(file: str) -> dict[str, Any]:
    """Returns the settings of an accelerate file, and sets the environment as accelerate would."""
    from accelerate.commands.config import load_config_from_file  # slow

    if not Path(file).is_file():
        raise UserError(f"--accelerate_config: no such file: {file}")
    settings = vars(load_config_from_file(file))
    # Workers refuses FSDP, DEEPSPEED and MEGATRON_LM.
    os.environ[f"ACCELERATE_USE_{settings['distributed_type'].value}"] = "true"
    if settings["gpu_ids"] not in (None, "all"):
        os.environ["CUDA_VISIBLE_DEVICES"] = settings["gpu_ids"]
    return settings


def load_script_config(path: str, script: Script, script_args: list[str]) -> ConfigDict:
    """Returns the config that `script_args` make of the script's default."""
    if not Path(path).is_file():
        raise UserError(f"no such script: {path}")
    if not script.config and not any(a.partition("=")[0] == "--config" for a in script_args):
        raise UserError(f"--config=FILE is missing; a default is known for {', '.join(SCRIPTS)}")
    holder = define_config(script.config, base=script.base)
    parse_flags([path, *script_args])
    return holder.value


def plan_world(options: argparse.Namespace) -> World:
    """Returns the processes that `options` ask for, by default one for each GPU or one on the CPU.

    Raises UserError if GPUs are missing or torch cannot use them, if machines lack an address and
    if they cannot share the processes equally.
    """
    if sys.stdout.isatty():
        print("loading torch", flush=True)
    import torch  # slow, and not needed to find a mistake on the command line

    from spo.models.gpu import check_driver

    machines = options.num_machines
    per_machine = 1 if options.cpu else torch.cuda.device_count()
    if not per_machine:
        raise UserError(
            f"no GPU found by torch {torch.__version__}, and this needs one; `bash launch_tiny.sh` "
            "trains a tiny model without"
        )
    if not options.cpu:
        check_driver()
    processes = per_machine * machines if options.num_processes is None else options.num_processes
    if min(processes, machines) < 1 or processes % machines:
        raise UserError(
            f"--num_processes={processes} counts the processes of all machines: a multiple of "
            f"--num_machines={machines}"
        )
    here, port = processes // machines, options.main_process_port
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // here)))
    if options.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif here > per_machine:
        raise UserError(
            f"{processes} processes on {machines} machine(s) of {per_machine} GPU(s): a process "
            "needs a GPU; see --num_processes"
        )
    if machines == 1:
        return World(processes, here, port=port or 0)
    for name in ("machine_rank", "main_process_ip"):
        if getattr(options, name) is None:
            raise UserError(f"{machines} machines: --{name} is missing")
    place = options.machine_rank, options.main_process_ip, port or PORT
    choose_interface(options.main_process_ip, port or PORT)
    return World(processes, here, machines, *place)


def choose_interface(address: str, port: int) -> None:
    """Lets gloo listen on the network interface towards the first machine, unless the user chose one.

    By itself gloo takes the address of the host's name, often one that no other machine can reach.
    Raises UserError if the first machine's name stands for such an address.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    with contextlib.suppress(OSError):  # torch tells better that a machine cannot be reached
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        if ip_address(place[0]).is_loopback:
            if address in ("localhost", place[0]):  # all machines are this one
                return
            raise UserError(
                f"--main_process_ip={address} means {place[0]} here, which no other machine can reach: "
                "give this machine's address in the network"
            )
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if own in {each.address for each in addresses}:
                os.environ["GLOO_SOCKET_IFNAME"] = name


if __name__ == "__main__":
    main()
