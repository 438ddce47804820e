"""Bad input gets one clear line on stderr and exit code 2; nothing is on stdout, and nothing on disk has changed."""

import errno
import io
import shutil

import pytest

import eellm
from eellm.checkpoint import files
from eellm.cli.main import main
from tests.directories import content, edit_json
from tests.models import tiny_model
from tests.unit.test_gguf import write_llama
from tests.worlds import tiny_tokenizer


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A base, an adapter for it and one for another base, a text and a recipe. Copied for each test."""
    world = tmp_path_factory.mktemp("bad") / "world"
    for seed, base, adapter in ((0, "base", "adapter"), (1, "other", "others_adapter")):
        model = tiny_model(dtype="float32", vocab_size=512, exits=(), seed=seed)
        model.tokenizer = tiny_tokenizer()
        eellm.save(model, world / base)
        eellm.add_exits(model, [eellm.ExitConfig(layer=n, kind="norm") for n in (2, 4)])
        eellm.save_adapter(model, world / adapter, base=world / base)
    (world / "text.txt").write_text("for x in range(10): print(x)\n" * 100)
    (world / "empty.txt").write_text("")
    (world / "recipe.toml").write_text(
        """
        [model]
        base = "base"
        exits = [{ layer = 2 }]
        [data]
        train = ["text.txt"]
        seq_len = 32
        validation_rows = 2
        [train]
        out_dir = "run"
        steps = 1
        """
    )
    return world


@pytest.fixture
def world(pristine, tmp_path, monkeypatch):
    """A copy of it, which is the current directory."""
    shutil.copytree(pristine, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def refused(world, capfd):
    """Runs a command that must be refused, with one line that holds each of `words`; returns that line."""

    def call(command, *words):
        args = command.split() if isinstance(command, str) else command
        before = content(world)
        assert main(args) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("eellm: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert not [word for word in words if word not in err], err
        assert content(world) == before
        return err

    return call


def test_the_world_itself_is_good(world, capfd):
    for command in (
        "generate adapter --prompt x --max-new-tokens 2",
        "generate base --adapter adapter --prompt x --max-new-tokens 2",
        "import base out",
        "add-exits base out2 --exits 2",
        "tune recipe.toml",
        "evaluate base --text text.txt --seq-len 32 --max-tokens 200",
    ):
        assert main(command.split()) == 0, capfd.readouterr().err


# --- options and recipe keys ---


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate base --prompt x --treshold 0.5", ["unknown option '--treshold' (did you mean '--threshold'?)"]),
        ("generate base --prompt x --max-tokens=5", ["'--max-tokens'", "did you mean '--max-new-tokens'"]),
        ("import base out --dtyp float32", ["unknown option '--dtyp' (did you mean '--dtype'?)"]),
        ("add-exits base out --exit 2", ["unknown option '--exit' (did you mean '--exits'?)"]),
        ("evaluate base --txt text.txt", ["unknown option '--txt' (did you mean '--text'?)"]),
        ("tune recipe.toml --optim.rl 1", ["unknown option '--optim.rl' (did you mean '--optim.lr'?)"]),
        ("tune recipe.toml --lr 1", ["unknown option '--lr'"]),
        ("generate base --prompt x -k 5", ["-k", "eellm generate --help"]),
        ("generat base", ["unknown command 'generat' (did you mean 'generate'?)", "eellm --help"]),
        ("add_exits base out", ["unknown command 'add_exits' (did you mean 'add-exits'?)"]),
        ("--hlep", ["unknown option '--hlep' (did you mean '--help'?)"]),
        ("xyz", ["unknown command 'xyz'"]),
    ],
)
def test_an_unknown_option_or_command_is_named_with_the_nearest_right_one(refused, command, words):
    refused(command, *words)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("seq_len", "seqlen", ["recipe.toml: unknown key 'data.seqlen' (did you mean 'seq_len'?)"]),
        ("[train]", "[trian]", ["unknown key 'trian' (did you mean 'train'?)"]),
        ("{ layer = 2 }", "{ layr = 2 }", ["unknown key 'model.exits[0].layr' (did you mean 'layer'?)"]),
        ("steps = 1", 'steps = "many"', ["train.steps = 'many': must be a whole number"]),
        ("steps = 1", "steps = 0", ["train.steps = 0: must be at least 1"]),
        ("{ layer = 2 }", '{ layer = 2, kind = "nrom" }', ["kind = 'nrom'", "did you mean 'norm'"]),
        ('base = "base"', "", ["'model.base' is missing"]),
        ("[data]", "[data", ["recipe.toml: not a TOML file"]),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_key_s_name(world, refused, before, after, words):
    recipe = world / "recipe.toml"
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after))
    refused("tune recipe.toml", *words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("tune", ["name the recipe first"]),
        ("tune --optim.lr 1", ["name the recipe first"]),
        ("tune nowhere.toml", ["nowhere.toml: no such recipe"]),
        ("tune base", ["base: can't be read: Is a directory"]),
        ("tune recipe.toml --train.steps many", ["--train.steps", "'many' is not a whole number"]),
        ("tune recipe.toml --train.steps 0", ["steps = 0: must be at least 1"]),
    ],
)
def test_a_recipe_that_is_not_there_and_bad_values_over_it_are_refused(refused, command, words):
    refused(command, *words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate", ["--prompt"]),
        ("generate base", ["--prompt"]),
        ("generate base --prompt", ["--prompt"]),
        ("generate base more --prompt x", ["more"]),
        ("generate base --prompt x --method fast", ["'fast'", "full", "early"]),
        ("generate base --prompt x --policy maxprob", ["'maxprob'", "max_prob"]),
        ("generate base --prompt x --top-k 1.5", ["--top-k: '1.5' is not a whole number"]),
        ("generate base --prompt x --top-p 1.5", ["top_p = 1.5: must lie between 0 and 1"]),
        ("generate base --prompt x --temperature nan", ["temperature = nan"]),
        ("generate base --prompt x --seed -1", ["seed = -1: must be at least 0"]),
        ("generate base --prompt x --max-new-tokens 0", ["max_new_tokens = 0: must be at least 1"]),
        ("generate base --prompt x --dtype fp32", ["dtype = 'fp32'", "did you mean 'float32'"]),
        ("generate base --prompt x --device cuda:99", ["device = 'cuda:99'"]),
        ("generate base --prompt x --device abacus", ["device = 'abacus'"]),
        ("import base", ["PATH"]),
        ("import base out --dtype float63", ["'float63'", "float32"]),
        ("add-exits base out", ["--exits"]),
        ("add-exits base out --exits all", ["--exits: name the layers, such as 10,20"]),
        ("add-exits base out --exits two", ["--exits: 'two' is not a whole number"]),
    ],
)
def test_missing_and_malformed_values_are_named(refused, command, words):
    refused(command, *words)


# --- models ---


def test_missing_weights_are_named(world, refused):
    (world / "base" / "model.safetensors").unlink()
    for command in (
        "generate base --prompt x",
        "import base out",
        "add-exits base out --exits 2",
        "generate adapter --prompt x",
    ):
        refused(command, "model.safetensors is missing")


def test_a_missing_shard_is_named(world, refused):
    eellm.save(eellm.load(world / "base"), world / "base", max_shard_bytes=100_000)
    shard = max((world / "base").glob("model-*-of-*.safetensors"))
    shard.unlink()
    refused("generate base --prompt x", f"{shard.name} is missing")


def test_truncated_weights_are_named(world, refused):
    file = world / "base" / "model.safetensors"
    for size in (file.stat().st_size - 1, 1000, 7, 0):
        file.write_bytes(file.read_bytes()[:size])
        for command in ("generate base --prompt x", "import base out", "add-exits base out --exits 2"):
            refused(command, "base/model.safetensors is truncated or not a safetensors file")


def test_truncated_exits_are_named(world, refused):
    file = world / "adapter" / "exits.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused("generate adapter --prompt x", "adapter/exits.safetensors is truncated")


def test_an_unsupported_architecture_is_named(world, refused):
    edit_json(world / "base" / "config.json", model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    for command in ("generate base --prompt x", "import base out", "evaluate base --text text.txt", "tune recipe.toml"):
        refused(command, "architecture 'GPTNeoXForCausalLM' is not supported; known are llama, mistral, qwen2, qwen3")


def test_a_damaged_tokenizer_is_named(world, refused):
    (world / "base" / "tokenizer.json").write_text("{}")
    refused("generate base --prompt x", "base/tokenizer.json: not a tokenizer")


def test_a_model_that_is_not_there_is_named(world, refused):
    for name in ("nowhere", f"{world}/none", "none.gguf", "text.txt", "world/"):
        refused(["generate", name, "--prompt", "x"], name.rstrip("/"))
    (world / "out").mkdir()
    refused("import nowhere out", "nowhere")
    refused("add-exits adapter out --exits 3", "adapter: exits are added to a model directory")


def test_a_gguf_with_an_unknown_tensor_type_is_refused(world, refused, capfd):
    write_llama(world / "m.gguf")
    assert main(["import", "m.gguf", "good"]) == 0
    capfd.readouterr()
    data = bytearray((world / "m.gguf").read_bytes())
    place = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data[place : place + 4] = (999).to_bytes(4, "little")
    (world / "m.gguf").write_bytes(data)
    for command in ("import m.gguf out", "generate m.gguf --prompt x"):
        refused(command, "m.gguf: ", "999")
    refused("generate m.gguf --adapter adapter --prompt x", "an adapter's base is a model directory")


# --- exits ---


@pytest.mark.parametrize(
    ("exits", "words"),
    [
        ("6", ["exit at layer 6: the model has 6 layers", "use 1 to 5"]),
        ("2,99", ["exit at layer 99"]),
        ("0", ["layer = 0: must be at least 1"]),
        ("2,4,2", ["exit at layer 2 is given twice"]),
    ],
)
def test_an_exit_beyond_the_last_layer_or_given_twice_is_refused(world, refused, exits, words):
    refused(f"add-exits base out --exits {exits}", *words)
    recipe = (world / "recipe.toml").read_text()
    entries = ", ".join(f"{{ layer = {layer} }}" for layer in exits.split(","))
    (world / "recipe.toml").write_text(recipe.replace("{ layer = 2 }", entries))
    refused("tune recipe.toml", *words)


def test_an_exit_that_the_model_lacks_is_refused_with_those_it_has(refused):
    refused("generate adapter --prompt x --exits 2,3", "the model has no exit at layer 3; it has 2, 4")
    refused("generate base --prompt x --exits 2", "the model has no exit at layer 2; it has none")
    refused("generate adapter --prompt x --threshold 2=0.5,6=0.5", "no exit at layer 6")
    refused("generate adapter --prompt x --policy gate", "policy = 'gate': the exit at layer 2 has no gate")


def test_an_adapter_for_another_base_is_refused(world, refused):
    message = "the exits in others_adapter were made for another base"
    refused("generate base --adapter others_adapter --prompt x", message, "../other", "use that base")
    refused("evaluate base --adapter others_adapter --text text.txt", message)
    refused("generate adapter --adapter others_adapter --prompt x", "adapter itself")
    shutil.rmtree(world / "base")
    refused("generate adapter --prompt x", "adapter is an adapter of adapter/../base, which isn't there")
    (world / "other").rename(world / "base")
    refused("generate adapter --prompt x", "made for another base")


def test_an_adapter_that_is_missing_newer_or_swapped_is_refused(world, refused):
    refused("generate base --adapter nowhere --prompt x", "nowhere/exits.json is missing")
    refused("generate base --adapter other --prompt x", "other/exits.json is missing")
    edit_json(world / "adapter" / "exits.json", format_version=2)
    refused("generate adapter --prompt x", "has format 2, this release reads up to 1; upgrade eellm")
    edit_json(world / "adapter" / "exits.json", format_version=1, weights_sha256="0" * 64)
    refused("generate adapter --prompt x", "exits.safetensors doesn't belong to the exits.json beside it")


def test_exits_are_not_written_into_a_model_directory(refused):
    refused("add-exits base base --exits 2", "base is a model directory; name another one")
    refused("add-exits base other --exits 2", "other is a model directory")
    refused("import base base", "is the source itself")
    refused("import base ./other/../base", "is the source itself")


# --- prompts and thresholds ---


def test_an_empty_prompt_is_refused(refused, monkeypatch):
    refused(["generate", "base", "--prompt", ""], "the prompt is empty")
    refused(["generate", "base", "--prompt", "", "--chat"], "the prompt is empty")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    refused("generate base --prompt -", "the prompt is empty")


def test_a_prompt_longer_than_the_context_is_refused(refused):
    words = ("tokens; the model's context is 128 and needs room for one",)
    refused(["generate", "base", "--prompt", "0" * 128], "the prompt has 128", *words)
    refused(["generate", "base", "--prompt", "0" * 1000, "--json"], *words)
    refused(["generate", "base", "--prompt", "0" * 128, "--chat"], *words)


def test_a_prompt_that_is_no_text_is_refused(refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    refused("generate base --prompt -", "the prompt on stdin is not UTF-8")
    refused(["generate", "base", "--prompt", "caf\udce9"], "surrogate")


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        ("high", ["--threshold: 'high' is not a number"]),
        ("0,8", ["--threshold: '0,8' is not a number"]),
        ("2=x", ["--threshold: 'x' is not a number"]),
        ("two=0.5", ["--threshold: 'two' is not a whole number"]),
        ("nan", ["threshold = nan: must be a number of at least 0"]),
        ("2=nan", ["threshold = nan: must be a number of at least 0"]),
        ("-0.5", ["threshold = -0.5: must be a number of at least 0"]),
        ("", ["--threshold: '' is not a number"]),
    ],
)
def test_a_threshold_that_is_no_number_is_refused(refused, threshold, words):
    refused(["generate", "adapter", "--prompt", "x", "--threshold", threshold], *words)


def test_a_stop_string_that_is_empty_is_refused(refused):
    refused(["generate", "base", "--prompt", "x", "--stop", ""], "stop = '': an empty stop string")


def test_workers_that_cannot_share_stages_are_refused(refused):
    words = "tp = 2: that many processes share each stage, so workers must be a multiple of it, and it is 3"
    refused("generate base --prompt x --workers 3 --tp 2", words)


# --- texts ---


def test_a_text_that_is_missing_or_empty_is_named(refused):
    refused("evaluate base --text nowhere.txt", "nowhere.txt")
    refused("evaluate base --text empty.txt", "empty.txt")


# --- what the machine refuses ---


def full(monkeypatch):
    """The disk is full after the first 64 bytes of any weights."""

    def failing(tensors, path, **options):
        path.write_bytes(b"x" * 64)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", failing)


def test_a_full_disk_leaves_nothing_half_written(world, refused, monkeypatch):
    (world / "there").mkdir()
    (world / "there" / "config.json").write_text("{}")
    full(monkeypatch)
    for command in ("import base out", "import base there", "import base other", "add-exits base out --exits 2"):
        refused(command, "can't write ", "the disk is full; nothing was changed")
    refused("add-exits base others_adapter --exits 2", "the disk is full; nothing was changed")


def test_a_file_where_a_directory_should_be_is_named(world, refused):
    refused("import base text.txt", "can't write text.txt: Not a directory; nothing was changed")
    refused("import base text.txt/out", "can't write text.txt/out: Not a directory; nothing was changed")
    refused("add-exits base text.txt --exits 2", "can't write text.txt: Not a directory")
    refused("tune recipe.toml --train.out-dir text.txt/run", "text.txt/run: Not a directory")
    (world / "base" / "config.json").unlink()
    (world / "base" / "config.json").mkdir()
    refused("generate base --prompt x", "base/config.json: Is a directory")


def test_json_of_a_refused_command_is_not_begun(refused):
    refused("generate adapter --prompt x --json --exits 3", "no exit at layer 3")
