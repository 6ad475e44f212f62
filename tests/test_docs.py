"""What the pages and the docstrings show is run: examples, blocks of code, commands."""

import doctest
import importlib
import inspect
import re
import shlex

import jax
import jax.numpy as jnp
import optax
import pytest

import dpmix_jax as dpm
from dpmix_jax import command, data, sweeps
from dpmix_jax.run import build, cli, statement
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
MODULES = (
    *("audit", "augment", "conv", "ghost", "gradients", "mixup", "optimizers"),
    "privacy",
)
# What an example or a command leaves to the reader.
CHOSEN = {"METHOD": "self_aug", "K_BASE": "4", "K_SELF": "0", "$seed": "0"}


def blocks(page, language):
    """Returns the fenced blocks of a page in a language, "" for none."""
    found = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page.read_text(), re.M)
    return [text for kind, text in found if kind == language]


# --- Python -----------------------------------------------------------------------


@pytest.mark.sampled("gradients", "mixup", "privacy", "sampling")
@pytest.mark.parametrize("name", [*MODULES, "allocation", "sampling"])
def test_examples_of_docstrings(name):
    given = {"jax": jax, "jnp": jnp, "optax": optax, "dpm": dpm}
    module = importlib.import_module(f"dpmix_jax.{name}")
    with jax.numpy_rank_promotion("allow"):
        failed, attempted = doctest.testmod(module, extraglobs=given)
    assert attempted >= 2
    assert not failed


# A page that goes on from the code of another one.
@pytest.mark.sampled("faq", "api")
@pytest.mark.parametrize(
    "pages",
    ["method assurance", "faq", "own_model", "api", "same_epsilon"],
    ids=lambda pages: pages,
)
def test_code_of_pages(pages, capsys):
    scope = {}
    with (
        jax.numpy_dtype_promotion("standard"),  # as users have it
        jax.numpy_rank_promotion("allow"),
    ):
        for page in pages.split():
            for code in blocks(DOCS / f"{page}.md", "python"):
                exec(compile(code, page, "exec"), scope)
    said = capsys.readouterr().out
    if "method" in pages:
        assert re.search(r"record \d .*: the sum moves by", said)
    if pages == "faq":  # its last lines are what it prints
        assert "".join(f"# {line}\n" for line in said.splitlines()) in code
    if pages == "own_model":
        scope["models"].REGISTRY.pop("mlp")
        assert scope["get_config"]("8").model.name == "mlp"


def test_all_code_of_pages_is_run():
    """But for that of docs/runs.md, which `tests/test_export.py` has."""
    found = {page.stem for page in PAGES if blocks(page, "python")}
    run = {"method", "assurance", "faq", "own_model", "api", "same_epsilon"}
    assert found == run | {"runs"}


# --- Commands ---------------------------------------------------------------------


def commands():
    """Yields (page, program of `experiments/`, flags) of all commands in the pages."""
    for page in (ROOT / "README.md", *PAGES):
        shown = "\n".join(blocks(page, "")).replace("\\\n", " ")
        inline = re.findall(
            r"`((?:python experiments/|dpmix )[^`]*)`", page.read_text()
        )
        for line in [*shown.splitlines(), *inline]:
            found = re.search(
                r"(?:python experiments/(\w+)\.py|\bdpmix ([a-z-]+))(.*)", line
            )
            if found:
                program, name, rest = found.groups()
                for word, value in CHOSEN.items():
                    rest = rest.replace(word, value)
                words = shlex.split(re.sub(r"<[^>]*>", "it", rest), comments=True)
                yield (
                    page.name,
                    *(_of_command(name, words) if name else (program, words)),
                )


def _of_command(name, words):
    """Returns the program and the flags that `dpmix <name> <words>` stands for."""
    if name in ("configs", "completion", "--help"):
        return None, []
    of_images = name == "train" and any("--epsilon" in word for word in words)
    program, named = command.COMMANDS["propose" if of_images else name]
    plain = [word for word in words if not word.startswith("-")]
    flags = [f"--{flag}={word}" for flag, word in zip(named, plain, strict=False)]
    return program, [*flags, *(word for word in words if word.startswith("-"))]


COMMANDS = [entry for entry in commands() if entry[1]]


def test_commands_have_the_flags_that_are_shown():
    assert len(COMMANDS) > 40
    for page, program, words in COMMANDS:
        source = (ROOT / "experiments" / f"{program}.py").read_text()
        known = {*re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source), "help"}
        if "cli.define_config" in source:
            known.add("config")
        for word in words:
            flag = re.match(r"--(?:no)?(\w+)", word)
            if flag:
                assert flag[1] in known, f"{page}: {program} {word}"


def test_configs_of_commands_load(monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = 0
    for _, program, words in COMMANDS:
        config = next((w for w in words if w.startswith("--config=")), "")
        path = cli.find_config(config.removeprefix("--config="))
        found = re.search(r"configs/(\w+)\.py:?(.*)", path)
        if not found or found[2].endswith(".py"):
            continue  # no config, or one of the reader's own
        name, argument = found.groups()
        if program in ("sweep", "report"):
            module = importlib.import_module(f"configs.{name}")
            settings = [w.removeprefix("--set=") for w in words if "--set=" in w]
            grid = module.get_config(*filter(None, [argument]))
            assert sweeps.from_config_dict(grid, settings).runs()
        else:
            cli.load_experiment([w for w in words if w.startswith("--config")])
        loaded += 1
    assert loaded > 25


def test_the_page_of_the_statement_has_that_of_the_first_command():
    config = cli.load_experiment(["--config=configs/digits.py"])
    records = data.load(config.data).train
    shapes = jax.tree.leaves(build.classifier(config, records).shapes)
    facts = statement.privacy_report(
        config.privacy,
        config.privacy.calibrate(config.privacy.sampling_prob(len(records))),
        num_records=len(records),
        num_parameters=sum(x.size for x in shapes),
        images_per_record=config.method.set_size,
        secret_seed=True,
        sensitivity=config.privacy.l2_clip_norm,
    )
    quoted = re.findall("^> ?(.*\n)", (DOCS / "privacy_statement.md").read_text(), re.M)
    title, text = statement.statement(facts).split("\n\n", 1)
    assert title == "# Privacy statement"
    assert "".join(quoted).strip() == text.strip()


# --- The API ----------------------------------------------------------------------


def test_the_api_has_every_public_name_and_module_of_the_core():
    page = (DOCS / "api.md").read_text()
    for name in dpm.__all__:
        member = getattr(dpm, name)
        home = inspect.getmodule(member).__name__
        where = f"`~{home}.{name}`" if home.startswith("dpmix_jax") else f"`{name}`"
        where = f"`~{home}`" if inspect.ismodule(member) else where
        assert where in page, name
    for module in re.findall(r"^    (\w+)  ", dpm.__doc__, re.M):
        assert f".. automodule:: dpmix_jax.{module}\n" in page, module
