"""The page of `otel-pools watch --html`: whole by itself, and harmless whatever a pool is called."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

pytest.importorskip("rich")
pytest.importorskip("opentelemetry.proto")

from otel_pools import _vocabulary as words
from otel_pools._board import Track
from otel_pools._receiver import Wait
from otel_pools._report import page
from otel_pools._screen import PoolRow

EVIL = '<script>alert("x")</script><img src=http://evil/>&amp;'
VOID = {"meta", "br", "line", "polygon", "polyline"}


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, the texts; and whether all that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.opened = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def of(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def track(name="shop", **figures):
    given = {"source": "one", "service": EVIL, "pid": "7", "key": (name,), "heard": 10.0, "used": 1, "idle": 1}
    made = Track(PoolRow(name, "postgresql", **{**given, **figures}))
    made.note(PoolRow(name, "postgresql", **{**given, **figures, "heard": 20.0, "used": 4, "waiting": 2}))
    return made


def test_the_page_has_each_pool_with_a_plot_and_its_figures():
    """A heading, an inline picture and a table for each."""
    seen = Page(page([track(max=4), track("cache")], 20.0, 0.0))

    assert seen.opened == []
    assert seen.texts.count("shop") == 1
    assert "2 connection pools, 1970-01-01 00:00:00 UTC" in seen.texts
    assert (len(seen.of("svg")), len(seen.of("table")), len(seen.of("polygon"))) == (2, 2, 4)
    assert "exhausted: all 4 are in use and 2 wait; who holds them longest, and why?" in seen.texts


def test_the_plot_is_to_scale():
    """The time goes from left to right, what is allowed is the top, and the last word holds to the edge."""
    [used] = [a["points"] for a in Page(page([track(max=4, idle=0)], 20.0, 0.0)).of("polygon") if a["class"] == "used"]

    assert used == "0.0,90.0 640.0,90.0 640.0,0.0 640.0,0.0 640.0,120.0 0.0,120.0"


def test_one_moment_is_a_plot_too():
    """A pool that was heard of once has no duration to divide by."""
    once = Track(PoolRow("shop", "redis", used=0, heard=5.0, key=("shop",)))

    assert len(Page(page([once], 5.0, 0.0)).of("svg")) == 1


def test_names_are_text_and_nothing_else():
    """Whatever a process, a pool or a function is called, it makes no element."""
    evil = track(EVIL)
    evil.wait = Wait("one", EVIL, EVIL, 1.0, ({"code.file.path": EVIL, "code.function.name": EVIL, words.HOLDER: 1},))
    seen, plain = Page(page([evil], 20.0, 0.0)), Page(page([track()], 20.0, 0.0))

    assert [tag for tag, _ in seen.elements if tag not in {"p", "code"}] == [
        tag for tag, _ in plain.elements if tag != "p"
    ]
    assert any(EVIL in text for text in seen.texts)


def test_the_page_needs_nothing_else():
    """No script, no link, no picture from elsewhere; and the browser is told that there must be none."""
    text = page([track(EVIL)], 20.0, 0.0)
    seen = Page(text)

    assert not {"script", "link", "img", "iframe", "object", "base", "a", "use", "image"} & {
        t for t, _ in seen.elements
    }
    assert not {"src", "href", "xlink:href", "action", "srcset"} & {key for _, a in seen.elements for key in a}
    assert not [key for _, attributes in seen.elements for key in attributes if key.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert seen.of("meta")[1] == {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'",
    }


def test_who_is_gone_is_said():
    """With for how long."""
    assert any("gone: not a word for 100 s" in text for text in Page(page([track()], 120.0, 0.0)).texts)


def test_nothing_heard_is_a_page_too():
    """With a sentence."""
    assert "No pool has been heard of." in Page(page([], 0.0, 0.0)).texts
