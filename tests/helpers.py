"""What several test files need to build their cases."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from spo.method.collect import CollectSettings
from spo.method.ddim import DDIM
from spo.method.pairs import PairSettings
from spo.method.rollout import RolloutSettings
from spo.models.backbone import Backbone
from spo.models.loading import ModelSource
from spo.models.lora import Lora, add_lora
from spo.scorers import ScorerSource, candidate_scorer
from spo.types import Conditioning, PreferencePairs

GOLDEN = Path(__file__).parent / "data" / "golden"
MODELS = GOLDEN / "models"
PROMPTS = ("a fox reading a map", "tiny house in a meadow", "blue whale above the clouds")
# Of a scorer of images, at the smallest sizes that show an order.
COLLECT = CollectSettings(
    rollout=RolloutSettings(
        looks_at="images",
        num_steps=4,
        num_candidates=4,
        branch_from=2,
        num_inner_steps=0,
        stop_at=0,
        final_step="branch",
        final_score_timestep="zero",
    ),
    pairs=PairSettings(
        pairing="best_worst",
        threshold=-1,
        threshold_schedule=None,
        threshold_min=None,
        threshold_max=None,
        keep_all_final=False,
        final_direction="window",
        final_step="branch",
        num_inner_steps=0,
        shares_latents=True,
        keep_predictions=True,
    ),
    guidance_scale=2.0,
    decode_batch_size=3,
    score_batch_size=4,
    score_timestep="t",
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def model_folder(family: str) -> str:
    return str(MODELS / f"tiny-{family}")


def load_backbone(family: str, mixed_precision: str = "no") -> Backbone:
    source = ModelSource(model_folder(family))
    return Backbone(source, family, mixed_precision, torch.device("cpu"))


def save_tiny_decoder(folder: Path, **changes) -> str:
    """The folder of an AutoencoderTiny with random weights that fits the tiny models' latents."""
    torch.manual_seed(0)
    settings = {
        "latent_channels": 4,
        "encoder_block_out_channels": (4, 4),
        "num_encoder_blocks": (1, 1),
        "decoder_block_out_channels": (8, 8),
        "num_decoder_blocks": (1, 1),
    }
    AutoencoderTiny(**(settings | changes)).save_pretrained(folder)
    return str(folder)


def tiny_sd21(folder: Path) -> Path:
    """Writes the tiny SD1.5 with another text encoder, as wide as SD2.1's, and a UNet that reads it."""
    shutil.copytree(model_folder("sd15"), folder)
    torch.manual_seed(0)
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    text.update({"hidden_size": 1024, "num_hidden_layers": 1, "projection_dim": 1024})
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    unet = UNet2DConditionModel.load_config(folder / "unet")
    unet |= {"cross_attention_dim": 1024, "use_linear_projection": True}
    UNet2DConditionModel.from_config(unet).save_pretrained(folder / "unet")
    return folder


def scorer_source(scorer: str, **changes) -> ScorerSource:
    clip = str(MODELS / "tiny-clip")
    values = {
        "scorer": scorer,
        "checkpoint": str(MODELS / "tiny-spm.bin"),
        "backbone": clip,
        "processor": clip,
        "dtype": "float32",
        "kwargs": {},
    }
    return candidate_scorer(**(values | changes))


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def official_scheduler(num_steps, **changes):
    """diffusers' scheduler with SD1.5's and SDXL's noise schedule, written out."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        **changes,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def two_point_sampler(abar: float, abar_next: float, eta: float = 1.0) -> DDIM:
    """Returns a sampler of one transition, from t = 1 at `abar` to t' = 0 at `abar_next`."""
    return DDIM(
        alphas_cumprod=torch.tensor([abar_next, abar]),
        prediction_type="epsilon",
        clip_range=None,
        threshold_ratio=None,
        threshold_max=1.0,
        timesteps=(1,),
        eta=eta,
    )


def make_pairs(
    latents: torch.Tensor,
    noises: torch.Tensor,
    next_latents: torch.Tensor,
    timesteps: list[int],
    conditioning: Conditioning | None = None,
) -> PreferencePairs:
    """Pairs of the given values; a loss does not look at their conditioning."""
    n = len(timesteps)
    return PreferencePairs(
        timesteps=torch.tensor(timesteps),
        latents=latents,
        noises=noises,
        next_latents=next_latents,
        prompt_ids=torch.arange(n),
        conditioning=conditioning or Conditioning(torch.zeros(n, 1, 1), torch.zeros(1, 1, 1)),
    )


def random_pairs(
    backbone: Backbone, timesteps: list[int], seed: int, latents_each: int = 1
) -> PreferencePairs:
    """One pair per timestep for `backbone`: random latents, a plausible x_t' for each noise."""
    n = len(timesteps)
    latents = randn(n, latents_each, *backbone.latent_shape, seed=seed)
    noises = randn(n, 2, *backbone.latent_shape, seed=seed + 1)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
    return make_pairs(
        latents, noises, latents + 0.1 * noises, timesteps, backbone.encode_prompts(prompts)
    )


def add_tiny_lora(
    backbone: Backbone, rank: int = 4, alpha: int | None = None, seed: int = 0
) -> Lora:
    return add_lora(backbone.unet, rank, rank if alpha is None else alpha, ATTENTION, seed)


def random_weights(lora: Lora, seed: int) -> dict[str, torch.Tensor]:
    """LoRA weights, both factors drawn: large enough to change every prediction."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in lora.parameters.items()
    }


@torch.no_grad()
def unet_output(backbone: Backbone) -> torch.Tensor:
    """What the UNet says, as it stands, to two fixed latents."""
    conditioning = backbone.encode_prompts(PROMPTS[:2])
    latents = randn(2, *backbone.latent_shape, seed=99)
    timesteps = torch.tensor([751, 101])
    return backbone.predict(backbone.unet, latents, timesteps, conditioning, 1.0)
