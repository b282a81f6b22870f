"""What the server's benchmark makes of the answers, and the benchmark itself."""

import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from serve_client import ROOT, Served, data_uri, png, questions  # noqa: E402

from libra.serve import bench, command, rates  # noqa: E402
from libra.serve.load import Answer, Caller, Question, Run  # noqa: E402

try:
    command.check_packages()
except ValueError as wrong_version:
    pytest.skip(str(wrong_version), allow_module_level=True)


def run(seconds: float, *texts: str | None, first: float = 0.1) -> Run:
    answers = (
        Answer(i, text, first * (i + 1), 1.0, flops_saved=0.5, error="" if text else "too many wait")
        for i, text in enumerate(texts)
    )
    return Run(tuple(answers), seconds)


def test_figures_by_hand():
    measured = [
        ("closed", 2, "vanilla", run(4.0, "a", "b")),
        ("closed", 2, "compressed", run(2.0, "a", "c", first=0.05)),
        ("closed", 2, "compressed", run(1.0, "a", "c")),
        ("closed", 2, "vanilla", run(2.0, "a", "b")),
        ("closed", 2, "vanilla", run(1.0, "a", "b", first=0.3)),
        ("closed", 2, "compressed", run(1.0, "a", None)),
        ("open", 1.5, "vanilla", run(2.0, "a", "b")),
        ("open", 1.5, "compressed", run(1.0, "a", "d")),
    ]
    found = rates.summary(measured)
    closed, opened = found["loads"]
    assert (closed["loop"], closed["clients"], opened["loop"], opened["rate"]) == ("closed", 2, "open", 1.5)
    assert closed["vanilla"]["requests_per_second"] == 1.0  # the median of 0.5, 1, 2
    assert closed["compressed"]["requests_per_second"] == 1.0  # 1, 2, and 1 of the two that were answered
    assert closed["ratio"] == 2.0  # turn by turn: 1 / 0.5, 2 / 1, 1 / 2
    assert closed["vanilla"]["first_token"] == {"median": 0.1, "p90": 0.2}
    assert found["answers"] == {
        "questions": 2,
        "equal": 1,
        "changing": 1,  # the compressed server said c and d
        "failed": 1,
        "first_error": "too many wait",
    }
    assert found["flops_saved"] == 0.5
    text = rates.table(found)
    assert (
        "| 2 clients | 1.00 | 1.00 | 2.00 | 0.100 | 0.100 |" in text and "| 1.5 requests/s | 1.00 |" in text
    )
    assert "1 of 2 answers" in text and "1 requests failed, the first one so: too many wait" in text


@pytest.mark.parametrize(
    "count, share, place", [(1, 0.9, 0), (2, 0.5, 0), (10, 0.5, 4), (10, 0.9, 8), (11, 0.9, 9)]
)
def test_a_quantile_is_a_value_that_enough_do_not_pass(count, share, place):
    times = [Answer(0, "a", 0.1 * i, 0.1 * i) for i in reversed(range(count))]
    figures = rates.summary([("closed", 1, name, Run(tuple(times), 1.0)) for name in rates.SERVERS])
    found = figures["loads"][0]["vanilla"]["first_token"]["median" if share == 0.5 else "p90"]
    assert found == round(0.1 * place, 4)


def test_rates_are_numbers():
    assert rates.rates_from("0.5,2") == (0.5, 2.0)
    for text in ("", "fast", "0", "1,,2", "nan", "inf", "-1"):
        with pytest.raises(Exception, match="is not a list of numbers"):
            rates.rates_from(text)


@pytest.mark.slow
def test_closed_and_open_loops_against_a_server(tmp_path):
    """Both ask every question as often as they say; failures are counted and do not end the load."""
    asked = [Question(data_uri(png(image)), text) for image, text in questions(3)]
    with Served(tmp_path, "--compression", "fastv") as server:
        caller = Caller(f"{server.url}/v1", "none", asked, 8)
        closed, opened = caller.closed(2, 7), caller.open(20.0, 7, seed=1)
        broken = Caller(f"{server.url}/v1", "none", [*asked, Question("data:,", "what ?")], 8).closed(4, 8)
    assert [answer.question for answer in closed.answers] == [0, 1, 2, 0, 1, 2, 0]
    assert [answer.text for answer in closed.answers] == [answer.text for answer in opened.answers]
    for answer in (*closed.answers, *opened.answers):
        assert 0 < answer.first <= answer.seconds and answer.tokens > 0 and 0.3 < answer.flops_saved < 0.6
    assert closed.seconds >= max(answer.seconds for answer in closed.answers)
    failed = [answer for answer in broken.answers if answer.text is None]
    assert [answer.question for answer in failed] == [3, 3] and "no known format" in failed[0].error
    assert opened.seconds >= 0.05  # seven arrivals, twenty a second


@pytest.mark.slow
def test_the_command_writes_figures_and_a_picture(tmp_path, capsys):
    options = ["--clients", "1,3", "--requests", "4", "--turns", "2", "--device", "cpu", "--rates", "5"]
    bench.main([*options, "--output", str(tmp_path)])
    data = json.loads((tmp_path / "bench.json").read_text())
    assert [load["loop"] for load in data["loads"]] == ["closed", "closed", "open"]
    assert data["answers"]["questions"] == 4 and data["answers"]["failed"] == data["answers"]["changing"] == 0
    assert data["flops_saved"] == pytest.approx(0.565, abs=0.01)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "| 3 clients |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--compression", "nope"], "compression: nope is neither a method nor a row"),
        pytest.param(
            ["--model", "no/such", "--pictures", str(ROOT / "docs/images")],
            "the vanilla server does not start: ",
            marks=pytest.mark.slow,
        ),
        (["--pictures", "no/such"], "the folder no/such cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path, capsys, options, sentence):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--device", "cpu", "--requests", "2", "--output", str(tmp_path), *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and sentence in error
