"""The report of a comparison: what it shows, and that texts of others stay texts; in a browser where one is at hand."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from charts import safe
from report import PAGES, Shown, by_length, slice_of, without_secrets, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
HOSTILE = ["</script><script>document.title = 'pwned'</script>", "<img src=x onerror=\"document.title = 'pwned'\">",
           "javascript:document.title='pwned'", "<!--<script>", "]]>", "a\u2028b\u2029c", "null\x00byte", "half \ud83d",
           "\u202egnp.exe", "&lt;b&gt;", "{{7*7}} $title ${title}", "\ufeff\ufffe\x7f\x85.",
           "<a href='javascript:1'>x</a>"]
ROWS = [
    Shown("\n<|user|>\nWhere is Lisbon?\n<|assistant|>\n", "It lies in Portugal by the sea.",
          "It lies in Spain by the sea.", 1.0, [("candidate", "candidate", "It is right.")], (8, 4), "maps"),
    Shown("\n<|user|>\nHow tall is it?\n<|assistant|>\n", "Quite.", "Two metres, I am told.", 0.0,
          [("baseline", "baseline", "It says how much.")], (1, 5), "sizes"),
    Shown("Hi", "Hello.", "Hey.", 0.5, [("candidate", "candidate", "1"), ("baseline", "baseline", "1")], (1, 1),
          "maps", flipped=True),
    Shown("Say nothing.", "", "", None, [("candidate", None, "Neither.")], (0, 0), "maps"),
]


def result_of(rows: Sequence[Shown], **more: Any) -> dict[str, Any]:
    """A result's line that fits the rows."""
    outcomes = [row.outcome for row in rows]
    sides = [{"name": name, "wins": outcomes.count(won), "lengths": [row.lengths[index] for row in rows]}
             for index, (name, won) in enumerate([("policy", "win"), ("chosen", "loss")])]
    return {"date": "2026-01-02T03:04:05+00:00", "total": len(rows), "seed": 7, "exp_name": "kto_tiny", "judge": "toy",
            "candidate": sides[0], "baseline": sides[1], "config": {"exp_name": "kto_tiny"},
            "ties": outcomes.count("tie"), "unparsed": outcomes.count("unparsed"), "win_rate": 0.375,
            "interval": [0.125, 0.752], "length_unit": "tokens", **more}


def report(path: Path, rows: Sequence[Shown] = ROWS, **more: Any) -> str:
    write_report(path / "report.html", result_of(rows, **more), rows)
    return (path / "report.html").read_text(encoding="utf-8")


def data_of(text: str) -> str:
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return data


def words_of(text: str) -> str:
    """What a reader sees of the page before its script has run."""
    body = re.sub(r"<(script|style).*?</\1>", "", text[text.index("<body>"):], flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_numbers_are_those_of_the_result(tmp_path: Path) -> None:
    """Of 4: one win, one tie, one loss, one unparsed, which is in no rate.

    Mean lengths: (8 + 1 + 1 + 0) / 4 and (4 + 5 + 1 + 0) / 4.
    """
    shown = words_of(report(tmp_path, flips=1, flip_rate=1 / 3))
    for part in ["Win rate of policy 37.5% 95% interval 12.5% to 75.2%: it holds 50%", "1 wins 25.0%", "1 ties 25.0%",
                 "1 losses 25.0%", "1 unparsed 25.0%", "Flips with the order 33.3%", "Mean length, policy 2.5 tokens",
                 "Mean length, chosen 2.5 tokens", "Judge toy · 4 comparisons", "all 37.5% 12.5% to 75.2% n 3",
                 "seed 7", "wins +4 n 1", "ties +0 n 1", "losses \N{MINUS SIGN}4 n 1"]:
        assert part in shown


def test_what_a_result_has_besides_is_shown(tmp_path: Path) -> None:
    more = {"length_controlled": {"win_rate": 0.333, "interval": [0.25, 0.5]}, "p_value": 0.00321, "flip_rate": 0.125,
            "requests": 1234, "cached": 0, "tokens": {"in": 91011, "out": 12},
            "cost": {"input_tokens": 5678, "dollars": 0.125}, "new_thing": 0.5, "none": None}
    shown = words_of(report(tmp_path, **more))
    for part in ["length-controlled 33.3% 25.0% to 50.0%", "p-value 0.00321", "Flips with the order 12.5%",
                 "Tokens in 91,011 Tokens out 12", "Requests 1,234", "Cached 0",
                 "Cost input tokens 5,678", "Cost dollars 0.125", "New thing 0.5"]:
        assert part in shown
    assert "None" not in shown
    assert "one order asked" in words_of(report(tmp_path))


@pytest.mark.parametrize(("interval", "said"), [
    ([0.51, 0.6], "the judge prefers policy"), ([0.1, 0.4], "the judge prefers chosen"),
    ([0.5, 0.9], "neither is shown to be better")])
def test_the_finding_follows_the_interval(tmp_path: Path, interval: list[float], said: str) -> None:
    assert said in words_of(report(tmp_path, interval=interval))


def test_a_part_without_ties_has_wilsons_interval() -> None:
    """5 of 10: the middle is 1/2, and half the width 1.96 sqrt(1/40 + 1.96^2/400) / (1 + 1.96^2/10) = 0.2634."""
    rows = [Shown(f"prompt {number}", "a", "b", float(number % 2)) for number in range(10)]
    [part] = slice_of("half", rows)
    assert part == pytest.approx(("half", 0.5, 0.23659, 0.76341, 10), abs=1e-5)
    [certain] = slice_of("all", rows[1::2])
    assert (certain.win_rate, certain.high) == (1.0, 1.0) and certain.low == pytest.approx(5 / 8.8416, abs=1e-5)
    assert slice_of("none", [Shown("p", "a", "b", None)]) == []


def test_data_sets_come_from_rows(tmp_path: Path) -> None:
    """maps: a win, a tie and an unparsed verdict, which is left out: (1 + 1/2) / 2."""
    assert re.search(r"By data set maps 75.0% \S+ to \S+ n 2 sizes 0.0% ", words_of(report(tmp_path)))


def test_a_panel_is_shown_judge_by_judge(tmp_path: Path) -> None:
    panel = [{"judge": "strict", "win_rate": 0.25, "interval": [0.2, 0.3]},
             {"judge": "mute", "win_rate": None, "interval": [0.0, 1.0]}]
    kappa = [{"judges": ["strict", "mild"], "kappa": 0.5, "interval": [0.25, 0.75], "n": 4},
             {"judges": ["strict", "mute"], "kappa": None, "interval": None, "n": 0}]
    shown = words_of(report(tmp_path, panel=panel, kappa=kappa))
    assert "By judge strict 25.0% 20.0% to 30.0% By data set" in shown
    assert "Kappa, strict and mild 0.50 (0.25 to 0.75)" in shown and "strict and mute" not in shown
    assert "Flips with" not in shown  # of the panel there are none


def test_parts_by_length() -> None:
    """8 to 4 is twice as long and no more; 1 to 5 under half; 1 to 1 alike, and 0 to 0, of which the verdict could not
    be read; something to nothing is over."""
    assert [(part.name, part.n) for part in by_length(ROWS)] == [("under half", 1), ("within 10%", 1), ("longer", 1)]
    assert [part.name for part in by_length([Shown("p", "a", "", 1.0, lengths=(1, 0))])] == ["over twice"]


def test_texts_come_through_whole_and_cannot_leave_their_place(tmp_path: Path) -> None:
    rows = [Shown(text, text, text, 1.0, [("candidate", "candidate", text)], (1, 1), text) for text in HOSTILE]
    data = data_of(report(tmp_path, rows))
    assert not re.search("[<>&\u2028\u2029\x00]", data)
    read, whole = json.loads(data)["rows"], [text.replace("\ud83d", "�") for text in HOSTILE]
    assert [row["candidate"] for row in read] == [row["baseline"] for row in read] == whole
    assert [row["dataset"] for row in read] == [row["verdicts"][0][2] for row in read] == whole
    assert [row["turns"] for row in read] == [[["", text]] for text in whole]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_settings_are_escaped(tmp_path: Path, text: str) -> None:
    rows = [Shown("p", "a", "b", 1.0, dataset=text)]
    more = {"exp_name": text, "judge": text, "config": {text: text}, "length_unit": text, "extra": text, text: 1}
    page = report(tmp_path, rows, **more)
    plain = report(tmp_path, [Shown("p", "a", "b", 1.0, dataset="x")],
                   **{"exp_name": "x", "judge": "x", "config": {"x": "x"}, "length_unit": "x", "extra": "x", "x": 1})
    tags = re.compile(r"</?[a-z!][^>]*>", re.IGNORECASE)
    assert tags.findall(page) == tags.findall(plain)
    assert safe(text) in page


def test_only_the_page_s_own_script_and_style_may_run(tmp_path: Path) -> None:
    text = report(tmp_path)
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ")
    for tag, directive in [("script", "script-src"), ("style", "style-src")]:
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert re.findall(r'(?:src|href|action)="([^"]*)"', text) == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|fetch\(|innerHTML|outerHTML|insertAdjacent|\.write\(|eval\(", text)


def test_secrets_are_left_out(tmp_path: Path) -> None:
    config = {"api_key": "s1", "model": {"hf_token": "s2", "name_or_path": "org/llama"}, "wandb": {"apiKey": "s3"},
              "OPENAI_API_KEY": "s4", "password": "s5", "pwd": 1234, "headers": [{"Authorization": "s6"}],
              "max_tokens": 10, "tokenizer_name_or_path": "org/tok", "note": "with sk-abcdefghijklmnop0123",
              "run": "hf_llama_7b_chat_and_more", "keyboard": "hf_abcdefghij0123456789", "url": "https://me:s7@host/v1"}
    kept = without_secrets(config)
    assert kept == {"model": {"name_or_path": "org/llama"}, "wandb": {}, "headers": [{}], "max_tokens": 10,
                    "tokenizer_name_or_path": "org/tok", "note": "with …", "run": "hf_llama_7b_chat_and_more",
                    "keyboard": "…", "url": "https://…@host/v1"}
    text = report(tmp_path, config=config, client={"access_token": "s8"}, judge="sk-abcdefghijklmnop0123")
    assert not re.search(r"\bs[1-8]\b|sk-abc", text)
    assert "org/llama" in text


def test_turns_are_told_apart_by_the_run_s_markers(tmp_path: Path) -> None:
    markers = {"human_prefix": "<H>", "human_suffix": "", "assistant_prefix": "<A>", "assistant_suffix": ""}
    rows = [Shown("<H>one<A>two<H>three<A>", "a", "b", 1.0)]
    turns = json.loads(data_of(report(tmp_path, rows, config=markers)))["rows"][0]["turns"]
    assert turns == [["human", "one"], ["assistant", "two"], ["human", "three"]]
    same = {**markers, "assistant_prefix": "<H>"}
    assert json.loads(data_of(report(tmp_path, rows, config=same)))["rows"][0]["turns"] == [["", rows[0].prompt]]


def test_a_comparison_without_any_verdict_has_a_report(tmp_path: Path) -> None:
    shown = words_of(report(tmp_path, [ROWS[3]], win_rate=None, interval=None))
    assert "No verdict could be read." in shown and "1 unparsed 100.0%" in shown
    assert "4 comparisons" in words_of(report(tmp_path, [], total=4))


def test_a_report_is_little_more_than_its_texts(tmp_path: Path) -> None:
    """2,000 rows of 2,000 characters are 4 MB; the rest, charts and names of fields, stays under 700 kB."""
    rows = [Shown("p" * 400, "a" * 800, "b" * 800, float(number % 2), lengths=(number, 100)) for number in range(2000)]
    assert 4_000_000 < len(report(tmp_path, rows)) < 4_700_000


# In a browser --------------------------------------------------------------------------------------------------------

Browse = Callable[[str], str]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """A function from an address's fragment to the page that the script has made, the data and code left out; a message
    on the console, as of an error or of something that the policy forbids, fails the test."""
    def page(fragment: str) -> str:
        assert BROWSER
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
                   "--enable-logging=stderr", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
                   f"{(tmp_path / 'report.html').as_uri()}#{fragment}"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr
        return re.sub(r"<(script|style)\b.*?</\1>", "", done.stdout, flags=re.DOTALL)
    return page


def listed(page: str) -> list[str]:
    """The numbers of the rows in the list."""
    return re.findall(r'<span class="number">(\d+)</span>', page)


@in_a_browser
def test_search_and_filters_find_rows(tmp_path: Path, browse: Browse) -> None:
    report(tmp_path)
    assert listed(page := browse("q=PORTUGAL")) == ["1"]
    assert "1 of 4 comparisons" in page
    assert listed(browse("q=it&show=losses")) == ["2"]
    assert listed(browse("show=flips")) == ["3"]
    assert listed(browse("show=unparsed&dataset=maps")) == ["4"]
    assert listed(browse("sort=longer")) == ["1", "3", "4", "2"]
    assert listed(browse("show=nothing&dataset=none&sort=x&open=99")) == ["1", "2", "3", "4"]


@in_a_browser
def test_an_opened_row_shows_both_responses_and_their_differences(tmp_path: Path, browse: Browse) -> None:
    report(tmp_path)
    page = browse("open=1")
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["Portugal", "Spain"]
    for part in ["policy ✓ preferred", "8 tokens", "It is right.", "policy shown first: <b>policy wins</b>"]:
        assert part in page
    assert "differences are not marked" in browse("open=2")


@in_a_browser
def test_hostile_texts_do_not_run(tmp_path: Path, browse: Browse) -> None:
    rows = [Shown(text, text, text + ".", 1.0, [("candidate", "candidate", text)], (1, 2), text) for text in HOSTILE]
    report(tmp_path, rows, exp_name=HOSTILE[1])
    for number in (1, 2):
        page = browse(f"open={number}")
        assert "<title>policy against chosen</title>" in page
        assert not re.search(r"<(img|a)\b", page)
        assert len(listed(page)) == len(HOSTILE) and 'class="response candidate-side"' in page


@in_a_browser
def test_the_policy_stops_a_script_that_is_not_ours(tmp_path: Path, browse: Browse) -> None:
    text = report(tmp_path)
    (tmp_path / "report.html").write_text(text.replace("</main>", "</main><script>document.title = 'pwned'</script>"))
    with pytest.raises(AssertionError, match="Content Security Policy"):
        browse("")


@in_a_browser
def test_of_many_rows_a_page_is_listed_and_the_one_asked_for(tmp_path: Path, browse: Browse) -> None:
    report(tmp_path, [Shown(f"prompt {number}", "a", "b", 1.0) for number in range(1, 2001)])
    page = browse("")
    assert len(listed(page)) == 100 and "Show more (1,900 left)" in page and "2,000 of 2,000" in page
    assert len(listed(browse("open=250"))) == 300
    assert listed(browse("q=prompt 1999")) == ["1999"]


def test_page_files_are_plain_text_that_a_script_tag_can_hold() -> None:
    for file in (PAGES / "report.js", PAGES / "report.css"):
        assert "</" not in file.read_text(encoding="utf-8") and "\r" not in file.read_bytes().decode()
