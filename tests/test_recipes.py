"""Recipes: what is wrong with one is said in one line, with file, line, field, value and way out."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from squat.errors import ConfigError
from squat.recipes import PretrainRecipe, TrainRecipe, read_recipe, read_sweep

GOOD = """\
output: {folder}/run
model: {folder}
data:
  train: {folder}
  sequence_length: 16
quantize:
  weight_bits: 4
  activation_bits: "4:8"
training:
  steps: 3
"""


def write(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(text.replace("{folder}", str(folder)))
    return file


def test_a_good_recipe_reads_with_the_papers_defaults(tmp_path):
    recipe = read_recipe(write(tmp_path, GOOD), TrainRecipe)
    assert recipe.quantize.activation_bits == "4:8"
    assert (recipe.loss.gamma, recipe.loss.temperature) == (0.5, 2.0)
    assert (recipe.loss.entropy, recipe.loss.distribution) == (0.5, 1.0)
    assert (recipe.training.learning_rate, recipe.training.warmup_steps) == (2.5e-4, 200)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("steps: 3", "stepz: 3", 10, "training.stepz: no such key; known here are steps, epochs"),
        ("  train: {folder}", "  train: {folder}/no", 4, "data.train: .*/no does not exist"),
        ("model: {folder}", "model: /no/such", 2, "model: /no/such is neither a folder nor"),
        ("model: {folder}", "model: ${NO_SUCH_VARIABLE}", 2, "NO_SUCH_VARIABLE is not set"),
        ("weight_bits: 4", "weight_bits: 11", 7, "quantize.weight_bits: 11 bits are not possible"),
        ("weight_bits: 4", "weight_bits: 4\n  weight_bits: 8", 8, "weight_bits: given twice"),
        ("weight_bits: 4", "weight_bit: 4", 7, "quantize.weight_bit: no such field; known are"),
        ("steps: 3", "steps: -1", 10, r"training.steps: .*greater than 0 \(it is -1\)"),
        ("steps: 3", "steps: 3\n  learning_rate: .inf", 11, "training.learning_rate: .*finite"),
        ("steps: 3", "steps: 3\n  epochs: 2", 9, "training: give either steps or epochs"),
        ("  train: {folder}", "  generate: {}", 4, "data.generate.tokens: Field required"),
        ("  train: {folder}\n", "", 3, "data: give either train .* or generate"),
        ("output: {folder}/run\n", "", 1, "output: Field required"),
        ("sequence_length: 16", "sequence_length: many", 5, "sequence_length: .*'many'"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(tmp_path, old, new, line, message):
    file = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(file, TrainRecipe)
    assert f"{file}:{line}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a list", "output: [unclosed", "\x00"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        read_recipe(write(tmp_path, text), TrainRecipe)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(
            st.floats(0, 1),
            st.integers(0, 8),
            st.sampled_from(
                [*":{}[]&*!|>'\"%@-? \n\t#,~\0é\ud83d9", "<<: *a", "!!python/x ", "${"]
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_is_a_recipe_or_refused_in_one_line(tmp_path, changes):
    text = GOOD.replace("{folder}", str(tmp_path))
    for place, dropped, new in changes:
        at = int(place * len(text))
        text = text[:at] + new + text[at + dropped :]
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(ConfigError):
        read_recipe(file, TrainRecipe)
        return
    with pytest.raises(ConfigError, match=re.escape(str(file))) as caught:
        read_recipe(file, TrainRecipe)
    assert "\n" not in str(caught.value)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, "output: " + "[" * 50_000, "a: " * 20_000])
def test_recipes_that_explode_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        read_recipe(write(tmp_path, text), TrainRecipe)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read"):
        read_recipe(tmp_path / "no.yaml", PretrainRecipe)


RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("**/*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_recipe_of_the_project_is_valid(file, tmp_path, monkeypatch):
    for name in ("MODEL", "QUANTIZED", "TEXT", "SQUAT_DATA"):
        monkeypatch.setenv(name, str(tmp_path))
    for folder in ("babylm/train", "babylm/dev", "blimp", "blimp_supplement_sample"):
        (tmp_path / folder).mkdir(parents=True)
    for text in ("train/children_stories.train", "dev/children_stories.dev", "dev/simple_wiki.dev"):
        (tmp_path / "babylm" / text).touch()
    monkeypatch.chdir(tmp_path)  # where a recipe that starts from another one's model finds it
    for name in ("babylm-gpt2", "llama-58m", "gpt2-97m"):
        (tmp_path / f"runs/{name}/pretrain/model").mkdir(parents=True)
    models = tmp_path.parent / "models"
    for name in ("babylm-6m", "stories260k"):
        (models / name).mkdir(parents=True, exist_ok=True)
    (models / "babylm-tokenizer-16000.json").touch()
    if file.name == "sweep.yaml":
        read_sweep(file)
    else:
        read_recipe(file, PretrainRecipe if "tokenizer" in file.read_text() else TrainRecipe)
