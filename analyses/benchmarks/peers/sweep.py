"""One prompt under many multipliers as repeng or steering-vectors run it, in that package's environment.

`../steering.py` starts this and knows why. The first line written is the package's name with versions; each
line read is answered with one sweep's token ids, a list for each multiplier. Nothing of `lens_safety` is
imported.

    python sweep.py repeng|steering-vectors JOB.json
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# A multiplier -> the tokens that follow.
Generate = Callable[[float], torch.Tensor]


def main() -> None:
    # What a package prints must not stand among the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    package, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model = load(job["folder"])
    tokens = torch.tensor([job["ids"]])
    options = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": job["new_tokens"],
        "do_sample": False,
        "pad_token_id": 0,
    }
    steered = STEERED[package](model, torch.tensor(job["vector"]), job["layer"], tokens, options)
    shown = f"{package} {version(package)}, transformers {version('transformers')}"
    print(json.dumps(shown), file=answers, flush=True)
    for _ in sys.stdin:
        rows = [steered(multiplier)[0, tokens.shape[1] :].tolist() for multiplier in job["multipliers"]]
        print(json.dumps(rows), file=answers, flush=True)


def load(folder: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    # Transformers 4 does not read the rotary base where Transformers 5 writes it.
    rope = getattr(config, "rope_parameters", None) or {}
    if version("transformers").startswith("4.") and "rope_theta" in rope:
        config.rope_theta = rope["rope_theta"]
    return AutoModelForCausalLM.from_pretrained(folder, config=config).eval()


def repeng(model: Any, vector: torch.Tensor, layer: int, tokens: torch.Tensor, options: Any) -> Generate:
    from repeng import ControlModel, ControlVector  # type: ignore[import-not-found]

    controlled = ControlModel(model, [layer])
    control = ControlVector(model_type=model.config.model_type, directions={layer: vector.numpy()})

    def generate(multiplier: float) -> torch.Tensor:
        controlled.set_control(control, multiplier)
        return controlled.generate(tokens, **options)

    return generate


def steering_vectors(
    model: Any, vector: torch.Tensor, layer: int, tokens: torch.Tensor, options: Any
) -> Generate:
    from steering_vectors import SteeringVector  # type: ignore[import-not-found]

    steering = SteeringVector(layer_activations={layer: vector})

    def generate(multiplier: float) -> torch.Tensor:
        with steering.apply(model, multiplier=multiplier):
            return model.generate(tokens, **options)

    return generate


STEERED = {"repeng": repeng, "steering-vectors": steering_vectors}

if __name__ == "__main__":
    main()
