"""`squat report`: everything that is known about a run, as one HTML file that needs no network.

A run of `squat train` gives its recipe, loss curves, sizes and what was measured of it; a sweep gives its
tables and the figures that compare its runs. Behind these come all sections (`squat.report.sections`) that
lie below the run's folder or in folders that are named: comparisons, sensitivity, attention, fine-tuning.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from matplotlib.figure import Figure

from squat import __version__
from squat.data.files import writing
from squat.errors import DataError
from squat.report import sections
from squat.report.figures import LOSS_TERMS, loss_figure
from squat.report.sections import Table, read_section, save_figure
from squat.report.study_figures import ablation_figure, mixed_widths_figure
from squat.report.sweep import FULL_PRECISION, MEASURES


@dataclass
class _Part:
    """A part of the page; figures are data URIs, small ones stand beside each other."""

    title: str
    text: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    small_figures: list[tuple[str, str]] = field(default_factory=list)
    code: str = ""
    command: str = ""


def write_report(run: Path, include: Sequence[Path], output: Path) -> Path:
    """Write the report of a run, of a sweep, or of studies alone; returns the file.

    Args:
        run: the folder of one of them.
        include: more folders to look for sections in.
        output: the HTML file.

    Raises:
        DataError: nothing to report, an included folder without a section, or a file in them that is damaged.
    """
    if (run / "recipe.json").is_file():
        results, making = _run_parts(run)
    elif (run / "table.json").is_file():
        results, making = _sweep_parts(run), []
    else:
        results, making = [], []
    found = sorted(run.rglob(sections.FILE))
    if not (results or found):
        raise DataError(
            f"{run}: holds no run of squat train (recipe.json) or squat sweep (table.json), and nothing that "
            f"squat compare, sensitivity, attention or eval left ({sections.FILE})"
        )
    for folder in include:
        more = sorted(folder.rglob(sections.FILE))
        if not more:
            raise DataError(f"--include: {folder} holds no section ({sections.FILE})")
        found += more
    results += [_section_part(file.parent) for file in dict.fromkeys(found)]
    source = files("squat.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        title="/".join(run.resolve().parts[-2:]), parts=results + making, version=__version__
    )
    with writing(output) as out:
        out.write(page.encode())
    return output


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error


def _section_part(folder: Path) -> _Part:
    section = read_section(folder)
    return _Part(
        section.title,
        section.text,
        tables=section.tables,
        figures=[(caption, _inline(folder / name)) for caption, name in section.figures.items()],
        command=section.command,
    )


def _inline(file: Path) -> str:
    try:
        return _uri(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _drawn(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return _uri(out.getvalue())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _run_parts(run: Path) -> tuple[list[_Part], list[_Part]]:
    """What came out, and how it was made."""
    recipe = _read(run / "recipe.json")
    measured = _read(run / "measured.json") if (run / "measured.json").is_file() else {}
    log = _read(run / "log.json") if (run / "log.json").is_file() else None
    parts = [_overview(run, recipe, log, measured)]
    if log is not None:
        parts.append(_curves(log["log"]))
    if "blimp" in measured:
        parts.append(_minimal_pairs(measured["blimp"]))
    written = yaml.safe_dump(recipe, sort_keys=False)
    commands = "\n".join(_commands(run, recipe, measured))
    making = [
        _Part("Recipe", "As it was run, with every default.", code=written),
        _Part("Commands", command=commands),
    ]
    return parts, making


def _commands(run: Path, recipe: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """What makes this run and its figures again; recipe.yaml is the recipe above."""
    model, file = run / "model", run / "model.gguf"
    commands = [f"squat {'train' if 'quantize' in recipe else 'pretrain'} recipe.yaml"]
    if file.is_file():
        commands.append(shlex.join(["squat", "export", str(model), str(file)]))
    measured_model = file if measured.get("measured_in") == "engine" else model
    for task in ("perplexity", "blimp"):
        if task in measured:
            settings = measured[task]["settings"]
            words = ["squat", "eval", str(measured_model), "--task", task]
            words += [word for path in settings["data"] for word in ("--data", path)]
            if settings["limit"] is not None:
                words += ["--limit", str(settings["limit"])]
            if task == "perplexity":
                words += ["--sequence-length", str(settings["sequence_length"])]
                words += [] if settings["by_source"] else ["--no-by-source"]
            commands.append(shlex.join(words))
    return [*commands, shlex.join(["squat", "report", str(run)])]


def _overview(run: Path, recipe: dict[str, Any], log: Any, measured: dict[str, Any]) -> _Part:
    facts = []
    if "quantize" in recipe:
        config = recipe["quantize"]
        bits = f"W{config['weight_bits']}A{config['activation_bits']}"
        facts.append(("quantized to", f"{bits}, {config['method']}"))
    if log is not None:
        last, training = log["log"][-1], recipe["training"]
        windows = training["batch_size"] * training["accumulate"]
        tokens = last["step"] * windows * recipe["data"]["sequence_length"]
        facts += [
            ("steps", f"{last['step']:,}"),
            ("tokens seen", f"{tokens:,}"),
            ("training time", f"{log['seconds'] / 60:.1f} min"),
            ("training speed", f"{tokens / log['seconds']:,.0f} tokens/s"),
        ]
        if "wide_share" in last:
            facts.append(("tokens with 8 bits", f"{100 * last['wide_share']:.0f} %"))
    if "perplexity" in measured:
        facts.append(("held-out loss", f"{measured['perplexity']['loss']:.4f} nats"))
        facts.append(("perplexity", f"{measured['perplexity']['perplexity']:.2f}"))
    average = measured.get("blimp", {}).get("average_fields")
    if average is not None:
        facts.append(("BLiMP, fields", f"{100 * average:.1f} %"))
    facts += [(f"{f.name}", f"{f.stat().st_size / 1e6:.2f} MB") for f in sorted(run.glob("*.gguf"))]
    weights = list((run / "model").glob("*.safetensors"))
    if weights:
        size = sum(file.stat().st_size for file in weights) / 1e6
        facts.append(("checkpoint, float32", f"{size:.1f} MB"))
    model = recipe["model"]
    start = model if isinstance(model, str) else f"a new {model['model_type']}"
    return _Part("Overview", f"Started from {Path(start).name}.", facts=facts)


def _curves(log: list[dict[str, Any]]) -> _Part:
    shown = [term for term in LOSS_TERMS if any(term in entry for entry in log)]
    drawn = []
    for term in shown:
        only = [{"step": e["step"], term: e[term]} for e in log if term in e]
        drawn.append((term, _drawn(loss_figure(only))))
    return _Part(
        "Loss curves",
        "Means between two logs: the total, cross-entropy (ce), KL to the teacher (kl), the entropy and the "
        "attention-map (distribution) losses as far as they were used, and the share of tokens with 8 bits.",
        small_figures=drawn,
    )


def _minimal_pairs(blimp: dict[str, Any]) -> _Part:
    rows = [
        [name, f"{100 * value:.1f}"]
        for name, value in {**blimp["fields"], **blimp["supplement"]}.items()
    ]
    averages = {
        "average of fields": blimp["average_fields"],
        "average with supplement": blimp["average_with_supplement"],
        "average of paradigms": blimp["average_paradigms"],
    }
    rows += [[name, f"{100 * value:.1f}"] for name, value in averages.items() if value is not None]
    table = Table("Accuracy on minimal pairs, % (chance: 50)", ["field", "accuracy"], rows)
    return _Part("BLiMP", tables=[table])


def _sweep_parts(folder: Path) -> list[_Part]:
    """The tables of a sweep, and its figures, which are left in the folder as PNG files, too."""
    summary = _read(folder / "table.json")["summary"]
    shown = [name for name in MEASURES if any(name in run for run in summary.values())]
    head = ["run", *(MEASURES[name] for name in shown), "seeds"]
    rows = [
        [name, *(_cell(run, measure) for measure in shown), _seeds(run)]
        for name, run in summary.items()
        if run
    ]
    part = _Part("Runs", tables=[Table("Runs of the sweep", head, rows)])
    panels = {"added": "loss above full precision, nats", "average_fields": "BLiMP, fields, %"}
    panels = {name: label for name, label in panels.items() if name in shown}
    bars: dict[str, dict[str, float]] = {}
    for name, run in summary.items():
        if name != FULL_PRECISION and run:
            bars[name] = {measure: run[measure]["mean"] for measure in panels if measure in run}
            for measure in panels:
                if measure in run and run[measure]["standard_deviation"] is not None:
                    bars[name][f"{measure} ±"] = run[measure]["standard_deviation"]
    if bars and panels:
        part.figures.append(
            _kept(folder / "comparison.png", "Runs side by side", ablation_figure(bars, panels))
        )
    uniform, mixed = _average_widths(folder, summary)
    if len(uniform) > 1 and mixed:
        drawn = mixed_widths_figure(uniform, mixed)
        part.figures.append(_kept(folder / "mixed-widths.png", "Mixed against uniform", drawn))
    return [part]


def _kept(file: Path, caption: str, figure: Figure) -> tuple[str, str]:
    save_figure(figure, file)
    return caption, _inline(file)


def _cell(run: dict[str, Any], measure: str) -> str:
    if measure not in run:
        return ""
    digits = 4 if measure in ("loss", "added") else 2
    spread = run[measure]["standard_deviation"]
    text = f"{run[measure]['mean']:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def _seeds(run: dict[str, Any]) -> str:
    return str(max(measure["seeds"] for measure in run.values()))


def _average_widths(
    folder: Path, summary: dict[str, Any]
) -> tuple[list[tuple[float, float]], list[tuple[float, float, str]]]:
    """Average activation bits and loss: of runs with one width, and of runs that mix 4 and 8."""
    uniform, mixed = [], []
    for name, run in summary.items():
        recipes: Iterable[Path] = sorted((folder / name).glob("*/recipe.json"))
        recipe = next(iter(recipes), None)
        if recipe is None or "loss" not in run:
            continue
        bits, loss = _read(recipe)["quantize"]["activation_bits"], run["loss"]["mean"]
        if isinstance(bits, int):
            uniform.append((float(bits), loss))
        elif "wide_share" in run:
            mixed.append((4 + 4 * run["wide_share"]["mean"], loss, name))
    return uniform, mixed
