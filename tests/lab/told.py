"""A harvest whose truth is plain: what a latent does at a token is written beside the token, in a model made by hand.

Texts are written as `the storm=0.9 came`: latent 0 reads 0.9 at `storm`; `storm=0.9/0.2` gives latent 1 the 0.2. Of the
activation `x [T, 16]`, coordinate k is latent k's; it fires above THRESHOLD, and its scale is SCALE.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from guard.lab import labelled, shards
from guard.reader import weights

POINT = "model.layers.1"
SAE = f"{POINT}.tiny"
WIDTH = 16
THRESHOLD, SCALE = 0.5, 2.0
_WORDS = ["storm", "boat", "harbour", "letter", "Storm", "garden"]


def own(text, domains=(), **kw):
    given = {"lang": "en", "source": "own_pairs", "label_domains": domains, "scope": domains, "kind": "benign"} | kw
    return text, given


def model(folder):
    """A byte-level tokenizer that knows a few words whole, and a model of two small layers."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([f"a {word} {word}" for word in _WORDS] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def harvested(out, written, folder, *, shard_texts=1000, with_tokens=True):
    """Shards of `written`, (text, row's marks) each, as `guard lab harvest --labelled` would leave them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts, ids, xs = [], [], []
    for marked, _ in written:
        words = [word.partition("=") for word in marked.split(" ")]
        text = " ".join(word for word, _, _ in words)
        encoding = tokenizer.encode(text)
        x = torch.zeros(len(encoding.ids), WIDTH)
        end = -1
        for word, _, values in words:
            end += 1 + len(word)
            last = max(i for i, (_, stop) in enumerate(encoding.offsets) if stop <= end)  # the word's last token
            for latent, value in enumerate(values.split("/") if values else ()):
                x[last, latent] = float(value)
        texts.append(text)
        ids.append(torch.tensor(encoding.ids, dtype=torch.int32))
        xs.append(x.bfloat16())
    rows = [labelled.Row(id=str(i), text=text, **marks) for i, (text, (_, marks)) in enumerate(zip(texts, written, strict=True))]  # fmt: skip
    chunks = [range(i, min(i + shard_texts, len(texts))) for i in range(0, len(texts), shard_texts)]
    made = shards.ShardSet(
        model=str(folder),
        fingerprint=weights.fingerprint(folder),
        hook_points=(POINT,),
        d_model=WIDTH,
        dtype="float32",
        context=256,
        seed=0,
        tokens=sum(map(len, ids)),
        sources=(labelled.digest(rows),),
        shard_count=len(chunks),
    )
    shards.describe(out, made)
    (out / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    for index, chunk in enumerate(chunks):
        tensors = {
            "piece": torch.cat([torch.full((len(ids[i]),), i, dtype=torch.int32) for i in chunk]),
            POINT: torch.cat([xs[i] for i in chunk]),
        }
        if with_tokens:
            tensors["token"] = torch.cat([ids[i] for i in chunk])
        shards.write(out, index, tensors)
    return out


def suite(out, names=(SAE,), decoder=None):
    """SAEs that read the coordinates off one by one."""
    reports = []
    for name in names:
        (out / name).mkdir(parents=True)
        (out / name / "cfg.json").write_text('{"architecture": "jumprelu", "apply_b_dec_to_input": false}')
        zero = torch.zeros(WIDTH)
        parts = {
            "W_enc": torch.eye(WIDTH),
            "W_dec": torch.eye(WIDTH) if decoder is None else decoder,
            "b_enc": zero,
            "b_dec": zero.clone(),
            "threshold": zero + THRESHOLD,
        }
        save_file(parts, out / name / "sae_weights.safetensors")
        flat = np.ones(WIDTH, dtype=np.float32)
        np.savez(out / name / "stats.npz", firing_rate=flat / 8, scale=flat * SCALE)
        numbers = dict.fromkeys(
            ("l0_target", "fvu", "fvu_typical", "outlier_share", "l0", "dead_share", "threshold"), 0.0
        )
        reports.append(
            {
                "name": name,
                "hook_point": POINT,
                "architecture": "batch_topk",
                "width": WIDTH,
                "tokens_trained": 1,
                **numbers,
            }
        )
    (out / "report.json").write_text(json.dumps(reports))
    return out


def latents(file, indices, *, sae=SAE, tags=()):
    """What `guard lab candidates` writes; `tags`: (domain, q) by latent."""
    lines = [
        {
            "hook_point": POINT,
            "sae": sae,
            "latent": i,
            "tags": [{"domain": d, "q": q} for d, q in dict(tags).get(i, ())],
        }
        for i in indices
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
