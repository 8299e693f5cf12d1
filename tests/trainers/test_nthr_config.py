"""Settings of the NTHR trainer: what is refused, in which words, and how they are read from flags and files."""

import copy
import dataclasses
import math
import pickle
import warnings

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import GRPOConfig, TrlParser

from llm_dynamics import _trl
from llm_dynamics.trainers import NTHRConfig
from llm_dynamics.trainers.nthr.config import ETAS, METHODS, SCORED_METHODS

TRLS = {field.name for field in dataclasses.fields(GRPOConfig)}
OWN = [field for field in dataclasses.fields(NTHRConfig) if field.name not in TRLS]
PLAIN = {"bf16": False, "use_cpu": True, "report_to": "none"}
FLAGS = ["--output_dir", "unused", "--bf16", "False", "--use_cpu", "--report_to", "none"]


def configure(**options):
    return NTHRConfig("unused", **PLAIN | options)


def parse(parser, *flags):
    method = parser.parse_args_and_config if isinstance(parser, TrlParser) else parser.parse_args_into_dataclasses
    (config,) = method(args=[*FLAGS, *flags])
    return config


def test_the_fields_are_those_that_are_documented():
    assert {field.name for field in OWN} == {
        *("nthr_method", "nthr_beta", "nthr_eta", "nthr_include_self", "nthr_vocab", "nthr_correct", "nthr_kernel"),
        *("thr_q", "w_reinforce_weight", "llds_coef", "nthr_log_tokens"),
    }
    for field in OWN:
        assert f"        {field.name}: " in NTHRConfig.__doc__


@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_every_field_has_help(field):
    assert len(field.metadata["help"]) > 20
    assert field.metadata["help"].endswith(".")


def test_the_defaults_are_the_papers():
    config = configure()
    assert (config.nthr_method, config.nthr_beta, config.nthr_eta) == ("nthr", 1.0, "2|0.5-p|")
    assert config.nthr_include_self
    assert (config.nthr_vocab, config.nthr_kernel, config.nthr_correct) == ("full", "last_layer", 0.5)
    assert (config.thr_q, config.w_reinforce_weight, config.llds_coef) == (0.1, 0.1, 0.0)


@dataclasses.dataclass
class TheirConfig(GRPOConfig):
    """A configuration of a user's own."""

    judge: str = dataclasses.field(default="strict", metadata={"help": "Whom to ask."})
    beta: float = 0.25
    nthr_eta: str = "0.5"

    def greeting(self):
        return f"{self.judge}!"


@pytest.mark.parametrize(
    "given",
    [
        lambda: GRPOConfig("unused", learning_rate=3e-7, steps_per_generation=4, **PLAIN),
        lambda: GRPOConfig("unused", generation_batch_size=16, num_generations=4, **PLAIN),
        lambda: TheirConfig("unused", judge="kind", num_iterations=2, **PLAIN),
    ],
    ids=["steps", "generation-batch", "subclass"],
)
@pytest.mark.parametrize("copied", [False, True])
def test_any_grpo_configuration_is_taken_with_all_that_is_in_it(given, copied):
    args = given()
    args.remark = "set later"
    before = dict(vars(args))
    config = NTHRConfig.over(args)
    if copied:
        config = copy.deepcopy(pickle.loads(pickle.dumps(config)))  # as Trainer saves its arguments
    assert isinstance(config, NTHRConfig)
    assert isinstance(config, type(args))
    assert {name: repr(value) for name, value in vars(config).items() if name in before} == {
        name: repr(value) for name, value in before.items()
    }
    assert vars(args) == before
    for field in OWN:
        assert getattr(config, field.name) == before.get(field.name, field.default)
    assert config.to_dict().keys() == {field.name for field in dataclasses.fields(args)} | {f.name for f in OWN}
    if isinstance(args, TheirConfig):
        assert (config.greeting(), config.eta(0.3), config.beta) == ("kind!", 0.5, 0.25)


def test_a_configuration_of_ours_is_the_same_object_and_others_are_refused():
    config = configure()
    assert NTHRConfig.over(config) is config
    for wrong in (TrainingArguments("unused", **PLAIN), {"output_dir": "unused"}, "runs/nthr"):
        with pytest.raises(TypeError, match=f"NTHRConfig or another GRPOConfig; seen {type(wrong).__name__}"):
            NTHRConfig.over(wrong)
    strange = GRPOConfig("unused", **PLAIN)
    strange.loss_type = "new"
    with pytest.raises(ValueError, match="loss_type is"):
        NTHRConfig.over(strange)


def test_all_else_is_trls():
    ours, theirs = configure(learning_rate=3e-7), GRPOConfig("unused", learning_rate=3e-7, **PLAIN)
    for field in dataclasses.fields(GRPOConfig):
        if field.name not in ("logging_dir", "run_name"):
            assert repr(getattr(ours, field.name)) == repr(getattr(theirs, field.name)), field.name


def test_every_named_method_is_accepted():
    assert set(SCORED_METHODS) <= set(METHODS)
    for method in METHODS:
        assert configure(nthr_method=method).nthr_method == method


NAMES = {
    "nthr_method": METHODS,
    "nthr_vocab": ("full", "group"),
    "nthr_kernel": ("last_layer", "exact"),
    "loss_type": _trl.LOSSES_BY_TOKEN,
}


@pytest.mark.parametrize("bad", ["NTHR", "", "nthr ", None])
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_name_is_refused_with_the_allowed_ones(name, bad):
    with pytest.raises(ValueError) as refused:
        configure(**{name: bad})
    assert f"{name} is {bad!r}" in str(refused.value)
    for allowed in NAMES[name]:
        assert allowed in str(refused.value)


@pytest.mark.parametrize(
    "bad", ["2|0.5 - p|", "", "eta", "nan", "inf", "-inf", math.nan, math.inf, None, "0,5", "1 - p"]
)
def test_an_unknown_eta_is_refused_with_the_allowed_ones(bad):
    with pytest.raises(ValueError) as refused:
        configure(nthr_eta=bad)
    assert f"nthr_eta is {bad!r}" in str(refused.value)
    for allowed in (*map(repr, ETAS), "finite number"):
        assert allowed in str(refused.value)


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("nthr_beta", math.nan, ["number", "-inf", "inf"]),
        *((name, bad, ["finite number"]) for name in ("nthr_correct", "thr_q", "w_reinforce_weight")
          for bad in (math.nan, math.inf, -math.inf)),
        *(("llds_coef", bad, ["number from 0 up to 1e+06"]) for bad in (-0.1, math.nan, math.inf, -math.inf)),
    ],
)  # fmt: skip
def test_a_bad_number_is_refused_with_what_is_allowed(name, bad, allowed):
    with pytest.raises(ValueError) as refused:
        configure(**{name: bad, "num_iterations": 2})
    assert f"{name} is {bad}" in str(refused.value)
    for words in allowed:
        assert words in str(refused.value)


@pytest.mark.parametrize("name", ["nthr_beta", "nthr_correct", "thr_q", "w_reinforce_weight", "llds_coef"])
@pytest.mark.parametrize("bad", ["much", None])
def test_what_is_no_number_is_refused_as_a_value_too(name, bad):
    with pytest.raises(ValueError) as refused:
        configure(**{name: bad, "num_iterations": 2})
    assert f"{name} is {bad!r}" in str(refused.value)
    assert "number" in str(refused.value)


@pytest.mark.parametrize("method", SCORED_METHODS)
def test_the_exact_kernel_is_of_temperature_one_and_the_whole_vocabulary(method):
    with pytest.raises(ValueError, match=r"temperature is 0\.7; .*temperature=1\.0, or nthr_kernel='last_layer'"):
        configure(nthr_method=method, nthr_kernel="exact", temperature=0.7)
    with pytest.raises(ValueError, match=r"nthr_vocab='group' .*nthr_kernel='exact'.* 'full'"):
        configure(nthr_method=method, nthr_kernel="exact", nthr_vocab="group")
    assert configure(nthr_method=method, nthr_kernel="exact").nthr_kernel == "exact"


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(SCORED_METHODS)))
def test_the_kernel_does_not_matter_where_nothing_is_scored(method):
    configure(nthr_method=method, nthr_kernel="exact", nthr_vocab="group", temperature=0.7)


@pytest.mark.parametrize(
    ("updates", "allowed"),
    [
        ({}, False),
        ({"gradient_accumulation_steps": 4}, False),
        ({"num_iterations": 2}, True),
        ({"steps_per_generation": 2}, True),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2}, False),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, True),
        ({"generation_batch_size": 16}, True),
    ],
)
def test_llds_needs_a_second_update_per_batch(updates, allowed):
    configure(**updates)
    if allowed:
        assert configure(llds_coef=0.2, **updates).llds_coef == 0.2
    else:
        with pytest.raises(ValueError, match=r"llds_coef is 0\.2, .*num_iterations > 1, or steps_per_generation"):
            configure(llds_coef=0.2, **updates)


@pytest.mark.parametrize("p", [0.0, 0.125, 0.5, 0.75, 1.0])
def test_eta_of_a_success_rate(p):
    assert configure().eta(p) == 2 * abs(0.5 - p)
    assert configure(nthr_eta="p").eta(p) == p
    assert configure(nthr_eta="1-p").eta(p) == 1 - p
    for fixed in ("0", "0.0", "0.5", "1e-3", 0.25, 0, 1):
        assert configure(nthr_eta=fixed).eta(p) == float(fixed)


# ---- flags and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_flags_are_parsed(parser):
    config = parse(
        parser([NTHRConfig]), "--nthr_method", "thr", "--nthr_beta=-inf", "--nthr_eta", "0.5", "--nthr_include_self",
        "False", "--nthr_vocab", "group", "--nthr_correct", "0.9", "--thr_q", "-0.2", "--w_reinforce_weight", "0.3",
        "--llds_coef", "0.1", "--num_iterations", "2", "--nthr_log_tokens", "False",
    )  # fmt: skip
    assert isinstance(config, NTHRConfig)
    assert (config.nthr_method, config.nthr_beta, config.eta(0.9)) == ("thr", -math.inf, 0.5)
    assert (config.nthr_include_self, config.nthr_log_tokens, config.nthr_vocab) == (False, False, "group")
    assert (config.nthr_correct, config.thr_q, config.w_reinforce_weight, config.llds_coef) == (0.9, -0.2, 0.3, 0.1)


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize(("eta", "value"), [("2|0.5-p|", 0.5), ("p", 0.25), ("1-p", 0.75), ("0.5", 0.5), ("0", 0.0)])
def test_every_eta_can_be_a_flag(parser, eta, value):
    assert parse(parser([NTHRConfig]), "--nthr_eta", eta).eta(0.25) == value


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_no_flags_give_the_defaults(parser):
    found, expected = parse(parser([NTHRConfig])), configure()
    for field in OWN:
        assert getattr(found, field.name) == getattr(expected, field.name)


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_a_bad_name_is_refused_at_the_flag(parser, capsys):
    with pytest.raises(SystemExit):
        parse(parser([NTHRConfig]), "--nthr_method", "nothing")
    said = capsys.readouterr().err
    assert "--nthr_method" in said
    assert all(method in said for method in METHODS)


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):
        parse(TrlParser([NTHRConfig]), "--help")
    said = " ".join(capsys.readouterr().out.split())
    for field in OWN:
        assert f"--{field.name} " in said


@pytest.mark.parametrize("beta", ["-.inf", "-inf"])
def test_a_yaml_file_is_read(tmp_path, beta):
    path = tmp_path / "config.yaml"
    path.write_text(f"nthr_beta: {beta}\nnthr_eta: 0.5\nnthr_method: random\nnthr_include_self: false\n")
    config = parse(TrlParser([NTHRConfig]), "--config", str(path))
    assert (config.nthr_beta, config.eta(0.1), config.nthr_method) == (-math.inf, 0.5, "random")
    assert config.nthr_include_self is False


def test_settings_survive_being_written_and_read():
    config = configure(nthr_method="thr", nthr_beta=-math.inf, nthr_eta=0.5, nthr_vocab="group")
    written = config.to_dict()
    again = configure(**{field.name: written[field.name] for field in OWN})
    for field in OWN:
        assert getattr(again, field.name) == getattr(config, field.name)


@pytest.mark.parametrize(
    ("loss_type", "method", "told"), [("dapo", "nthr", True), ("cispo", "nthr", False), ("dapo", "pos_only", False)]
)
def test_that_sequence_level_ratios_undo_the_choice_of_tokens_is_told(loss_type, method, told):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        configure(loss_type=loss_type, nthr_method=method, importance_sampling_level="sequence")
    assert any("which tokens were chosen makes no difference" in str(w.message) for w in seen) == told


@pytest.mark.parametrize("eta", ["-0.5", -1, "-1e-9"])
def test_an_eta_that_would_reward_wrong_tokens_is_refused(eta):
    with pytest.raises(ValueError, match=r"nthr_eta is .*a finite number from 0 on"):
        configure(nthr_eta=eta)
