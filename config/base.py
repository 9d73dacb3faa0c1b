"""Every setting of a training run, with its meaning, unit and source.

The other files in this folder are overlays: they change this config and hold only differences.
"Paper" is GradSPO (Tee et al., NeurIPS 2025); "SPO" is Liang et al., CVPR 2025 (arXiv 2406.04314).

On the command line:

    --config=config/sdxl.py --config.train.beta=5 --config.train.max_grad_norm=None

A placeholder is None and takes values of its type; a FieldReference has a value and takes None, too.
No other key takes None.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()

    # ---- the run -------------------------------------------------------------------------------
    # "gradspo", "spo", "lpo" (SPO's loss), or "module:name" of a loss (docs/extending.md).
    config.algorithm = "gradspo"
    config.family = "sd15"  # "sd15" or "sdxl"; must match pretrained.model
    config.seed = 42  # everything random in the run derives from it
    config.num_epochs = 10  # passes over the prompts (paper: 10)
    config.mixed_precision = "fp16"  # "no", "fp16" or "bf16"; LoRA and EMA stay in fp32
    config.logdir = "runs"  # folder that holds the run directories
    config.run_name = ""  # name of the run directory; empty: algorithm, family and start time
    config.resume_from = ""  # a checkpoint folder, or "auto": the newest one of run_name
    config.save_interval = 1  # epochs between checkpoints
    config.save_every_rollouts = 0  # rollouts between further checkpoints; 0: none within an epoch
    config.checkpoint_limit = 3  # checkpoints kept beside best/, oldest deleted first; 0 keeps all
    config.eval_interval = 1  # epochs between grids of validation images; 0 draws none
    # The launcher counts the costs of a step, in seconds, and warns of what will not fit into memory.
    config.estimate_costs = True
    # Seconds after which a collective fails that a process does not answer; the main process may have
    # to download while the others wait.
    config.rank_timeout = 1800

    # ---- speed, without another result but for rounding (docs/performance.md) ---------------------
    config.allow_tf32 = True  # GPUs round fp32 products, the scorer's above all, to 10 bits inside
    config.deterministic = False  # the same bits every time on a GPU of one kind, but slower
    # Memory layout of UNet, decoder and latent reward model; tells if it is faster:
    # scripts/benchmark.py --compare=channels_last=true
    config.channels_last = False
    # Record the passes over a minibatch as CUDA graphs and replay them: one launch for thousands. Takes
    # the memory of a minibatch beside that of a rollout; off with train.gradient_checkpointing.
    config.cuda_graphs = True
    # torch.compile, at the first call: minutes that a long run gets back.
    config.compile = ConfigDict()
    config.compile.unet = False  # the passes that draw candidates
    config.compile.vae = False  # its decoder, or sample.decoder in its place
    config.compile.scorer = False  # its vision tower

    # ---- the base model ------------------------------------------------------------------------
    config.pretrained = pretrained = ConfigDict()
    # Hub id, diffusers folder, or a .safetensors file of all weights (hf://user/repo/file, too).
    pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pretrained.revision = placeholder(str)  # branch, tag or commit of the Hub repo
    pretrained.variant = placeholder(str)  # of weight files, e.g. "fp16"; needs no name if alone
    pretrained.vae = placeholder(str)  # Hub id or folder that replaces the model's own VAE

    # ---- LoRA ----------------------------------------------------------------------------------
    config.lora = lora = ConfigDict()
    lora.rank = 4  # paper: 4 for SD1.5, 64 for SDXL
    lora.alpha = placeholder(int)  # LoRA is scaled by alpha / rank; None: alpha = rank (paper)
    lora.target_modules = ("to_q", "to_k", "to_v", "to_out.0")  # paper: every attention projection
    lora.init_from = ""  # LoRA to start from: file, run directory, or Hub id ("user/name[/file]")
    # Add the LoRA into a copy of the weights that it changes, for all passes without gradients: faster,
    # and takes as much memory as these weights do (fp16: SD1.5 0.2 GB, SDXL 1.9 GB).
    lora.merge = True
    lora.reference = "base"  # what the loss compares with: "base" model, or "init" = lora.init_from

    # ---- prompts to train on -------------------------------------------------------------------
    config.prompts = prompts = ConfigDict()
    # "official-4k" (the 4,000 of SPO and GradSPO), "pickapic-sfw" or another name in
    # spo/data/prompt_sets.py; a .json, .jsonl, .txt, .csv or .parquet file; an https address of one,
    # with #sha256=... behind it if its content must not change; a Hub dataset, user/name[@revision].
    prompts.source = "official-4k"
    prompts.split = "train"  # split of a dataset without a name of its own
    prompts.column = "caption"  # likewise its column; or the JSON key that holds the prompt
    prompts.num = 0  # unique prompts drawn from the source; 0 takes all, in order
    prompts.seed = 42  # seed of that draw, apart from the run's own

    # ---- preference model ----------------------------------------------------------------------
    config.preference = preference = ConfigDict()
    # What scores the candidates: "step_aware_clip" (paper), "pickscore", "hpsv2", "hpsv2.1",
    # "aesthetic", "clipscore", "imagereward", "latent_reward" (LPO, config/lpo_sd15.py), or
    # "module:factory" (see spo/scorers/__init__.py).
    preference.scorer = "step_aware_clip"
    # Weights of "step_aware_clip": .bin or .safetensors, a path or hf://user/repo/file.
    preference.checkpoint = (
        "hf://SPO-Diffusion-Models/Step-Aware_Preference_Models/"
        "sd-v1-5_step-aware_preference_model.bin"
    )
    # A CLIP, Hub id or folder: the architecture of "step_aware_clip", the weights of "pickscore".
    preference.backbone = "yuvalkirstain/PickScore_v1"
    # Tokenizer and image processor of these two, Hub id or folder.
    preference.processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    preference.dtype = "float32"  # of the weights of these two: "float32", "float16" or "bfloat16"
    # Options of all other scorers, such as {"checkpoint": "a/file.pt"} for "hpsv2".
    preference.kwargs = ConfigDict()

    # ---- rollout -------------------------------------------------------------------------------
    config.sample = sample = ConfigDict()
    sample.num_steps = 20  # DDIM steps (paper, SPO)
    # Their timesteps: "model" (that of the base model's scheduler; leading for SD1.5 and SDXL),
    # "leading" (951, 901, ..., 1), "trailing" (999, 949, ..., 49), "linspace" (999, 946, ..., 0), or
    # "module:function" of (num_steps, alphas_cumprod, steps_offset), see spo/method/ddim.py.
    sample.timesteps = "model"
    sample.eta = 1.0  # 1: as random as DDPM (paper, SPO); 0 is deterministic and cannot train
    sample.guidance_scale = 5.0  # classifier-free guidance, also in the loss; 1 turns it off
    sample.num_candidates = 4  # K: candidates drawn at each branching step (paper: 4)
    sample.branch_from = 4  # first step that branches: step 4 of 20 is t = 751 (paper: t <= 750)
    sample.num_inner_steps = 0  # further steps of each candidate before comparing (SPO on SDXL: 3)
    # Rule that chooses winners and losers: "best_worst" (SPO), or "module:function" of (scores,
    # generator), see spo/method/pairs.py.
    sample.pairing = "best_worst"
    # A pair is kept if softmax([win, lose]) differ by more (paper: 0.3 SD1.5, 0.4 SDXL); -1 keeps all.
    sample.threshold = FieldReference(0.3)
    # In its place (threshold is None) one that rises with the noise (LPO): as the "sigma" or the
    # "variance" of the transition, or "linear" in t.
    sample.threshold_schedule = placeholder(str)
    sample.threshold_min = placeholder(float)  # the threshold at t = 1
    sample.threshold_max = placeholder(float)  # and at t = 951
    # "branch": the last step draws K candidates as any other; "extend": each candidate of the
    # window before takes it once, and the images score that window (the official SDXL code).
    sample.final_step = "branch"
    sample.final_score_timestep = "zero"  # final latents are scored at "zero", or at the last "t"
    sample.keep_all_final = False  # keep the final latents' pairs whatever their gap
    # With final_step "extend": GradSPO's direction in that window is the noise of the "window"'s own
    # branching transition, or of the "last" transition (the official SDXL code).
    sample.final_direction = "window"
    sample.batch_size = 10  # prompts rolled out at once on one GPU
    # Prompts of one rollout over all GPUs, in as many slices of at most sample.batch_size as that
    # takes; None: one slice of sample.batch_size on each GPU.
    sample.global_batch_size = placeholder(int)
    sample.decode_batch_size = 8  # latents decoded and scored at once
    # The next three are of scorers that look at latents ("latent_reward"), which judge candidates in
    # the step that draws them; branch_from is then 0 in LPO.
    sample.score_batch_size = 16  # latents scored at once
    sample.score_timestep = "t"  # the timestep told: "t" drawn from (LPO), or the "next" one, t'
    sample.stop_at = 0  # first step that is not made; 0 makes all
    # What decodes the candidates for the preference model: None is the base model's VAE; a Hub id or
    # folder of a diffusers AutoencoderTiny ("madebyollin/taesd", for SDXL "madebyollin/taesdxl") does
    # it at a fraction of the cost (docs/performance.md). Validation images are the VAE's either way.
    sample.decoder = placeholder(str)

    # ---- loss and update -----------------------------------------------------------------------
    config.train = train = ConfigDict()
    train.batch_size = 10  # largest minibatch of pairs on one GPU
    # Pairs of one optimizer step: minibatch x GPUs x accumulation, which are chosen to make it;
    # None: train.batch_size and train.gradient_accumulation_steps are taken as they are.
    train.global_batch_size = placeholder(int)
    # Minibatches of one optimizer step where train.global_batch_size is None; None: 1.
    train.gradient_accumulation_steps = placeholder(int)
    train.gradient_checkpointing = False  # recompute UNet activations: less memory, slower
    # "adamw" (paper), or "adamw8bit": bitsandbytes' AdamW, whose moments take a quarter of the memory
    # where a LoRA matrix has 4,096 weights or more.
    train.optimizer = "adamw"
    train.learning_rate = 6e-5  # AdamW (paper: 6e-5 SD1.5, 1e-5 SDXL), constant
    train.adam_beta1 = 0.9  # AdamW's constants as in the official code
    train.adam_beta2 = 0.999
    train.adam_weight_decay = 1e-4
    train.adam_epsilon = 1e-8
    train.max_grad_norm = FieldReference(1.0)  # clip the global gradient norm; None: no clipping
    # fp16: updates in a row that are skipped, as their gradients overflow, before the run stops.
    train.max_skipped_updates = 50
    train.beta = 10.0  # inverse temperature of the preference loss (paper, SPO)
    # Likelihood ratios are clipped to 1 +- clip_eps; None: no clipping.
    train.clip_eps = FieldReference(0.1)
    train.grad_scale = 0.5  # gamma, strength of the gradient guidance (paper: 0.5); GradSPO only
    train.ema_decay = 0.9  # mu: ema = mu ema + (1 - mu) policy (paper: 0.9); GradSPO only
    # EMA moves at each "optimizer_step", or by "window": whenever the number of minibatches since
    # the rollout is a multiple of the accumulation steps (the official code).
    train.ema_every = "optimizer_step"
    # Source of GradSPO's EMA prediction: "fresh" makes a forward pass (paper); "rollout" reuses the
    # one made when the pair was drawn (a few updates old); "none" skips it (only if clip_eps is None).
    # The last two save one of three passes.
    train.ema_prediction = "fresh"

    train.loss_kwargs = ConfigDict()  # further parameters of a loss of your own, by name

    # ---- validation images ---------------------------------------------------------------------
    config.eval = evaluation = ConfigDict()
    evaluation.prompts = "assets/prompts/validation.txt"  # file of prompts, read as prompts.source
    evaluation.num_images = 8  # the grid shows the first so many prompts, one image each
    evaluation.seed = 0  # image i starts from noise seeded with (eval.seed, i)
    evaluation.num_steps = 20  # DDIM, eta 0
    evaluation.guidance_scale = 5.0  # as in training (paper)
    evaluation.weights = "policy"  # LoRA that draws them: "policy" (what is published) or "ema"
    # The run's own verdict on its health, and which epoch to ship (docs/healthy_runs.md): the first so
    # many prompts are judged, by the scorers below and by their pixels; 0: no verdict.
    evaluation.num_judged = 64
    evaluation.seeds_per_prompt = 2  # images of each, from seeds eval.seed, eval.seed + 1, ...
    evaluation.batch_size = 4  # prompts drawn at once on one GPU
    # Scorers of finished images that the run does not train on; named as preference.scorer, one by one
    # on the command line ("()" for none). The run goes on without one that cannot be loaded.
    evaluation.judges = ("hpsv2.1", "aesthetic")
    # Options of a judge by its name: config.eval.judge_options["hpsv2.1"] = {"checkpoint": "x"}.
    evaluation.judge_options = ConfigDict(allow_dotted_keys=True)
    evaluation.stop_when_overoptimised = False  # end the run, saved, once the judges like it less

    # ---- tracker -------------------------------------------------------------------------------
    config.tracker = tracker = ConfigDict()
    tracker.name = "wandb"  # "wandb" (offline where no key is set), "tensorboard" or "none"
    tracker.project = "spo"  # name of the project there

    # ---- publishing ----------------------------------------------------------------------------
    config.hub = hub = ConfigDict()
    hub.repo_id = ""  # Hub repo that the LoRA is pushed to, "user/name"; empty: none
    hub.subfolder = ""  # folder in it, e.g. "sd1_5": several runs can share a repo; empty: its root
    hub.weights = "policy"  # LoRA that is pushed: "policy" (as officially) or "ema"
    # Checkpoint that is pushed: empty: the weights as they are; "best": the one that the run's own
    # evaluations chose; or the name of a folder of checkpoints/.
    hub.checkpoint = ""
    hub.private = False  # make the repo private where it is made
    hub.branch = ""  # branch that is pushed to, made where it is missing; empty: main
    # Licence in the model card, by the Hub's identifier; empty: that of SD1.5 or SDXL 1.0, and none
    # for another base model.
    hub.license = ""
    hub.push_every = 0  # epochs between pushes in the background; 0: at the end alone

    return config
