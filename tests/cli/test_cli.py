"""The command line, in process: what each verb writes, what goes to stdout and what to stderr."""

import io
import json
import subprocess
import sys

import pytest

import eellm
from eellm.cli.main import VERBS, main
from eellm.infer.sampling import Sampler
from tests.directories import assert_same_model, content
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved tiny model with a tokenizer, an end of text and no exits."""
    model = tiny_model(dtype="float32", vocab_size=512, exits=(), bos_token_id=1, eos_token_ids=(0,))
    model.tokenizer = tiny_tokenizer()
    directory = tmp_path_factory.mktemp("cli") / "base"
    eellm.save(model, directory)
    return directory


@pytest.fixture(scope="module")
def adapter(base):
    """Exits for `base`, made by the command line."""
    out = base.parent / "adapter"
    assert main(["add-exits", str(base), str(out), "--exits", "2,4", "--kind", "norm", "--gate-size", "4"]) == 0
    return out


@pytest.fixture
def run(capfd):
    """Runs a command; gives what it wrote to stdout and to stderr. It must end well."""

    def call(*args):
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out, err

    return call


# --- import ---


def test_import_writes_the_same_model_and_says_so_on_stderr(base, tmp_path, run):
    out, err = run("import", base, tmp_path / "copy")
    assert out == ""
    assert err == f"{tmp_path / 'copy'}: 0.1 M parameters, 6 layers\n"
    assert_same_model(eellm.load(tmp_path / "copy"), eellm.load(base))
    assert content(tmp_path / "copy") == content(base)


def test_import_writes_another_dtype_on_demand_and_keeps_the_stored_one_otherwise(base, tmp_path, run):
    run("import", base, tmp_path / "half", "--dtype", "bfloat16")
    run("import", tmp_path / "half", tmp_path / "again")
    for name in ("half", "again"):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
    assert content(tmp_path / "half") == content(tmp_path / "again")
    assert_same_model(eellm.load(tmp_path / "again"), eellm.load(base, dtype="bfloat16").float())


def test_import_of_an_adapter_puts_its_exits_into_a_model_directory(base, adapter, tmp_path, run):
    run("import", adapter, tmp_path / "whole")
    assert_same_model(eellm.load(tmp_path / "whole"), eellm.load(base, adapter))


# --- add-exits ---


def test_add_exits_writes_an_adapter_and_leaves_the_base_alone(base, tmp_path, run):
    before = content(base)
    args = ("--exits", "4,2", "--kind", "mlp", "--head", "own", "--init", "copy")
    out, err = run("add-exits", base, tmp_path / "adapter", *args)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"{tmp_path / 'adapter'}: exits at 4, 2, ")
    assert content(base) == before
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"exits.json", "exits.safetensors"}
    model = eellm.load(tmp_path / "adapter")
    expected = tuple(eellm.ExitConfig(layer=n, kind="mlp", head="own", gate_size=64) for n in (2, 4))
    assert model.config.exits == expected
    copied = eellm.load(base)
    eellm.add_exits(copied, expected, init="copy")
    assert_same_model(model, copied)


def test_add_exits_to_a_model_with_exits_writes_the_new_ones_only(adapter, tmp_path, run):
    run("import", adapter, tmp_path / "whole")
    run("add-exits", tmp_path / "whole", tmp_path / "more", "--exits", "3", "--gate-size", "0")
    stored = json.loads((tmp_path / "more" / "exits.json").read_text())["exits"]
    assert [entry["layer"] for entry in stored] == [3]
    assert eellm.load(tmp_path / "more").config.exit_layers == (2, 3, 4)


def test_layerskip_exits_weigh_nothing(base, tmp_path, run):
    args = ("--exits", "1,3", "--kind", "norm", "--norm", "final", "--gate-size", "0")
    _, err = run("add-exits", base, tmp_path / "skip", *args)
    assert "0.00 M parameters" in err
    assert list(eellm.load(tmp_path / "skip").exits.parameters()) == []


def test_random_exits_depend_on_the_seed(base, tmp_path, run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("add-exits", base, tmp_path / name, "--exits", "2", "--init", "random", "--seed", seed)
    weights = {name: (tmp_path / name / "exits.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]


# --- generate ---


def expected(base, adapter, prompt, **options):
    (out,) = eellm.generate(eellm.load(base, adapter), [prompt], **options)
    return out


def test_generate_writes_the_text_alone_to_stdout_and_the_exits_to_stderr(base, adapter, run):
    for model in ((base, "--adapter", adapter), (adapter,)):
        out, err = run("generate", *model, "--prompt", "for x in", "--max-new-tokens", 20, "--threshold", 0.4)
        wanted = expected(base, adapter, "for x in", max_new_tokens=20, threshold=0.4)
        assert out == wanted.text + "\n"
        counts = {layer: wanted.exits.count(layer) for layer in (2, 4)}
        assert sum(counts.values()) > 0
        for layer, count in counts.items():
            assert not count or f"exit {layer}: {count} token" in err
        assert f"{wanted.stats.layers_run} of {wanted.stats.layers_full} layer passes run" in err


def test_what_is_piped_is_the_text_byte_for_byte(base, run, monkeypatch):
    text = "\tif x:\r\n\t\treturn [bold]1[/bold] :smile: \x07 " + "long " * 60
    ids = iter(tiny_tokenizer().encode(text))
    monkeypatch.setattr(Sampler, "takes_likeliest", False)
    monkeypatch.setattr(Sampler, "draw", lambda self, logits: next(ids, 0))
    out, _ = run("generate", base, "--prompt", "x", "--max-new-tokens", 110)
    assert out == text[: len(out) - 1] + "\n"
    assert len(out) > 120


def test_generate_as_json_is_the_contract(base, adapter, run):
    options = ("--max-new-tokens", 12, "--threshold", 0.4, "--json")
    out, err = run("generate", adapter, "--prompt", "for x in", *options)
    assert err == ""
    assert out.count("\n") == 1
    data = json.loads(out)
    wanted = expected(base, adapter, "for x in", max_new_tokens=12, threshold=0.4)
    assert list(data) == ["text", "tokens", "stats", "finish_reason"]
    assert data["text"] == wanted.text == "".join(token["text"] for token in data["tokens"])
    assert [list(token) for token in data["tokens"]] == [["id", "text", "exit", "confidence", "logprob"]] * 12
    for name, values in (
        ("id", wanted.tokens),
        ("text", wanted.pieces),
        ("exit", wanted.exits),
        ("confidence", wanted.confidences),
        ("logprob", wanted.logprobs),
    ):
        assert [token[name] for token in data["tokens"]] == values
    contract = {"tokens_per_s", "mean_exit_layer", "layers_run", "layers_full", "deep_passes"}
    assert set(data["stats"]) == contract | {
        "prompt_tokens",
        "new_tokens",
        "prefill_s",
        "decode_s",
        "heads_run",
        "drafted",
    } | {"accepted"}
    for name in ("mean_exit_layer", "layers_run", "layers_full", "deep_passes", "new_tokens"):
        assert data["stats"][name] == getattr(wanted.stats, name)
    assert data["finish_reason"] == "length"


def test_a_prompt_of_one_dash_is_read_from_stdin(base, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("for x\nin y\n"))
    out, _ = run("generate", base, "--prompt", "-", "--max-new-tokens", 8, "--json")
    data = json.loads(out)
    assert data["stats"]["prompt_tokens"] == len(tiny_tokenizer().encode("for x\nin y\n"))
    assert [t["id"] for t in data["tokens"]] == expected(base, None, "for x\nin y\n", max_new_tokens=8).tokens


def test_options_of_generation_reach_the_engine(base, adapter, run):
    def ids(*args):
        out, _ = run(
            "generate", adapter, "--prompt", "for x in", "--max-new-tokens", 16, "--ignore-eos", "--json", *args
        )
        return json.loads(out)

    def wanted(**options):
        return expected(base, adapter, "for x in", max_new_tokens=16, ignore_eos=True, **options)

    full = ids("--method", "full")
    assert [t["exit"] for t in full["tokens"]] == [6] * 16
    assert full["stats"]["heads_run"] == {"6": 16}
    for args, options in (
        (("--threshold", "2=0.9,4=0.3"), {"threshold": {2: 0.9, 4: 0.3}}),
        (("--threshold", "0.3", "--exits", "4"), {"threshold": 0.3, "exits": (4,)}),
        (("--threshold", "0.3", "--exits", "all"), {"threshold": 0.3}),
        (("--policy", "gate", "--threshold", "0.5"), {"policy": "gate", "threshold": 0.5}),
        (("--policy", "margin", "--threshold", "0.2"), {"policy": "margin", "threshold": 0.2}),
        (("--repetition-penalty", "1.5"), {"sampling": eellm.Sampling(repetition_penalty=1.5)}),
    ):
        data, other = ids(*args), wanted(**options)
        assert [t["id"] for t in data["tokens"]] == other.tokens, args
        assert [t["exit"] for t in data["tokens"]] == other.exits, args
    draws = {"temperature": 2.0, "seed": 4}
    seen = set()
    for more in ({}, {"seed": 5}, {"temperature": 1.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.4}):
        sampling = draws | more
        args = [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", value)]
        tokens = [t["id"] for t in ids("--method", "full", *args)["tokens"]]
        assert tokens == wanted(method="full", sampling=eellm.Sampling(**sampling)).tokens
        seen.add(tuple(tokens))
    assert len(seen) == 6, "each option must make a difference"
    capped = ids("--threshold", "0", "--max-deferred", "1")
    assert capped["stats"]["deep_passes"] == 1 + 15 // 2
    stops = wanted(method="full").text
    assert ids("--method", "full", "--stop", "zzzz", "--stop", stops[3:5])["text"] == stops[: stops.index(stops[3:5])]


def test_an_end_of_text_ends_the_text_unless_it_is_to_be_ignored(base, run, monkeypatch):
    for args, text, num_tokens in (((), "a", 2), (("--ignore-eos",), "ab", 3)):
        ids = iter([*tiny_tokenizer().encode("a"), 0, *tiny_tokenizer().encode("b")])
        monkeypatch.setattr(Sampler, "takes_likeliest", False)
        monkeypatch.setattr(Sampler, "draw", lambda self, logits, ids=ids: next(ids))
        data = json.loads(run("generate", base, "--prompt", "x", "--max-new-tokens", 3, "--json", *args)[0])
        assert (data["text"], len(data["tokens"])) == (text, num_tokens)


def test_chat_goes_through_the_model_s_template(base, run):
    out, _ = run("generate", base, "--prompt", "hi", "--chat", "--max-new-tokens", 8, "--json")
    data = json.loads(out)
    wanted = expected(base, None, [{"role": "user", "content": "hi"}], max_new_tokens=8)
    assert [t["id"] for t in data["tokens"]] == wanted.tokens
    assert data["stats"]["prompt_tokens"] == wanted.stats.prompt_tokens > 5


# --- tune ---


def test_tune_runs_a_recipe_with_options_over_it(base, tmp_path, run):
    (tmp_path / "text.txt").write_text("for x in range(10): print(x)\n" * 200)
    (tmp_path / "recipe.toml").write_text(
        f"""
        [model]
        base = "{base}"
        exits = [{{ layer = 2, kind = "norm", gate_size = 4 }}, {{ layer = 4, kind = "mlp" }}]
        [data]
        train = ["{tmp_path / "text.txt"}"]
        seq_len = 32
        validation_rows = 2
        [train]
        out_dir = "{tmp_path / "run"}"
        steps = 100
        """
    )
    out, err = run("tune", tmp_path / "recipe.toml", "--train.steps", 2, "--optim.lr", "1e-2", "--objective.no-gate")
    assert out == ""
    assert f"{tmp_path / 'run' / 'adapter'}: exits at 2, 4, after 2 steps" in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert not any("gate_loss" in key for row in rows for key in row)
    out, _ = run("generate", tmp_path / "run" / "adapter", "--prompt", "for", "--max-new-tokens", 3, "--json")
    assert len(json.loads(out)["tokens"]) == 3


# --- help ---


def test_help_lists_the_verbs_and_each_verb_its_options(capsys):
    for args in ([], ["--help"], ["-h"]):
        assert main(args) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert all(f"  {verb} " in out for verb in VERBS)
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert out.startswith(f"usage: eellm {verb}")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == eellm.__version__ + "\n"


def test_help_and_mistakes_load_no_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "eellm", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: eellm COMMAND")
    assert "eellm.cli.main" in done.stderr
    assert "torch" not in done.stderr
    (tmp_path / "recipe.toml").write_text("[modell]\n")
    mistakes = [
        ["--hlep"],
        ["generat"],
        ["generate", "m", "--prompt", "x", "--treshold", "1"],
        ["generate", "m", "--prompt", "x", "--threshold", "nan"],
        ["generate", "m", "--prompt", ""],
        ["import", "a", "b", "--dtyp", "float32"],
        ["add-exits", "a", "b", "--exits", "x"],
        ["tune", str(tmp_path / "recipe.toml")],
    ]
    code = (
        "import sys; from eellm.cli.main import main\n"
        f"codes = [main(args) for args in {mistakes}]\n"
        "for verb in ('import', 'add-exits', 'generate', 'tune'):\n"
        "    try: main([verb, '--help'])\n"
        "    except SystemExit as stop: codes.append(stop.code)\n"
        "print('|', codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.rpartition("|")[2].strip() == f"{[2] * 8 + [0] * 4} False", done.stderr
    assert done.stderr.count("\n") == 8


def test_the_exit_code_of_a_process_is_that_of_main(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "eellm", "generat"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "eellm: unknown command 'generat' (did you mean 'generate'?); see 'eellm --help'\n"


def test_logs_are_written_once_however_often_main_runs(base, tmp_path, run):
    for name in ("a", "b", "c"):
        _, err = run("import", base, tmp_path / name)
        assert err.count("\n") == 1


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    monkeypatch.setattr("eellm.cli.import_.main", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["import", "a", "b"]) == 130
    assert capsys.readouterr() == ("", "")
