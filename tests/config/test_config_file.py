"""Start here when a key of a config file or of the command line gets another value, or is lost in a round trip."""

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig, GPTConfig, ParallelConfig
from fused_megatron.config.config_file import load_config, save_config


def loaded(tmp_path, text, *arguments):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load_config(path, arguments)


@pytest.mark.parametrize(("text", "arguments", "overlap"), [
    ("", (), True),
    ("[parallel]\noverlap = true", (), True),
    ("[parallel]\noverlap = false", (), False),
    ("[parallel]\noverlap = 4", (), 4),
    ("[parallel]\noverlap = 1", (), 1),
    ("[parallel]\noverlap = 4", ("--parallel.overlap", "False"), False),
    ("[parallel]\noverlap = false", ("--parallel.overlap=3",), 3),
])  # fmt: skip
def test_overlap_is_a_bool_or_a_number_of_chunks_and_stays_so(tmp_path, text, arguments, overlap):
    config = loaded(tmp_path, text, *arguments)
    save_config(config, tmp_path / "saved.toml")
    for found in (config, load_config(tmp_path / "saved.toml")):
        assert found.parallel.overlap == overlap and type(found.parallel.overlap) is type(overlap)


@pytest.mark.parametrize("overlap", ["0", "-1", "2.5", "'some'"])
def test_other_overlaps_are_refused(tmp_path, overlap):
    with pytest.raises(InputError, match="overlap"):
        loaded(tmp_path, f"[parallel]\noverlap = {overlap}")
    with pytest.raises(InputError, match="overlap=0 must be 1 or more"):
        ParallelConfig(overlap=0)


def test_the_family_decides_which_keys_a_model_has_and_survives_the_file(tmp_path):
    bert = loaded(tmp_path, '[model]\nfamily = "bert"\npost_norm = true', "--model.num-layers", "3")
    assert bert.model == BERTConfig(post_norm=True, num_layers=3)
    save_config(bert, tmp_path / "saved.toml")
    assert load_config(tmp_path / "saved.toml") == bert
    assert loaded(tmp_path, "", "--model.family", "gpt").model == GPTConfig()
    with pytest.raises(InputError, match=r"model\.post_norm is no key of model\.family='gpt'"):
        loaded(tmp_path, "[model]\npost_norm = true")
    with pytest.raises(InputError, match="must be one of: 'gpt', 'bert'"):
        loaded(tmp_path, '[model]\nfamily = "t5"')


@pytest.mark.parametrize("arguments", [(), ("--training.num_stepz=3",)])
def test_an_unknown_key_of_a_file_or_option_is_refused(tmp_path, arguments):
    """If it were skipped, the run would use the default."""
    path = tmp_path / "run.toml"
    path.write_text("[training]\n" + ("num_steps = 3\n" if arguments else "num_stepz = 3\n"))
    with pytest.raises(InputError, match=r"training\.num_stepz \(did you mean (--)?training\.num.steps\?\)"):
        load_config(path, arguments)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.steps", "training.num_steps"),  # optimizer.eps has more of its letters
        ("model.heads", "model.num_heads"),
        ("training.batch_size", "training.global_batch_size"),
        ("optimizer.warmup", "optimizer.warmup_steps"),
    ],
)
def test_a_key_that_lacks_a_word_of_the_name_gets_the_whole_name(tmp_path, key, meant):
    section, name = key.split(".")
    with pytest.raises(InputError, match=rf"unknown key {key} \(did you mean {meant}\?\)"):
        loaded(tmp_path, f"[{section}]\n{name} = 3\n")


def test_sizes_beyond_any_machine_are_refused_at_once(tmp_path):
    """The first filled the memory while the pipeline was cut; the second was no time of the system."""
    for text, message in {
        "[model]\nnum_layers = 999999999999": "num_layers=999999999999 must be at most 100000",
        "[parallel]\ntimeout_s = 1e300": "timeout_s=1e.300 must be above 0, and at most 1e6",
    }.items():
        with pytest.raises(InputError, match=message):
            loaded(tmp_path, text)


def test_all_mistakes_are_named_at_once_and_no_mistake_twice(tmp_path):
    text = """
        [model]
        num_heads = 3
        num_layers = "many"
        hiden_size = 5
        [parallel]
        tensor_parallel_size = 3
        [optimizer]
        kind = "adam"
        lr = -1
        [training]
        dtype = "float16"
        num_steps = 0
    """
    with pytest.raises(InputError) as error:
        loaded(tmp_path, text, "--training.microbatch-size", "3", "--training.seeed=4", "--parallel.overlap=0")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.toml'}: 10 mistakes: (1) ") and "\n" not in message
    for mistake in (
        "model.num_layers='many' must be a whole number",
        "unknown key model.hiden_size (did you mean model.hidden_size?)",
        "unknown option --training.seeed (did you mean --training.seed?)",
        "hidden_size=256 must be divisible by num_heads=3",
        "overlap=0 must be 1 or more",
        "optimizer.kind='adam' must be one of: 'adamw', 'sgd', 'lion', 'muon'",
        "lr=-1.0 must be above 0",
        "num_steps=0 must be 1 or more",
        "dtype='float16' must be one of: 'auto', 'float32', 'bfloat16'",
        "global_batch_size=16 must be divisible by microbatch_size=3",
    ):
        assert message.count(mistake) == 1
    # tensor_parallel_size fits the number of heads that was given, and not the default in its place.
    assert "tensor_parallel_size" not in message


def test_lists_of_numbers_keep_their_type(tmp_path):
    for config in (
        loaded(tmp_path, "[parallel]\npipeline_cut = [1, 3]"),
        loaded(tmp_path, "", "--parallel.pipeline-cut", "1", "3", "--optimizer.warmup-steps=2"),
    ):
        assert config.parallel.pipeline_cut == (1, 3)
    with pytest.raises(
        InputError, match=r"parallel\.pipeline_cut=\['--data\.path', 'x'\] must be a list of whole numb"
    ):
        loaded(tmp_path, '[parallel]\npipeline_cut = ["--data.path", "x"]')
