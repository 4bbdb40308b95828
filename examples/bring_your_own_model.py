"""Your own model. Run: python examples/bring_your_own_model.py [NAME, FOLDER or FILE.gguf]

A model that you have already works as it is: pass your HookedTransformer or TransformerBridge in the place
of `model` to anything here. (Do not fold or centre its weights: `from_pretrained_no_processing`.)
"""

import sys

import lens_safety as ls


def look_at(model) -> None:
    """Which model it is, whether the numbers can be trusted on it, and where danger is in it."""
    known = ls.fingerprint(model)
    print(f"{known.name} on {known.engine}: {known.n_layers} layers, d_model {known.d_model}, {known.dtype}")

    checked = ls.checkup(model)  # batch invariance, exact hooks, steering identities
    for row in checked.frame.to_dict("records"):
        print("passed" if row["passed"] else "FAILED", row["check"], f"{row['measured']:.2g}")

    table = ls.layer_table(ls.residual_streams(model, ls.load_prompts("content").small()))
    columns = ["layer", "separation", "relative_magnitude", "cohens_d", "auroc"]
    print(table.to_frame()[columns].round(3).to_string(index=False))
    print("best layer:", table.best_layer)


if __name__ == "__main__":
    look_at(ls.load_model(sys.argv[1] if len(sys.argv) > 1 else None))
