"""What a model directory says of its model: the metadata of each file, the model card, audEERING's object file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from w2s_jax import DIMENSIONS, __version__, machine, models
from w2s_jax.kinds import FILES, KINDS
from w2s_jax.models.plan import Normalise
from w2s_jax.names import line, markdown
from w2s_jax.runtime.predictor import LOGITS
from w2s_jax.runtime.session import REPORT

#: The licences that Hugging Face knows under these names; any other is named in the card's text only.
_HUB_LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause")


def collect_facts(student, config: dict) -> dict[str, str]:
    """What a reader of the .onnx file alone should know; strings, as the format has it."""
    teacher = config["teacher"]
    return {
        "w2s_jax": __version__,
        "student": config["student"],
        "fields": json.dumps(config["fields"]),
        "dimensions": ",".join(config["dimensions"]),
        "sampling_rate": str(config["sampling_rate"]),
        "minimum_samples": str(student.minimum_samples),
        "parameters": str(sum(models.count(student).values())),
        "teacher": teacher["name"],
        "teacher_fingerprint": teacher["fingerprint"],
        **({"pretrained": _describe_start(pretrained)} if (pretrained := config.get("pretrained")) else {}),
        "licence": _licence(config),
        "stand_in": "true" if teacher["stand_in"] else "false",
        **({"source": student.source} if hasattr(student, "source") else {}),
        "normalises": "true" if _normalises(student) else "false",
    }


def _normalises(student) -> bool:
    """Whether a student is known to divide each recording by its own level."""
    return hasattr(student, "fold") and isinstance(models.outline(student).layers[0], Normalise)


def _describe_start(pretrained: dict) -> str:
    return f"{pretrained['what']} ({pretrained['source']}, fingerprint {pretrained['fingerprint']})"


def _licence(config: dict) -> str:
    """The terms that a student inherits: its teacher's, and those of the weights that its training started from."""
    teacher, pretrained = config["teacher"], config.get("pretrained")
    if not pretrained or pretrained["licence"] == teacher["licence"]:
        return teacher["licence"]
    return f"{teacher['licence']} (teacher); {pretrained['licence']} (weights that it started from)"


def compose_audonnx_yaml(dimensions: Sequence[str]) -> str:
    """The object file that audEERING's ``audonnx.load`` reads beside model.onnx; JSON strings are YAML strings."""
    return (
        "$audonnx.core.model.Model==1.0.1:\n"
        f"  path: {FILES['fp32']}\n"
        "  labels:\n"
        f"    {LOGITS}: {json.dumps(list(dimensions))}\n"
        "  transform: null\n"
    )


def _row(kind: str, row: dict) -> str:
    """A kind's line in the card."""
    if KINDS[kind].exact:
        off = f"at most {row['difference_from_flax']:.1e} from the Flax student"
    else:
        off = f"at most {row['max_difference']:.2g} from fp32"
    scores = ", ".join(f"{markdown(name)} {score:.4f}" for name, score in row.get("ccc", {}).items())
    scores = f"{scores} ({row['views']} clips)" if scores else None
    time = f"{row['milliseconds']:.1f} ms for {row['seconds']:g} s" if "milliseconds" in row else None
    if "ratio" in row:
        time += f", {row['ratio']:.2f} of {row['against']}"
    memory = f"{row['peak_memory'] / 1e6:.1f} MB" if row.get("peak_memory") is not None else None
    cells = (
        kind,
        KINDS[kind].purpose,
        row["file"] + "/" * bool(KINDS[kind].parts),
        f"{row['bytes'] / 1000:.0f} kB",
        row.get(machine.NEEDS, "any"),
        off,
        scores,
        time,
        memory,
    )
    return "| " + " | ".join(cell or "–" for cell in cells) + " |"


def compose_card(name: str, facts: dict[str, str], config: dict, report: dict) -> str:
    """The model card, with the front matter that Hugging Face reads."""
    teacher, dimensions = config["teacher"], config["dimensions"]
    licence, pretrained = _licence(config), config.get("pretrained")
    slug = re.sub(r"[\s_]+", "-", teacher["licence"].split("(")[0].strip().lower())  # "MIT (whose)" is MIT
    if licence != teacher["licence"]:  # two licences have no name there
        slug = "other"
    emotion = tuple(dimensions) == DIMENSIONS
    head = {
        "license": slug if slug in _HUB_LICENCES else "other",
        "library_name": "onnx",
        "pipeline_tag": "audio-classification",
        "tags": [*(["speech-emotion"] if emotion else []), "knowledge-distillation", config["student"], "onnx", *dimensions],
    }
    if slug not in _HUB_LICENCES:
        head["license_name"] = line(licence)
    if "/" in teacher["name"]:  # a model of the hub has an owner
        head["base_model"] = teacher["name"]
    if validation := config.get("validation_ccc"):  # a run without validation views has none
        metrics = [
            {"type": "ccc", "name": f"CCC {dimension}", "value": round(validation[dimension], 4)} for dimension in dimensions
        ]
        data = {"name": "labels of the teacher", "type": "private", "split": "validation"}
        head["model-index"] = [
            {"name": name, "results": [{"task": {"type": "audio-classification"}, "dataset": data, "metrics": metrics}]}
        ]
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())  # JSON is YAML

    warning, caution, started = "", "", ""
    if pretrained:
        terms = f"its licence, whose terms this model inherits too: {markdown(pretrained['licence'])}"
        started = f"- Started from: {markdown(_describe_start(pretrained))}; {terms}\n"
    if emotion:
        caution = (
            "- The values describe how speech sounds to listeners on average. They are not a measure of what a person feels;\n"
            "  do not decide about a person by them.\n"
        )
    if teacher["stand_in"]:
        warning = (
            "\n> **Stand-in teacher.** The labels behind this model only imitate a real teacher. It shows that the pipeline "
            "works; its values mean nothing else.\n"
        )
    # strings that a teacher brings are shown as they are, whatever they would mean in Markdown, HTML or Python
    names, shown = markdown(", ".join(dimensions)), {key: markdown(teacher[key]) for key in ("name", "fingerprint", "licence")}
    outputs = ", ".join(f"{json.dumps(dimension, ensure_ascii=False)}: ..." for dimension in dimensions)
    table = "\n".join(_row(kind, row) for kind, row in report["kinds"].items())
    needs = ""
    if narrow := [kind for kind, row in report["kinds"].items() if machine.NEEDS in row]:
        needs = (
            f" The weights of {', '.join(narrow)} have 8 bits: they need {machine.EXACT_SUMS} (AMD from Zen 4, Intel from\n"
            "Ice Lake and Cascade Lake on). On other x86 processors their sums overflow and the values are wrong; `Predictor`\n"
            "refuses them there."
        )
    level = ""
    if facts.get("normalises") == "true":
        level = (
            " The network normalises each recording, so its level does not matter, unless it is close\n"
            "to silence (root mean square below about 0.005)."
        )
    source = f", {facts['source']}" if "source" in facts else ""
    failed = "".join(f"\n\nNot here: {kind}, {why}." for kind, why in report["failed"].items())
    return f"""---
{front}
---
# {name}

{config["student"]} ({int(facts["parameters"]):,} parameters{source}): 16 kHz mono speech in, {names} out.
{warning}
```python
from w2s_jax.runtime import Predictor

predictor = Predictor({json.dumps(name)})
print(predictor(wave, 16000))  # {{{outputs}}}
```

Input `signal`, float32 `[1, time]`, any length from {facts["minimum_samples"]} samples on; output `logits`,
`[1, {len(dimensions)}]`, not clipped.{level}

| kind | for | file | size | right on | how far it is off | CCC against fp32 | time | peak memory |
|---|---|---|---|---|---|---|---|---|
{table}

`Predictor({json.dumps(name)}, kind=...)` takes another kind than fp32.{needs}{failed}

- Teacher: {shown["name"]} (fingerprint {shown["fingerprint"]}). The student learned its outputs, not human labels.
- Licence of the teacher, whose terms this model inherits: {shown["licence"]}
{started}{caution}- Made with w2s_jax {__version__}; how it was checked is in {REPORT}. `audonnx.load` reads this directory too.
"""
