"""train_sd15.py on the random models, noting what each process sends, trains on and ends up with.

Every minibatch of rank N is a line of LOGDIR/rank_N.jsonl, and so is every deal of pairs.
"""

import hashlib
import json
import os
from pathlib import Path

from absl import app

from spo.command_line.flags import define_config, exit_on_user_error, parse_flags

CONFIG = define_config("tests/data/random_models.py")


def note(**values):
    path = Path(CONFIG.value.logdir) / f"rank_{os.environ.get('RANK', '0')}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def noting_minibatches(train_minibatch):
    def noted(learner, pairs, index):
        step = train_minibatch(learner, pairs, index)
        digest = hashlib.sha256()
        for tensors in (learner.lora.parameters, learner.ema):
            for tensor in tensors.values():
                digest.update(tensor.detach().numpy().tobytes())
        note(pairs=len(pairs), weights=digest.hexdigest())
        return step

    return noted


def noting_deals(deal, sent):
    def noted(workers, pairs, generator):
        own = []
        pairs.map_rows(lambda rows: own.append(rows.nbytes) or rows)
        sent.clear()
        share, left_over = deal(workers, pairs, generator)
        note(own=len(pairs), own_bytes=sum(own), share=len(share), sent_bytes=sum(sent))
        return share, left_over

    return noted


def main(_):
    import torch.distributed as dist

    from spo.launch.workers import Workers
    from spo.method.learner import Learner
    from spo.method.start import train

    sent, exchange = [], dist.all_to_all_single

    def counting(result, rows, received, sizes):
        to_others = sum(sizes) - sizes[dist.get_rank()]
        sent.append(to_others * rows[:1].nbytes if len(rows) else 0)
        return exchange(result, rows, received, sizes)

    dist.all_to_all_single = counting
    Workers.deal = noting_deals(Workers.deal, sent)
    Learner.train_minibatch = noting_minibatches(Learner.train_minibatch)
    with exit_on_user_error():
        train(CONFIG.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
