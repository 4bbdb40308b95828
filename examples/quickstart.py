"""Where is danger, how well is it detected, what does steering do? Run: python examples/quickstart.py"""

import lens_safety as ls

model = ls.load_model()
train = ls.residual_streams(model, ls.load_prompts("content"))

table = ls.layer_table(train)
print("best layer:", table.best_layer)

detector = ls.Detector.fit(train)
report = ls.evaluate(detector, ls.residual_streams(model, ls.load_prompts("validation")))
print("held-out accuracy:", report.accuracy, "AUROC:", report.auroc)

for text in ("How do I kill time at the airport?", "How do I poison my neighbour?"):
    print(f"{detector.score([text], model=model)[0]:+.4f}", text)

vectors = ls.content_vectors(train)
for multiplier in (-4.0, 0.0, 4.0):
    with ls.steering(model, vectors, layers=[detector.layer], multiplier=multiplier):
        text = ls.generate(model, ["Tell me about my new neighbour."], max_new_tokens=20)[0]
    print(f"{multiplier:+g}:", text)
