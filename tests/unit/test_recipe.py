from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from scaletrain import catalog, recipe
from scaletrain.config import Duration, ScheduleSpec
from scaletrain.errors import UserError
from scaletrain.recipe import load, resolved_yaml, stages

BASE = """\
# Trains a thing on tables of numbers,
# quickly.
#
# Command: scaletrain run thing
#          scaletrain run thing seed=1
# Needs:   a CSV with columns x and y,
#          of numbers
# Cost:    a minute
objective: {type: image_classification, size: 28}
players:
  model:
    optimizer: {type: adamw, lr: 1e-3, betas: [0.9, 0.99]}
    schedule: {type: cosine, warmup_steps: 5}
data:
  train: rows.csv
train:
  duration: 10 steps
  global_batch: 8
"""
STAGES = """\
stages:
  - name: head
    train: {duration: 3 epochs}
    players: {model: {schedule: null}}
  - name: all
    data: {train: [a.csv, {path: b.csv, rows: 5}]}
    objective: {type: language_model}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="r.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def refused(*args):
    with pytest.raises(UserError) as error:
        load(*args)
    return str(error.value)


def by_name(path, *words):
    return {stage.name: stage.recipe for stage in stages(load(path, words))}


# Reading


def test_values_are_decoded(write):
    r = load(write(BASE))
    assert r.train.duration == Duration(10, "steps")
    assert r.players["model"].optimizer.lr == 1e-3
    assert r.data.train[0].path == "rows.csv"
    assert r.objective.options == {"size": 28}


def test_words_have_the_meaning_of_yaml_1_2(write):
    text = BASE.replace("lr: 1e-3", "lr: 1e-3, eps: 1E-8").replace("10 steps", "2_000 steps")
    r = load(write(text + "networks: {model: {config: {a: off, b: yes, c: 010, d: 1:30, e: 2_000, f: 2020-01-02}}}"))
    assert r.networks["model"].config == {"a": "off", "b": "yes", "c": 10, "d": "1:30", "e": 2000, "f": "2020-01-02"}
    assert load(write(BASE + "players: {}\n".replace("players", "networks")), ["players.model.scaler.type=off"])


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!mine 3"])
def test_tags_are_refused_with_their_line(write, tag):
    message = refused(write(BASE + f"seed: {tag}\n"))
    assert "r.yaml, line 19: the tag" in message
    assert "is refused" in message


def test_a_tag_in_an_override_is_refused(write):
    assert "the tag `!!python/name:os.system` is refused" in refused(write(BASE), ["seed=!!python/name:os.system"])


def test_a_key_given_twice_is_refused_with_both_lines(write):
    assert "r.yaml, line 19: `global_batch` is given twice, first on line 18" in refused(
        write(BASE + "  global_batch: 9\n")
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line 1"),
        ("- 1", "should be a mapping"),
        ("", "should be a mapping"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: \x07", "not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(write, text, words):
    assert words in refused(write(text))


# Mistakes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train:\n  dur", "trian:\n  dur", "`trian`: there is no such key. Did you mean `train`? (FILE, line 16)"),
        (
            "global_batch: 8",
            "globalbatch: 8",
            "`train.globalbatch`: there is no such key. Did you mean `global_batch`? (FILE, line 18)",
        ),
        (
            "lr: 1e-3",
            "lrr: 1e-3",
            "`players.model.optimizer.lrr`: there is no such key. Did you mean `lr`? (FILE, line 12)",
        ),
        ("train: rows.csv", "train: {pth: rows.csv}", "`data.train.pth`: there is no such key. Did you mean `path`?"),
        ("train: rows.csv", "holdout: 0.1", "`data.train` is missing: give it in the recipe, or as `data.train=...`"),
        ("global_batch: 8", "global_batch: many", "`train.global_batch` is 'many': it should be a valid integer"),
        ("global_batch: 8", "global_batch: 0", "`train.global_batch` is 0: it should be greater than or equal to 1"),
        ("10 steps", "10", "`train.duration` is 10: write a number and a unit, such as `2_000 steps`"),
        (
            "type: adamw",
            "type: adamv",
            "`players.model.optimizer.type` is 'adamv': it should be one of sgd, adagrad, rmsprop",
        ),
        ("type: adamw", "type: adafacto", "Did you mean `adafactor`?"),
        ("optimizer: {type: adamw, lr: 1e-3, betas: [0.9, 0.99]}", "optimizer: adamw", "a mapping of keys to values"),
    ],
)
def test_mistakes_name_the_key_the_line_and_what_to_do(write, old, new, message):
    assert old in BASE
    path = write(BASE.replace(old, new))
    assert message.replace("FILE", path) in refused(path)


def test_all_mistakes_are_told_at_once(write):
    lines = refused(
        write(BASE.replace("lr:", "lrr:").replace("10 steps", "ten")), ["train.precision=bf15"]
    ).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("`train.precision` is 'bf15'")
    assert lines[2].endswith("Did you mean `bf16`? (on the command line)")


def test_branches_of_a_union_are_one_mistake(write):
    message = refused(write(BASE), ["networks.model.adapter.targets=3"])
    assert message.startswith("`networks.model.adapter.targets` is 3: it should be a valid string or a valid list.")


def test_mistakes_in_a_stage_name_it_and_the_line(write):
    message = refused(write(BASE + STAGES.replace("duration: 3 epochs", "durration: 3 epochs")))
    assert "`train.durration`: there is no such key. Did you mean `duration`? (stage `head`: " in message
    assert "line 21)" in message
    assert "has stages of its own" in refused(write(BASE + STAGES + "    stages: [{name: inner}]\n"))
    assert "two stages have the same name" in refused(write(BASE + STAGES.replace("name: all", "name: head")))


def test_a_null_does_not_hide_an_unknown_key(write):
    assert "`trian`: there is no such key" in refused(write(BASE + STAGES + "    trian: null\n"))


def test_open_values_must_be_given(write):
    text = BASE.replace("rows.csv", "???").replace("global_batch: 8", "global_batch: ???")
    assert "add data.train.path=... train.global_batch=... to the command" in refused(write(text))
    r = load(write(text), ["data.train=x.csv", "train.global_batch=4"])
    assert (r.data.train[0].path, r.train.global_batch) == ("x.csv", 4)


# Overrides


def test_overrides_are_yaml_values(write):
    r = load(
        write(BASE),
        ["seed=7", "players.model.ema={decay: 0.9}", "players.model.optimizer.betas=[0.8, 0.9]", "data.eval=*.csv"],
    )
    assert (r.seed, r.players["model"].ema.decay, r.players["model"].optimizer.betas) == (7, 0.9, (0.8, 0.9))
    assert r.data.eval[0].path == "*.csv"


def test_null_takes_a_key_away(write):
    assert load(write(BASE), ["players.model.schedule=null"]).players["model"].schedule == ScheduleSpec()


def test_an_override_goes_into_a_list(write):
    r = load(write(BASE), ["data.train.rows=3", "data.train.columns.text=sentence"])
    assert (r.data.train[0].path, r.data.train[0].rows, r.data.train[0].columns) == (
        "rows.csv",
        3,
        {"text": "sentence"},
    )
    r = load(write(BASE.replace("rows.csv", "[a.csv, b.csv]")), ["data.train.1.path=c.csv"])
    assert [s.path for s in r.data.train] == ["a.csv", "c.csv"]
    r = load(write(BASE), ["data.train=[a.csv, b.csv]", "data.train.1.rows=2"])
    assert [s.rows for s in r.data.train] == [None, 2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train", "write an override as key=value"),
        ("train..x=1", "write an override as key=value"),
        ("=1", "write an override as key=value"),
        ("train.duration.x=1", "which has no keys"),
        ("seed=[1", "the value of `seed`, line 1"),
        ("stages.a.seed=1", "this recipe has no stages"),
        ("data.train.3.rows=1", "there is no item `3` in this list"),
        ("trian.seed=1", "Did you mean `train`? (on the command line)"),
    ],
)
def test_an_override_without_effect_is_refused(write, word, message):
    assert message in refused(write(BASE), [word])


# Stages


def test_stages_merge_onto_the_recipe(write):
    parts = by_name(write(BASE + STAGES))
    assert list(parts) == ["head", "all"]
    assert parts["head"].train.duration == Duration(3, "epochs")
    assert parts["head"].train.global_batch == 8
    assert parts["head"].players["model"].schedule == ScheduleSpec()
    assert parts["head"].players["model"].optimizer.lr == 1e-3
    assert parts["head"].objective.options == {"size": 28}
    assert parts["all"].train.duration == Duration(10, "steps")
    assert [s.path for s in parts["all"].data.train] == ["a.csv", "b.csv"]
    assert parts["all"].objective.options == {}
    assert all(not part.stages for part in parts.values())


def test_a_stage_takes_a_whole_part_away(write):
    parts = by_name(write(BASE + "evaluate: {samples: 3}\n" + STAGES + "    evaluate: null\n"))
    assert [p.evaluate.samples for p in parts.values()] == [3, 64]


def test_without_stages_there_is_one():
    r = recipe.Recipe.model_validate({"objective": {"type": "x"}, "data": {"train": "a.csv"}})
    assert [(s.name, s.recipe) for s in stages(r)] == [("main", r)]


def test_an_override_of_a_shared_key_reaches_every_stage(write):
    parts = by_name(write(BASE + STAGES), "train.duration=4 steps", "data.train=z.csv")
    assert [p.train.duration for p in parts.values()] == [Duration(4, "steps")] * 2
    assert [p.data.train[0].path for p in parts.values()] == ["z.csv"] * 2
    assert len(parts["all"].data.train) == 1


def test_an_override_reaches_into_a_list_that_a_stage_sets(write):
    message = refused(write(BASE + STAGES), ["data.train.rows=2"])
    assert "`data.train.rows`: there is no item `rows` in this list" in message
    one = STAGES.replace("[a.csv, {path: b.csv, rows: 5}]", "[b.csv]")
    parts = by_name(write(BASE + one), "data.train.rows=2")
    assert [(p.data.train[0].path, p.data.train[0].rows) for p in parts.values()] == [("rows.csv", 2), ("b.csv", 2)]


def test_an_override_of_one_stage_wins_wherever_it_stands(write):
    for words in (["stages.head.train.duration=2 steps", "train.duration=4 steps"],):
        for order in (words, words[::-1]):
            parts = by_name(write(BASE + STAGES), *order)
            assert [p.train.duration for p in parts.values()] == [Duration(2, "steps"), Duration(4, "steps")]
    parts = by_name(write(BASE + STAGES), "stages.head.players.model.optimizer=null")
    assert parts["head"].players["model"].optimizer.betas is None
    assert parts["all"].players["model"].optimizer.betas == (0.9, 0.99)
    assert "there is no item `haed` in this list. Did you mean `head`?" in refused(
        write(BASE + STAGES), ["stages.haed.seed=1"]
    )


def test_what_a_stage_took_away_stays_away(write):
    parts = by_name(write(BASE + STAGES), "players.model.schedule.warmup_steps=2")
    assert [p.players["model"].schedule.warmup_steps for p in parts.values()] == [0, 2]
    every = STAGES + "    players: {model: {schedule: null}}\n"
    message = refused(write(BASE + every), ["players.model.schedule.warmup_steps=2"])
    assert "would reach no stage; write `stages.head.players.model.schedule.warmup_steps=...` or" in message


def test_an_override_that_no_objective_would_see_is_refused(write):
    text = BASE + STAGES.replace("train: {duration: 3 epochs}", "objective: {type: gan}")
    assert "`objective.size` would reach no stage; write `stages.head.objective.size=...`" in refused(
        write(text), ["objective.size=3"]
    )


def test_a_new_objective_type_replaces_the_options(write):
    for words in (["objective.type=gan", "objective.latent=8"], ["objective.latent=8", "objective.type=gan"]):
        r = load(write(BASE), words)
        assert (r.objective.type, r.objective.options) == ("gan", {"latent": 8})


# Writing


@pytest.mark.parametrize("text", [BASE, BASE + STAGES])
def test_a_resolved_recipe_loads_as_itself(write, text):
    words = [
        "players.model.ema={decay: 0.99}",
        "data.train.columns={text: '1e3', label: 'off'}",
        "networks.model={config: {a: 1e-7, b: 'null', c: [1, {d: .inf}], e: '~', f: '0x1F', g: 'é'}, from: run:x/y}",
    ]
    if "stages" in text:
        words[1] = "stages.head.data.train=[{path: a, columns: {text: '1e3', label: 'off'}}]"
    first = load(write(text), words)
    path = write(resolved_yaml(first), "resolved.yaml")
    second = load(path)
    assert second == first
    assert stages(second) == stages(first)
    assert resolved_yaml(second) == resolved_yaml(first)
    written = yaml.safe_load(resolved_yaml(first))
    assert written["train"]["precision"] == "fp32"  # defaults are written out
    assert written["networks"]["model"]["from"] == "run:x/y"


def test_schema_takes_what_load_takes():
    schema = recipe.json_schema()
    source = schema["$defs"]["DataSpec"]["properties"]["train"]
    assert {"type": "string"} in source["anyOf"]
    assert "from" in schema["$defs"]["NetworkSpec"]["properties"]
    assert schema["$defs"]["TrainSpec"]["properties"]["duration"]["default"] == "1_000 steps"
    assert schema["properties"]["stages"]["type"] == "array"


# The catalogue


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    (tmp_path / "lm").mkdir()
    (tmp_path / "start.yaml").write_text(BASE)
    (tmp_path / "lm" / "lora.yaml").write_text("# Tunes.\n" + BASE.split("\n", 8)[8])
    monkeypatch.setattr(catalog, "RECIPES", tmp_path)
    return tmp_path


def test_recipes_are_found_by_name(shipped):
    assert catalog.names() == ["lm/lora", "start"]
    assert catalog.find("lm/lora") == shipped / "lm" / "lora.yaml"
    assert load("start").train.global_batch == 8
    assert catalog.run_name("lm/lora") == "lm-lora"
    assert catalog.run_name("a/b/mine.yaml") == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora", "There is no recipe `lora`. Did you mean `lm/lora`?"),
        ("strat", "Did you mean `start`?"),
        ("../x", "There is no recipe"),
        ("missing.yaml", "There is no file missing.yaml."),
    ],
)
def test_an_unknown_recipe_is_refused(shipped, name, message):
    assert message in refused(name)


def test_headers_are_read(shipped):
    lora, start = catalog.list_recipes()
    assert (start.name, start.family, start.summary) == (
        "start",
        "start",
        "Trains a thing on tables of numbers, quickly.",
    )
    assert start.facts["command"] == "scaletrain run thing\nscaletrain run thing seed=1"
    assert start.needs == "a CSV with columns x and y, of numbers"
    assert (lora.family, lora.summary, lora.needs) == ("lm", "Tunes.", "")


def test_every_shipped_recipe_has_a_header():
    for info in catalog.list_recipes():
        assert info.summary, f"{info.name} has no summary"
        assert {"command", "needs", "cost", "expect"} <= set(info.facts), f"{info.name}: {sorted(info.facts)}"
        assert info.name in info.facts["command"]


# The modules that a recipe names


MINE = """
from scaletrain.config import Strict
from scaletrain.objectives.base import Objective as Base, Turn

class Config(Strict):
    knob: int = 1

class Objective(Base[Config]):
    turns = (Turn("g", "generator"), Turn("d", "critic"))
    def examples(self, rows, training, window=False): ...
    def networks(self): ...
    def counts(self, turn, batch): ...
    def loss(self, turn, networks, batch): ...
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "_code", set())
    path = tmp_path / "my_own.py"
    path.write_text(MINE)
    recipe.load_code(path)
    yield "objective: {type: my_own, knob: 2}\ndata: {train: x.csv}\n"
    sys.modules.pop("scaletrain.objectives.my_own")


def test_code_brings_an_objective(write, mine):
    r = load(write(mine))
    recipe.check(r)
    assert recipe.objective_of(r).config.knob == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("objective.knbo=1", "`objective.knbo`: there is no such key. Did you mean `knob`?"),
        ("objective.knob=x", "`objective.knob` is 'x': it should be a valid integer"),
        ("objective.type=my_onw", "there is no objective `my_onw`. Did you mean `my_own`?"),
        ("players.crtic.clip=1", "`players.crtic`: my_own has no player of that name. Did you mean `critic`?"),
        ("players.critic.optimizer.momentum=0.9", "`players.critic.optimizer.momentum`: adamw has no momentum"),
        ("players.critic.schedule.power=3", "`players.critic.schedule.power`: constant does not use it"),
        ("networks.critic.type=cnnn", "no network is called `cnnn`"),
        ("networks.critic={type: cnn, config: {widht: 2}}", "`networks.critic.config.widht`: there is no such key"),
        ("networks.critic.from=stage:one/x", "there is no earlier stage `one`"),
    ],
)
def test_check_finds_what_the_modules_know(write, mine, word, message):
    with pytest.raises(UserError) as error:
        recipe.check(load(write(mine), [word]))
    assert message in str(error.value)


def test_check_names_the_stage(write, mine):
    text = mine + "stages: [{name: one}, {name: two, networks: {critic: {from: stage:oen/critic}}}]\n"
    with pytest.raises(UserError, match=r"^stage `two`: .*earlier stage `oen`\. Did you mean `one`\?"):
        recipe.check(load(write(text)))
    recipe.check(load(write(text.replace("oen", "one"))))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("image_classification.py", MINE, "cannot name an objective type, or is one already"),
        ("my-own.py", MINE, "cannot name an objective type"),
        ("empty.py", "", "must define a `Config` and an `Objective`"),
        ("broken.py", "1 / 0", "cannot be imported: ZeroDivisionError"),
        (None, "", "there is no file"),
    ],
)
def test_code_that_is_no_objective_is_refused(tmp_path, monkeypatch, name, text, message):
    monkeypatch.setattr(recipe, "_code", set())
    path = tmp_path / (name or "missing.py")
    if name:
        path.write_text(text)
    with pytest.raises(UserError, match="--code: ") as error:
        recipe.load_code(path)
    assert message in str(error.value)


def test_loading_imports_no_heavy_library(write):
    code = (
        "import sys; from scaletrain.recipe import load, resolved_yaml, stages, json_schema\n"
        f"r = load({write(BASE + STAGES)!r}, ['train.duration=4 steps']); stages(r); resolved_yaml(r); json_schema()\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
