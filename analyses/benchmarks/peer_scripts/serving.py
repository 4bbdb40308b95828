"""How a peer's script is asked for its work, and its model; nothing of `lens_safety` is imported.

The first line written is the package's name with versions; each line read is answered with one line of JSON.
"""

import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# A job -> what does it once and returns the answer.
Prepare = Callable[[dict[str, Any]], Callable[[], Any]]


def serve(prepared: Mapping[str, Prepare]) -> None:
    """`SCRIPT PACKAGE JOB.json`: prepare the package's work once, then do it for each line read."""
    # What a package prints must not stand among the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    package, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    work = prepared[package](job)
    shown = f"{package} {version(package)}, transformers {version('transformers')}"
    print(json.dumps(shown), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(work()), file=answers, flush=True)


def load(job: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job["folder"])
    # Transformers 4 does not read the rotary base where Transformers 5 writes it.
    rope = getattr(config, "rope_parameters", None) or {}
    if version("transformers").startswith("4.") and "rope_theta" in rope:
        config.rope_theta = rope["rope_theta"]
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], config=config, dtype=getattr(torch, job["dtype"])
    )
    return model.to(job["device"]).eval()


def load_tokenizer(job: dict[str, Any]) -> Any:
    # By its class: Transformers 4 does not know the name that Transformers 5 writes.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(job["folder"])
