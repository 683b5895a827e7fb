"""Run as a script, without unified_lm: what do stock tools make of an export? Answers as arrays in an .npz file.

Usage: python stock_tools.py CASES.json, a list of {"folder", "out", "texts", "messages"}.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def ask(folder: str, texts: list[str], messages: list[dict[str, str]]) -> dict[str, np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    causal_lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    embedder = SentenceTransformer(folder, device="cpu", trust_remote_code=False)
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = causal_lm.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat["input_ids"].shape[1] :]
    ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
    flipped = ids.clone()
    flipped[0, -1] += 1
    states = embedder[0]({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["token_embeddings"][0]
    other = embedder[0]({"input_ids": flipped, "attention_mask": torch.ones_like(ids)})["token_embeddings"][0]
    return {
        "documents": embedder.encode(texts),
        "queries": embedder.encode(texts, prompt_name="query"),
        "tokens": ids[0].numpy(),
        "logits": causal_lm(input_ids=ids).logits[0].numpy(),
        "causal_leak": (causal_lm(input_ids=flipped).logits - causal_lm(input_ids=ids).logits)[0, :-1].abs().max().numpy(),
        "embedding_leak": (other - states)[0].abs().max().numpy(),
        "chat": chat["input_ids"][0].numpy(),
        "answer": np.array(tokenizer.decode(answer, skip_special_tokens=True).strip()),
    }


if __name__ == "__main__":
    for case in json.loads(Path(sys.argv[1]).read_text()):
        np.savez(case["out"], **ask(case["folder"], case["texts"], case["messages"]))
    assert not any(name.partition(".")[0] == "unified_lm" for name in sys.modules), "unified_lm was imported"
