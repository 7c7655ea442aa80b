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
    with pytest.raises(InputError, match=r"training\.num_stepz \(did you mean training\.num_steps\?\)"):
        load_config(path, arguments)


def test_sizes_beyond_any_machine_are_refused_at_once(tmp_path):
    """The first filled the memory while the pipeline was cut; the second was no time of the system."""
    for text, message in {
        "[model]\nnum_layers = 999999999999": "num_layers=999999999999 must be at most 100000",
        "[parallel]\ntimeout_s = 1e300": "timeout_s=1e.300 must be above 0, and at most 1e6",
    }.items():
        with pytest.raises(InputError, match=message):
            loaded(tmp_path, text)
