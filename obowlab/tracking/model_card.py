"""What MLflow shows beside a model version: where the encoder comes from, how good it is, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from obowlab import text
from obowlab.runs.folder import RunFolder

LONGEST_CARD = 5000
"""MLflow takes no longer description, in characters."""


def model_card(folder: RunFolder, *, name: str, version: str) -> str:
    """Return a model version's card, in Markdown.

    Args:
        folder: of its run.
        name: of the registered model.
        version: its number.
    """
    info, facts = folder.info, folder.facts()
    recipe, backbone, views = info.recipe, info.recipe.backbone, info.recipe.views
    training, data_hash = recipe.training, str(facts.get("data_hash", ""))[:12]
    results = list(_results(folder))
    lines = [
        f"# {name}, version {version}",
        "",
        f"{recipe.title}",
        "",
        f"- run `{info.run_id}`: recipe `{info.name}`, seed {info.seed}, method {recipe.method.name}, obowlab {info.version}",
        f"- data: `{recipe.data.dataset}` {data_hash}, {training.epochs} epochs, {training.batch_size} images a step",
        f"- network: {backbone.arch}, stem `{backbone.stem}`, width {backbone.width}, without classifier",
        f"- images: RGB, shorter side resized to {views.original_resize} pixels, centre of {views.original_size}, normalised as "
        "ImageNet's; `model.transform` does it",
        "",
        "| encoder | measured on | protocol | accuracy, 95 % interval [%] | of |",
        "|---|---|---|---|---|",
        *(results or ["| not measured yet | | | | |"]),
        "",
        "```python",
        f'encoder = obowlab.load("models:/{name}/{version}")  # reads the weights alone',
        f'model = mlflow.pytorch.load_model("models:/{name}/{version}")  # torchvision\'s ResNet; needs no obowlab',
        "features = model(model.transform(image)[None])",
        "```",
    ]
    return "\n".join(lines)[:LONGEST_CARD]


def _results(folder: RunFolder) -> Iterator[str]:
    """Yield a row for every number: those of the trained encoder first."""
    found = sorted(folder.results(), key=lambda result: result["subject"] != "student")
    for result in found:
        dataset = result.get("details", {}).get("dataset", folder.info.recipe.data.dataset)
        subject = {"student": "trained", "random": "untrained"}.get(result["subject"], result["subject"])
        for each in result["measurements"]:
            yield f"| {subject} | {dataset} | {each['name']} | {text.measurement(each)} | {each['count']} |"
