"""The page of a finished run: what it shows, what it hides, and that it is sound."""

import html.parser
import re

import numpy as np
import pytest

from dpmix_jax import MethodConfig, accounting
from dpmix_jax.privacy import PrivacyConfig
from dpmix_jax.run import plots, report
from dpmix_jax.run.statement import privacy_report, statement

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x>',
    "$\\frac$",  # mathtext to matplotlib, and broken
    "&lt;b&gt;",
    "caf\udce9",  # a folder's name that is not UTF-8
    "a\x00\nb",
    "猫",  # not in matplotlib's font
]
VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """What a page consists of; raises for a tag that is not closed where it should be.

    Attributes:
      elements: (tag, attributes) of each element.
      texts: by the path of open tags, such as `html/body/h1`: the texts, in order.
    """

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"<{tag}/> is of SVG alone"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault("/".join(self.open), []).append(data)

    def of(self, suffix):
        """The texts in the elements whose path ends so."""
        return [
            text
            for path, texts in self.texts.items()
            if path.endswith(suffix)
            for text in texts
            if text.strip()
        ]


def confusions(num_classes, *, finite=True):
    """Counts of which each has its own number of digits, and many are 0."""
    rng = np.random.default_rng(num_classes)
    counts = rng.poisson(0.4, (num_classes, num_classes + 1)) * 7
    counts[np.arange(num_classes), np.arange(num_classes)] += 100
    counts[:, -1] *= not finite
    return counts


def privacy_statement(uncovered=""):
    config = PrivacyConfig(
        epsilon=3.0,
        delta=1e-5,
        l2_clip_norm=1.0,
        expected_batch_size=100,
        num_updates=8,
        uncovered=uncovered,
    )
    mechanism = accounting.Mechanism(
        noise_multiplier=2.0, sampling_prob=0.1, num_updates=8
    )
    facts = privacy_report(
        config,
        mechanism,
        num_records=1000,
        num_parameters=10,
        images_per_record=3,
        secret_seed=True,
        sensitivity=1.0,
    )
    return statement(facts)


def render(num_classes=3, **changed):
    """A page of made-up results."""
    confusion = changed.setdefault("confusion", confusions(num_classes))
    accuracies = np.diag(confusion) / confusion.sum(axis=1)
    given = {
        "title": "dp_mix_self on digits",
        "results": {
            "test_accuracy": 0.5,
            "test_accuracy_ema": 0.75,
            "per_class_accuracy_ema": accuracies.tolist(),
            "epsilon": 3.0,
            "delta": 1e-5,
            "noise_multiplier": 2.0,
            "seconds": 98765.0,
        },
        "metrics": [
            {
                "step": step,
                "epsilon": step / 10,
                "test/accuracy": 0.5,
                "test/accuracy_ema": 0.75,
                "nonprivate/loss": 54321.0,
            }
            for step in (10, 20)
        ],
        "sheet": np.linspace(0.0, 1.0, 3 * 4 * 4).reshape(3, 4, 4, 1),
        "method": MethodConfig(name="dp_mix_self", k_base=2, k_self=1),
        "class_names": [f"class {i}" for i in range(len(confusion))],
        "statement": "# Privacy statement\n",
        "config": {
            "seed": 424242,
            "data": {"name": "digits", "path": "/home/of/me/photos"},
            "finetune": {"encoder": None, "weights": "/home/of/me/model.safetensors"},
            "public": {"path": "/home/of/me/bank"},
        },
    }
    return report.render(**{**given, **changed})


@pytest.mark.sampled("True-10", "False-1")
@pytest.mark.parametrize("num_classes", [1, 10, 200])
@pytest.mark.parametrize("finite", [True, False])
def test_every_tag_is_closed_and_no_id_is_there_twice(num_classes, finite):
    page = Page(render(confusion=confusions(num_classes, finite=finite)))
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) > 100
    assert len({*ids}) == len(ids)
    values = [v for _, found in page.elements for v in found.values() if v]
    targets = [t for value in values for t in re.findall(r"^#(.+)|url\(#(.+)\)", value)]
    assert targets
    assert {a or b for a, b in targets} <= {*ids}
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == 3
    drawn = [found for tag, found in page.elements if tag == "svg"]
    assert all(each["role"] == "img" and each["aria-label"] for each in drawn)
    assert not {"script", "iframe", "link", "object"} & {*tags}


def test_nothing_is_loaded():
    page = Page(render())
    for tag, found in page.elements:
        assert not {"src", "srcset", "xlink:href"} & {*found}, tag
        assert found.get("href", "#").startswith(("#", "data:image/png;base64,"))
    assert "http" not in render()


def test_a_phone_sees_it_at_its_own_width():
    page = Page(render(200))
    phone = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert ("meta", phone) in page.elements
    tags = [tag for tag, _ in page.elements]
    for wide in ("table", "svg"):
        before = [page.elements[i - 1] for i, tag in enumerate(tags) if tag == wide]
        assert before == [("div", {"class": "wide"})] * 3  # around each
    assert ".wide { overflow-x: auto; }" in page.of("style")[0]


@pytest.mark.sampled("True-10")
@pytest.mark.parametrize("num_classes", [1, 10, 20])
@pytest.mark.parametrize("finite", [True, False])
def test_the_numbers_in_cells_are_the_counts(num_classes, finite):
    counts = confusions(num_classes, finite=finite)
    page = Page(render(confusion=counts))
    drawn = [text for text in page.of("svg/g/g/g/text") if text.isdigit()]
    assert drawn == [str(count) for count in counts.ravel() if count]
    figure = plots.plot_confusion(counts, [f"class {i}" for i in range(num_classes)])
    axes = figure.axes[0]
    shown = axes.images[0].get_array().filled(0.0)
    assert shown.shape == (num_classes, num_classes + (not finite))
    shares = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shown, shares[:, : shown.shape[1]], rtol=1e-12)
    for text in axes.texts:
        column, row = text.get_position()
        assert text.get_text() == str(counts[row, column])
    names = [f"class {i}" for i in range(num_classes)]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    names += [] if finite else ["not finite"]
    assert [label.get_text() for label in axes.get_xticklabels()] == names


def test_a_class_without_test_records_has_no_colour():
    counts = confusions(3)
    counts[1] = 0
    shown = plots.plot_confusion(counts, "abc").axes[0].images[0].get_array()
    assert shown.mask.tolist() == (counts[:, :3] == 0).tolist()
    assert np.isfinite(shown.filled(0.0)).all()


def test_of_many_classes_the_most_frequent_confusions_are_listed():
    counts, names = confusions(200, finite=False), [f"class {i}" for i in range(200)]
    found = report.most_confused(counts, names)
    columns = [*names, "not finite"]
    every = [
        (-counts[i, j], i, j) for i in range(200) for j in range(201) if i != j
    ]  # of one frequency the first
    assert found == [
        (names[i], columns[j], -less, -less / counts[i].sum())
        for less, i, j in sorted(every)[:10]
    ]
    page = Page(render(confusion=counts))
    true, predicted, count, _ = found[0]
    cells = page.of("body/div/table/tr/td")
    where = cells.index(f"{true} taken for {predicted}")
    assert cells[where + 1] == str(count)
    assert report.most_confused(np.eye(3, 4, dtype=int), "abc") == []


def test_the_statement_is_typeset():
    text = privacy_statement("a choice\n# of mine - <b>bold</b> ![x](https://x.org/y)")
    page = Page(render(statement=text))
    titles = re.findall(r"^- \*\*(.+):\*\*", text, re.MULTILINE)
    assert len(titles) > 8
    assert page.of("body/ul/li/strong") == [f"{title}:" for title in titles]
    assert page.of("body/h2").count("Privacy statement") == 1
    assert page.of("li/code")[0] == "model.safetensors"
    assert page.of("body/p")[0].startswith("The released weights are (")
    chosen = [line for line in page.of("li") if "a choice" in line]
    assert chosen == [
        " a choice # of mine - <b>bold</b> ![x](https://x.org/y). No epsilon covers"
        " that."
    ]


def test_a_line_that_begins_with_a_dash_is_no_list():
    text = "# Privacy statement\n\nHead.\n\n- **Public data used:** one\n  - two\n"
    assert "<li><strong>Public data used:</strong> one - two</li>" in render(
        statement=text
    )


def test_names_are_text_wherever_they_stand():
    counts = confusions(len(HOSTILE))
    given = {"title": HOSTILE[0], "config": {"data": {"path": HOSTILE[1]}}}
    whole = render(confusion=counts, class_names=HOSTILE, **given)
    page = Page(whole)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.elements}
    assert page.of("body/h1") == page.of("head/title") == HOSTILE[:1]
    labels = page.of("svg/g/g/g/g/g/text")
    shown = ["<script>a…</script>", '"><img src=x>', "$\\frac$", "&lt;b&gt;"]
    shown += ["caf\ufffd", "a\ufffd\ufffdb", "猫"]
    for name in shown:
        assert labels.count(name) == 2, name  # of a row and of a column
    assert page.of("details/div/table/tr/td")[0] == HOSTILE[0]


def test_secrets_are_not_in_it():
    page = render(statement=privacy_statement())
    for secret in ("nonprivate/loss", "54321", "98765", "424242", "&quot;seed&quot;"):
        assert secret not in page
    assert "/home" not in page
    assert page.count("&quot;path&quot;: &quot;photos&quot;") == 1
    assert "&quot;public&quot;: null" in render(config={"public": None})
    assert "&quot;name&quot;: &quot;digits&quot;" in page


@pytest.mark.sampled
def test_the_same_results_make_the_same_bytes():
    assert render() == render()
    assert render() != render(confusion=confusions(3, finite=False))


def test_settings_are_folded():
    page = Page(render())
    assert ("details", {}) in page.elements  # closed
    assert list(page.texts).count("html/body/details/pre") == 1
    assert sum(tag == "pre" for tag, _ in page.elements) == 1
