"""The last token's residual stream at every layer, as a package reads it, in that package's environment.

`../extraction.py` starts this and knows why. An answer holds a few of the vectors that were read,
`[layer prompt d_model]` as `../extraction.py` numbers layers, by which it sees that all read the same.
Each package is called as its own documentation calls it, with its own batches: prompts in the order given.

    python hidden_states.py repeng|steering-vectors|nnsight|saklas JOB.json
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from serving import load, load_tokenizer, serve

Answer = list[list[list[float]]]


def repeng(job: dict[str, Any]) -> Callable[[], Answer]:
    """`batched_get_hiddens`, which takes the texts and pads each batch; 32 is the package's default."""
    from repeng.extract import batched_get_hiddens  # type: ignore[import-not-found]

    model, tokenizer = load(job), checked(load_tokenizer(job), job)
    layers = list(range(model.config.num_hidden_layers))

    def read() -> Answer:
        hiddens = batched_get_hiddens(model, tokenizer, job["texts"], layers, job["batch_size"])
        return some(job, [torch.from_numpy(hiddens[layer]) for layer in layers])

    return read


def steering_vectors(job: dict[str, Any]) -> Callable[[], Answer]:
    """`record_activations` around the forward pass; the package has no batches of its own for it."""
    from steering_vectors import record_activations  # type: ignore[import-not-found]

    model, tokenizer = load(job), checked(load_tokenizer(job), job)

    def read() -> Answer:
        rows = []
        for inputs, last in batches(tokenizer, job):
            with torch.no_grad(), record_activations(model) as recorded:
                model(**inputs)
            rows.append([recorded[layer][0][every(last), last] for layer in sorted(recorded)])
        return some(job, [torch.cat(parts) for parts in zip(*rows, strict=True)])

    return read


def nnsight(job: dict[str, Any]) -> Callable[[], Answer]:
    """A trace that saves each layer's output at the last token."""
    from nnsight import LanguageModel, save  # type: ignore[import-not-found]

    tokenizer = checked(load_tokenizer(job), job)
    model = LanguageModel(load(job), tokenizer=tokenizer)
    layers = model.model.layers

    def read() -> Answer:
        rows = []
        for inputs, last in batches(tokenizer, job):
            with torch.no_grad(), model.trace(inputs):
                saved = save([])
                for layer in layers:
                    saved.append(hidden(layer.output)[every(last), last])
            rows.append(saved)
        return some(job, [torch.cat(parts) for parts in zip(*rows, strict=True)])

    return read


def saklas(job: dict[str, Any]) -> Callable[[], Answer]:
    """What its own fits capture with (it has no public call for it): sorted, 64 at once, nothing above."""
    from saklas.core.capture import (  # type: ignore[import-not-found]
        _CAPTURE_BATCH_MAX,
        _encode_and_capture_all_batch,
        _ReusablePooledCapture,
    )

    model, tokenizer = load(job), checked(load_tokenizer(job), job)
    layers = model.get_decoder().layers

    def read() -> Answer:
        ids = tokenizer(job["texts"])["input_ids"]
        # Its own place is the last content token; here it is told the last one, which all others read.
        ready = [(torch.tensor([one]), len(one) - 1) for one in ids]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        made: dict[int, torch.Tensor] = {}
        with _ReusablePooledCapture(model, layers, range(len(layers))) as hooks:
            for start in range(0, len(order), _CAPTURE_BATCH_MAX):
                rows = order[start : start + _CAPTURE_BATCH_MAX]
                texts = [job["texts"][row] for row in rows]
                found = _encode_and_capture_all_batch(
                    model,
                    tokenizer,
                    texts,
                    texts,
                    layers,
                    model.device,
                    rendered=[ready[row] for row in rows],
                    layer_indices=range(len(layers)),
                    capture_context=hooks,
                )
                for layer, vectors in found.items():
                    made.setdefault(layer, vectors.new_zeros(len(ids), vectors.shape[1]))[rows] = vectors
        return some(job, [made[layer] for layer in range(len(layers))])

    return read


def checked(tokenizer: Any, job: dict[str, Any]) -> Any:
    """The tokenizer, once it is seen to give the token ids that every other contender runs."""
    given = tokenizer(job["texts"])["input_ids"]
    if given != job["ids"]:
        raise SystemExit(f"other token ids: {given[0][:9]}... instead of {job['ids'][0][:9]}...")
    return tokenizer


def batches(tokenizer: Any, job: dict[str, Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    """The padded inputs of each batch, and the place of each row's last token."""
    for start in range(0, len(job["texts"]), job["batch_size"]):
        texts = job["texts"][start : start + job["batch_size"]]
        inputs = tokenizer(texts, padding=True, return_tensors="pt").to(job["device"])
        mask = inputs["attention_mask"]
        yield inputs, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)


def every(last: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(last), device=last.device)


def hidden(output: Any) -> Any:
    """A layer's residual stream, which Transformers 4 gave in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def some(job: dict[str, Any], layers: list[torch.Tensor]) -> Answer:
    return [layers[layer][job["rows"]].float().tolist() for layer in job["layers"]]


if __name__ == "__main__":
    serve({"repeng": repeng, "steering-vectors": steering_vectors, "nnsight": nnsight, "saklas": saklas})
