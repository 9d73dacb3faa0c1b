"""Every setting of the training of a preference model, as in config/base.py.

The model is a step-aware preference model (SPM), which sees images, or a latent reward model (LRM),
which sees noisy latents. config/spm_*.py and config/lrm_*.py are overlays: they change this config and
hold only their differences. "SPO" is Liang et al., CVPR 2025 (arXiv 2406.04314), the SPM on 4 x A100
80 GB; "LPO" is Zhang et al., NeurIPS 2025 (arXiv 2502.01051), the LRM on 8 GPUs.

On the command line:

    --config=config/spm_sdxl.py --config.train.batch_size=8 --config.data.source=/data/pickapic
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()

    # ---- the run -------------------------------------------------------------------------------
    config.family = "sd15"  # "sd15" or "sdxl"; must match pretrained.model
    config.seed = 42  # everything random in the run derives from it
    config.mixed_precision = "bf16"  # "no", "fp16" or "bf16" (SPO); what learns stays in fp32
    config.logdir = "runs"  # folder that holds the run directories
    config.run_name = ""  # name of the run directory; empty: "spm" or "lrm", family, time
    config.resume_from = ""  # a checkpoint folder, or "auto": the newest one of run_name
    config.checkpoint_limit = 2  # checkpoints kept, oldest deleted first; 0 keeps all
    config.max_train_steps = 8000  # optimizer steps (SPO: 8,000 for SD1.5, 7,000 for SDXL)
    config.save_steps = 1000  # optimizer steps between checkpoints
    config.eval_steps = 1000  # optimizer steps between measurements of accuracy; 0: none
    # The model at the end is the one with the best accuracy, mean over the timesteps, the earliest of
    # equals (LPO: True); False: the last one (SPO). Needs eval_steps and data.validation_split.
    config.keep_best = False
    config.log_steps = 10  # optimizer steps that a line of metrics averages over
    # Seconds without an answer of a process until the others stop; the main process may have to
    # download while the others wait.
    config.rank_timeout = 1800

    # ---- the base model, whose predictions an SPM, or whose latents an LRM, learns to judge ----
    config.pretrained = pretrained = ConfigDict()
    pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # Hub id or diffusers folder
    pretrained.revision = placeholder(str)  # branch, tag or commit of the Hub repo
    pretrained.variant = placeholder(str)  # weight files' variant, e.g. "fp16"
    pretrained.vae = placeholder(str)  # Hub id or folder that replaces the model's own VAE

    # ---- preference model ----------------------------------------------------------------------
    config.preference = preference = ConfigDict()
    preference.model = "step_aware_clip"  # the SPM, or "latent_reward": the LRM
    # SPM or LRM to start from; empty: a fresh one. An SPM is a .bin or .safetensors, a path or
    # hf://user/repo/file; an LRM is a folder: a path, user/repo or hf://user/repo/folder.
    preference.init_from = ""
    # SPM: its CLIP; a fresh SPM scores exactly as it does.
    preference.backbone = "yuvalkirstain/PickScore_v1"
    preference.processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # tokenizer, image processor
    # LRM: the weight of the prompt against the empty one in its features; 1: off (LPO: 7.5).
    preference.guidance_scale = 7.5
    preference.guide_stages = False  # LRM: for the features of the UNet's stages, too (LPO: False)
    # LRM of SD1.5: the CLIP whose text projection a fresh one starts from (LPO).
    preference.text_projection = "openai/clip-vit-large-patch14"

    # ---- labelled pairs of images --------------------------------------------------------------
    config.data = data = ConfigDict()
    # The Hub id of a dataset, a folder of `save_to_disk`, or a folder of .parquet, .json, .jsonl or
    # .csv files named by split (train-00000-of-00001.parquet, train.json).
    data.source = "pickapic-anonymous/pickapic_v1"
    data.revision = placeholder(str)  # branch, tag or commit of the Hub dataset
    # The source's names of Pick-a-Pic's columns where they differ, or a number for all rows:
    # {"caption": "prompt", "label_0": 1}; config/spm_hpdv3.py is an example.
    data.columns = ConfigDict()
    data.train_split = "train"  # every row with a valid label is used (SPO)
    data.validation_split = "validation_unique"  # rows with has_label are used; empty: none
    data.streaming = False  # read while training instead of keeping a copy on disk
    data.shuffle_buffer = 1000  # rows that streaming shuffles among
    data.image_size = 512  # pixels of a side (SPO, LPO: 512, SDXL 1024)
    # To a square: "crop" resizes the shorter side and cuts the centre out (SPO), "stretch" resizes
    # both sides (LPO).
    data.resize = "crop"
    data.num_workers = 4  # threads that decode images in the background; 0: none
    # Scores of the rows of train_split, by scripts/filter_pairs.py; training leaves out rows on which
    # the scorers disagree with people. Empty: none.
    data.filter = ""
    data.filter_strategy = 2  # 1 to 3, from strict to lax (LPO: 2); docs/preference_model.md
    data.max_validation = 0  # usable rows, from the first on, that measure accuracy; 0: all

    # ---- labels --------------------------------------------------------------------------------
    config.labels = labels = ConfigDict()
    labels.source = "data"  # people's labels, or "pickscore": PickScore's on the clean images
    labels.margin = 0.1  # "pickscore": a win if the softmax of the scores differs by more (SPO)
    labels.backbone = "yuvalkirstain/PickScore_v1"  # "pickscore": its CLIP
    labels.processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # "pickscore": its tokenizer

    # ---- loss and update -----------------------------------------------------------------------
    config.train = train = ConfigDict()
    train.batch_size = 16  # largest minibatch of pairs on one GPU (SPO: 16)
    # Pairs of one optimizer step = minibatch x GPUs x accumulation; minibatch and accumulation are
    # chosen to fit (SPO: 4 GPUs x 16). None: one minibatch of train.batch_size on each GPU.
    train.global_batch_size = FieldReference(64)
    train.predict_batch_size = 8  # images that go through the base model together
    train.gradient_checkpointing = False  # recompute activations: less memory, slower
    # The timesteps that pairs are noised to: all 1000 (SPO), or the DDIM timesteps of a sampler with
    # so many steps, leading spacing; 20: 1, 51, ..., 951 (LPO).
    train.num_timesteps = 1000
    train.guidance_scale = 5.0  # SPM: of the base model's predictions (SPO)
    train.learning_rate = 3e-6  # AdamW, at its peak (SPO: 3e-6 SD1.5, 1e-6 SDXL)
    train.warmup_steps = 500  # optimizer steps of warm-up, then linear decay to 0 (SPO, LPO)
    # "linear" (SPO), or "logarithmic": step n of W has log(n + 1) / log(W) of the rate, as by the
    # default of DeepSpeed's WarmupDecayLR (LPO).
    train.warmup = "linear"
    train.adam_beta1 = 0.9  # AdamW's constants as in torch
    train.adam_beta2 = 0.999
    train.adam_epsilon = 1e-8
    train.adam_weight_decay = 0.3  # on all weights (SPO, LPO)
    train.max_grad_norm = FieldReference(1.0)  # clip the global gradient norm; None: no clipping
    # fp16: the run stops after this number of updates in a row whose gradients overflowed.
    train.max_skipped_updates = 50

    # ---- tracker -------------------------------------------------------------------------------
    config.tracker = tracker = ConfigDict()
    tracker.name = "wandb"  # "wandb" (offline without a key), "tensorboard" or "none"
    tracker.project = "spo"  # name of the project there

    return config
