"""Stepwise preference optimisation of diffusion models: GradSPO, SPO and LPO on SD1.5 and SDXL.

    prompts -> rollout (K candidates per step) -> scores -> pairs -> three predictions -> loss -> LoRA
    -> EMA -> checkpoint -> Hub

To understand or change the method read types.py, then method/ in the order of its docstring.

    types.py          the values that the stages hand on, with shapes
    method/           the paper: sampler, rollout, pairs, losses, learner, and the loop around them
    models/           the frozen base model, the LoRA on its UNet, optimizers
    scorers/          candidates or finished images -> numbers
    data/             files and datasets -> prompts

    command_line/     config file and flags -> a typed, locked config -> values
    launch/           processes: on how many GPUs, of which sizes, and how they end
    run/              the directory of a long job: metrics, checkpoints, pictures, resuming
    guard/            is a run healthy, and which epoch to ship: judges, pixels, verdict
    publish/          a run -> a repo on the Hugging Face Hub
    lora_io/          LoRA files of diffusers, kohya and peft
    evaluation/       models -> images -> scores -> who wins -> report
    preference/       the training of the preference models
    costs/            seconds, FLOPs and memory of a run, measured or counted
    gpu_check/        what a machine with a GPU is asked in one command
    tiny_world/       a base model, a preference model and pairs small enough for a CPU

    errors.py  seeding.py  plugins.py ("module:name")  hub.py  atomic.py (whole files or none)
"""

__version__ = "0.1.0"
