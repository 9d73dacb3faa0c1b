"""Converts a LoRA between formats, or merges it into its base model.

    python scripts/convert_lora.py runs/NAME --to kohya --output my_lora.safetensors
    python scripts/convert_lora.py user/repo/folder --to peft --output my_adapter --dtype fp16
    python scripts/convert_lora.py runs/NAME --merge --output my_model \\
        --base stable-diffusion-v1-5/stable-diffusion-v1-5

The format of the source is recognised. To convert to:
    diffusers   a file for pipe.load_lora_weights, as training writes it
    kohya       a file for ComfyUI, A1111, InvokeAI and sd-scripts; a LoRA of SDXL gets the block names
                that sd-scripts has for SDXL (input_blocks_4_1_...), others diffusers'. Where neither
                names, shapes nor header tell which it is, --base does
    peft        a folder for peft.PeftModel.from_pretrained(unet, folder)
Weights, ranks and alphas stay as they are, bit for bit, unless --dtype rounds the weights.
"""

import argparse
from pathlib import Path

from spo.command_line.flags import exit_on_user_error
from spo.command_line.values import expand, path
from spo.errors import UserError

FORMATS = ("diffusers", "kohya", "peft")
DTYPES = ("fp16", "bf16", "fp32")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="file, run, checkpoint, peft folder, or user/repo[/path]")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--to", choices=FORMATS, help="convert")
    task.add_argument("--merge", action="store_true", help="write base model + LoRA, for diffusers")
    parser.add_argument(
        "--base", type=expand, help="base model, folder or Hub id; with --to: noted in the file"
    )
    parser.add_argument("--output", type=path, required=True, help=".safetensors file, or folder")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: unchanged)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args()


def check_output(path: Path, mark: str | None, overwrite: bool) -> None:
    """Raises UserError unless `path` may be written, as a folder or as a .safetensors file.

    `mark` is a file that every folder of this kind has, and only folders with it are overwritten;
    None stands for a .safetensors file.
    """
    if (path.suffix == ".safetensors") != (mark is None):
        wanted = "end in .safetensors" if mark is None else "be a folder"
        raise UserError(f"--output: {path} must {wanted}.")
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"--output: {path} exists; choose another, or add --overwrite.")
    if path.is_dir() if mark is None else not (path / mark).is_file():
        raise UserError(f"--output: {path} holds something else, and is not overwritten.")


def main() -> None:
    options = parse_args()
    with exit_on_user_error():
        write(options)
    print(f"wrote {options.output}")


def write(options: argparse.Namespace) -> None:
    """Checks everything, reads, then writes."""
    if options.merge and not options.base:
        raise UserError("--base: name the model to merge the LoRA into.")
    marks = {"merge": "model_index.json", "peft": "adapter_config.json"}  # the others are files
    check_output(options.output, marks.get(options.to or "merge"), options.overwrite)

    from spo.lora_io.convert import convert_lora  # takes seconds, unlike the checks above

    convert_lora(options.source, options.to, options.base, options.dtype, options.output)


if __name__ == "__main__":
    main()
