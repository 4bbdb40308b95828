"""One prompt under many multipliers as repeng or steering-vectors run it, in that package's environment.

`../steering.py` starts this and knows why. An answer is one sweep's token ids, a list for each multiplier.

    python sweep.py repeng|steering-vectors JOB.json
"""

from collections.abc import Callable
from typing import Any

import torch
from serving import load, serve

# A multiplier -> the tokens that follow.
Generate = Callable[[float], torch.Tensor]


def repeng(job: dict[str, Any]) -> Callable[[], list[list[int]]]:
    from repeng import ControlModel, ControlVector  # type: ignore[import-not-found]

    model, layer = load(job), job["layer"]
    controlled = ControlModel(model, [layer])
    directions = {layer: torch.tensor(job["vector"]).numpy()}
    control = ControlVector(model_type=model.config.model_type, directions=directions)
    tokens, options = prompt(job)

    def generate(multiplier: float) -> torch.Tensor:
        controlled.set_control(control, multiplier)
        return controlled.generate(tokens, **options)

    return lambda: swept(job, generate)


def steering_vectors(job: dict[str, Any]) -> Callable[[], list[list[int]]]:
    from steering_vectors import SteeringVector  # type: ignore[import-not-found]

    model = load(job)
    steering = SteeringVector(layer_activations={job["layer"]: torch.tensor(job["vector"])})
    tokens, options = prompt(job)

    def generate(multiplier: float) -> torch.Tensor:
        with steering.apply(model, multiplier=multiplier):
            return model.generate(tokens, **options)

    return lambda: swept(job, generate)


def prompt(job: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    tokens = torch.tensor([job["ids"]], device=job["device"])
    return tokens, {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": job["new_tokens"],
        "do_sample": False,
        "pad_token_id": 0,
    }


def swept(job: dict[str, Any], generate: Generate) -> list[list[int]]:
    start = len(job["ids"])
    return [generate(multiplier)[0, start:].tolist() for multiplier in job["multipliers"]]


if __name__ == "__main__":
    serve({"repeng": repeng, "steering-vectors": steering_vectors})
